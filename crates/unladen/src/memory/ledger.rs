//! What we hold, by our own account: every reservation counts from before its allocation until after its release.

use std::sync::{Arc, Mutex, PoisonError};

/// A kind of memory that is counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Host memory that a strategy holds besides the destination.
    Host,
    /// Host memory that bytes pass through on their way.
    Staging,
    /// Names, shapes, steps and stacks of threads: held all along, on the heap and elsewhere.
    Bookkeeping,
    /// The device's memory, where the weights stay. With `--device host` it is host memory, counted here all the same.
    Device,
    /// Mapped files: address space, not memory of ours.
    Mapped,
}

/// Bytes held in each space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// In [`Space::Host`].
    pub host_bytes: u64,
    /// In [`Space::Staging`].
    pub staging_bytes: u64,
    /// In [`Space::Bookkeeping`].
    pub bookkeeping_bytes: u64,
    /// In [`Space::Device`].
    pub device_bytes: u64,
    /// In [`Space::Mapped`].
    pub mapped_bytes: u64,
}

impl Held {
    /// The figure of one space.
    pub fn of(&mut self, space: Space) -> &mut u64 {
        match space {
            Space::Host => &mut self.host_bytes,
            Space::Staging => &mut self.staging_bytes,
            Space::Bookkeeping => &mut self.bookkeeping_bytes,
            Space::Device => &mut self.device_bytes,
            Space::Mapped => &mut self.mapped_bytes,
        }
    }
}

/// The most that was held at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peaks {
    /// On the device.
    pub device_bytes: u64,
    /// On the host, as anonymous memory: staging and bookkeeping included, and the device's if the device is the host.
    pub host_anon_bytes: u64,
    /// As mapped files.
    pub mapped_bytes: u64,
    /// On the host, anonymous and mapped together: what RSS shows if every mapped page is touched.
    pub host_rss_bytes: u64,
}

impl Peaks {
    /// Raises the peaks to what is held now. `device_is_host`: the device space is host memory.
    pub fn raise(&mut self, held: Held, device_is_host: bool) {
        let device_on_host_bytes = if device_is_host { held.device_bytes } else { 0 };
        let besides_bytes = held.host_bytes + held.staging_bytes + held.bookkeeping_bytes;
        let anon_bytes = besides_bytes + device_on_host_bytes;
        self.device_bytes = self.device_bytes.max(held.device_bytes);
        self.host_anon_bytes = self.host_anon_bytes.max(anon_bytes);
        self.mapped_bytes = self.mapped_bytes.max(held.mapped_bytes);
        self.host_rss_bytes = self.host_rss_bytes.max(anon_bytes + held.mapped_bytes);
    }
}

/// Counts reservations, and remembers the most since it was made.
#[derive(Debug)]
pub struct Ledger {
    device_is_host: bool,
    state: Mutex<(Held, Peaks)>,
}

impl Ledger {
    /// An empty ledger. `device_is_host`: the device space is host memory.
    pub fn new(device_is_host: bool) -> Arc<Ledger> {
        Arc::new(Ledger { device_is_host, state: Mutex::default() })
    }

    /// Counts `len_bytes` until the reservation is dropped.
    pub fn reserve(self: &Arc<Ledger>, space: Space, len_bytes: u64) -> Reservation {
        self.change(|held| *held.of(space) += len_bytes);
        Reservation { ledger: Arc::clone(self), space, len_bytes }
    }

    /// What is held now, and the most that was held at once.
    pub fn get(&self) -> (Held, Peaks) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Held)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state.0);
        let held = state.0;
        state.1.raise(held, self.device_is_host);
    }
}

/// Bytes that count as held. They are given back when this is dropped.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    space: Space,
    len_bytes: u64,
}

impl Reservation {
    /// For memory that belongs to no load, and that nobody counts.
    pub fn uncounted(len_bytes: u64) -> Reservation {
        Ledger::new(true).reserve(Space::Host, len_bytes)
    }

    /// How many bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.ledger.change(|held| *held.of(self.space) -= self.len_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_stay_and_dropped_reservations_go() {
        let ledger = Ledger::new(true);
        let model = ledger.reserve(Space::Device, 100);
        drop(ledger.reserve(Space::Staging, 30));
        let (held, peaks) = ledger.get();
        assert_eq!((held.device_bytes, held.staging_bytes), (100, 0));
        assert_eq!((peaks.device_bytes, peaks.host_anon_bytes), (100, 130));
        drop(model);
        assert_eq!(ledger.get().0, Held::default());
    }
}
