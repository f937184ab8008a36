//! What we hold, by our own account: every reservation counts from before its allocation until after its release.

use crate::device::{Device, PerDevice};
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
    /// Where the weights stay, and what a strategy holds there besides. On the host it is host memory, counted here all the
    /// same.
    Device(Device),
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
    pub device_bytes: PerDevice,
    /// In [`Space::Mapped`].
    pub mapped_bytes: u64,
}

impl Held {
    /// Counts what is taken.
    pub fn add(&mut self, space: Space, len_bytes: u64) {
        self.change(space, |bytes| *bytes += len_bytes);
    }

    /// Counts what is given back.
    pub fn subtract(&mut self, space: Space, len_bytes: u64) {
        self.change(space, |bytes| *bytes -= len_bytes);
    }

    fn change(&mut self, space: Space, change: impl FnOnce(&mut u64)) {
        match space {
            Space::Host => change(&mut self.host_bytes),
            Space::Staging => change(&mut self.staging_bytes),
            Space::Bookkeeping => change(&mut self.bookkeeping_bytes),
            // There is no device of an ordinal that is too large, so there is nothing of it to count.
            Space::Device(device) => {
                if let Some(bytes) = self.device_bytes.get_mut(device) {
                    change(bytes);
                }
            }
            Space::Mapped => change(&mut self.mapped_bytes),
        }
    }
}

/// The most that was held at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peaks {
    /// On each device.
    pub device_bytes: PerDevice,
    /// On the host, as anonymous memory: staging and bookkeeping included, and the weights that stay there.
    pub host_anon_bytes: u64,
    /// As mapped files.
    pub mapped_bytes: u64,
    /// On the host, anonymous and mapped together: what RSS shows if every mapped page is touched.
    pub host_rss_bytes: u64,
}

impl Peaks {
    /// Raises the peaks to what is held now.
    pub fn raise(&mut self, held: Held) {
        let besides_bytes = held.host_bytes + held.staging_bytes + held.bookkeeping_bytes;
        let anon_bytes = besides_bytes + held.device_bytes.host_bytes;
        self.device_bytes.raise(&held.device_bytes);
        self.host_anon_bytes = self.host_anon_bytes.max(anon_bytes);
        self.mapped_bytes = self.mapped_bytes.max(held.mapped_bytes);
        self.host_rss_bytes = self.host_rss_bytes.max(anon_bytes + held.mapped_bytes);
    }
}

/// Counts reservations, and remembers the most since it was made.
#[derive(Debug, Default)]
pub struct Ledger {
    state: Mutex<(Held, Peaks)>,
}

impl Ledger {
    /// An empty ledger.
    pub fn new() -> Arc<Ledger> {
        Arc::default()
    }

    /// Counts `len_bytes` until the reservation is dropped.
    pub fn reserve(self: &Arc<Ledger>, space: Space, len_bytes: u64) -> Reservation {
        self.change(|held| held.add(space, len_bytes));
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
        state.1.raise(held);
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
        Ledger::new().reserve(Space::Host, len_bytes)
    }

    /// How many bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.ledger.change(|held| held.subtract(self.space, self.len_bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_stay_and_dropped_reservations_go() {
        let ledger = Ledger::new();
        let model = ledger.reserve(Space::Device(Device::Host), 100);
        let on_gpu = ledger.reserve(Space::Device(Device::Cuda(1)), 7000);
        drop(ledger.reserve(Space::Staging, 30));
        let (held, peaks) = ledger.get();
        assert_eq!((held.device_bytes.host_bytes, held.staging_bytes), (100, 0));
        assert_eq!((peaks.device_bytes.host_bytes, peaks.host_anon_bytes), (100, 130));
        assert_eq!(peaks.device_bytes.get(Device::Cuda(1)), 7000);
        drop((model, on_gpu));
        assert_eq!(ledger.get().0, Held::default());
    }
}
