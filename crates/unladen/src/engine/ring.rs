//! Staging buffers on their way round: filled by threads that read, emptied by the one that waits for the GPUs.
//!
//! Whoever has a buffer owns it: nobody else can touch it, by type. What is shared is only who gets which next. A side that
//! fails, or panics, ends the other one, which would wait for ever.

#[cfg(all(loom, test))]
mod models;

use crate::error::Result;
#[cfg(all(loom, test))]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(all(loom, test)))]
use std::sync::{Condvar, Mutex, MutexGuard};
use std::{collections::VecDeque, sync::PoisonError};

/// Buffers `B`; with what the emptier is to know, `F`, they are full.
pub(super) struct Ring<B, F> {
    state: Mutex<State<B, F>>,
    /// A buffer was given back, or there will be none any more.
    is_empty_there: Condvar,
    /// A buffer was filled, or there will be none any more.
    is_full_there: Condvar,
}

struct State<B, F> {
    empty: Vec<B>,
    full: VecDeque<(B, F)>,
    is_ended: bool,
    is_stopped: bool,
}

/// Stops a ring when it is dropped: whoever waits at the other side would wait for ever after a panic on this one.
struct Guard<'r, B, F>(&'r Ring<B, F>);

impl<B, F> Guard<'_, B, F> {
    /// All is well on this side.
    fn disarm(self) {
        std::mem::forget(self);
    }
}

impl<B, F> Drop for Guard<'_, B, F> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A buffer that is being filled. If that fails, or panics, the ring has it back: who gives up a buffer may need more stack
/// than a thread that fills has.
struct Lent<'r, B, F> {
    ring: &'r Ring<B, F>,
    buffer: Option<B>,
}

impl<B, F> Drop for Lent<'_, B, F> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.ring.give_empty(buffer);
        }
    }
}

/// Buffers on their way, in the order in which they were handed over. Those that are on their way when this is dropped are
/// waited for.
pub(super) trait Flights<B, F> {
    fn is_empty(&self) -> bool;

    /// True if the first has arrived; if there is none, false.
    fn is_first_done(&self) -> Result<bool>;

    /// Puts a full buffer on its way, behind all others. May [`land`](Flights::land) some before.
    fn hand_over(&mut self, buffer: B, full: F, ring: &Ring<B, F>) -> Result<()>;

    /// Waits for the first, and gives it back.
    fn land(&mut self, ring: &Ring<B, F>) -> Result<()>;
}

/// What there is to be emptied.
enum Next<B, F> {
    Full(B, F),
    /// Nothing now.
    Later,
    /// Nothing any more: whoever fills is done, or the ring was stopped.
    Ended,
}

impl<B, F> Ring<B, F> {
    /// Without buffers so far, but with room for so many: [`give_empty`](Ring::give_empty) brings them in.
    pub(super) fn with_room(n_buffers: usize) -> Ring<B, F> {
        let (empty, full) = (Vec::with_capacity(n_buffers), VecDeque::with_capacity(n_buffers));
        let state = State { full, empty, is_ended: false, is_stopped: false };
        Ring { state: Mutex::new(state), is_empty_there: Condvar::new(), is_full_there: Condvar::new() }
    }

    /// Waits for an empty buffer, has it filled, and passes it on. False once the ring was stopped: something else failed, and
    /// says so.
    pub(super) fn fill(&self, fill: impl FnOnce(&mut B) -> Result<F>) -> Result<bool> {
        let mut lent = Lent { ring: self, buffer: self.take_empty() };
        // Stops before the buffer is back: nobody else shall have it then.
        let guard = Guard(self);
        let Some(buffer) = &mut lent.buffer else { return Ok(false) };
        let full = fill(buffer)?;
        if let Some(buffer) = lent.buffer.take() {
            self.give_full(buffer, full);
        }
        guard.disarm();
        Ok(true)
    }

    /// Runs what fills buffers, on whatever threads: nothing is filled any more when it returns.
    pub(super) fn fill_all(&self, fill_all: impl FnOnce() -> Result<()>) -> Result<()> {
        let guard = Guard(self);
        fill_all()?;
        guard.disarm();
        self.end();
        Ok(())
    }

    /// Hands over what was filled until there is nothing any more, and waits for what is on its way. `prepare` may bring in
    /// buffers, which others fill meanwhile.
    pub(super) fn empty_all<G: Flights<B, F>>(&self, prepare: impl FnOnce() -> Result<G>) -> Result<()> {
        let guard = Guard(self);
        // What is still on its way is waited for whatever the others do: dropped first, and they are stopped after it.
        let mut flights = prepare()?;
        loop {
            while flights.is_first_done()? {
                flights.land(self)?;
            }
            match self.take_full(flights.is_empty()) {
                Next::Full(buffer, full) => flights.hand_over(buffer, full, self)?,
                Next::Later => flights.land(self)?,
                Next::Ended => break,
            }
        }
        while !flights.is_empty() {
            flights.land(self)?;
        }
        guard.disarm();
        Ok(())
    }

    /// Waits for an empty buffer; `None` once the ring was stopped.
    fn take_empty(&self) -> Option<B> {
        let mut state = self.lock();
        loop {
            if state.is_stopped {
                return None;
            }
            if let Some(empty) = state.empty.pop() {
                return Some(empty);
            }
            state = self.is_empty_there.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn give_empty(&self, buffer: B) {
        self.lock().empty.push(buffer);
        self.is_empty_there.notify_one();
    }

    fn give_full(&self, buffer: B, full: F) {
        self.lock().full.push_back((buffer, full));
        self.is_full_there.notify_one();
    }

    /// The buffer that was filled first. `waits`: rather than saying [`Next::Later`].
    fn take_full(&self, waits: bool) -> Next<B, F> {
        let mut state = self.lock();
        loop {
            if state.is_stopped {
                return Next::Ended;
            }
            if let Some((buffer, full)) = state.full.pop_front() {
                return Next::Full(buffer, full);
            }
            if state.is_ended {
                return Next::Ended;
            }
            if !waits {
                return Next::Later;
            }
            state = self.is_full_there.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nothing will be filled any more.
    fn end(&self) {
        self.lock().is_ended = true;
        self.is_full_there.notify_all();
    }

    /// Nobody gets a buffer any more: something failed.
    fn stop(&self) {
        self.lock().is_stopped = true;
        self.is_empty_there.notify_all();
        self.is_full_there.notify_all();
    }

    /// True if nobody gets a buffer any more.
    pub(super) fn is_stopped(&self) -> bool {
        self.lock().is_stopped
    }

    /// The buffers that nobody has.
    pub(super) fn into_empty(self) -> Vec<B> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).empty
    }

    fn lock(&self) -> MutexGuard<'_, State<B, F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn ring_of(buffers: &[u8]) -> Ring<u8, u8> {
        let ring = Ring::with_room(buffers.len());
        buffers.iter().for_each(|it| ring.give_empty(*it));
        ring
    }

    #[test]
    fn buffers_go_round_in_order_and_the_end_is_told() {
        let ring = ring_of(&[1]);
        let buffer = ring.take_empty().unwrap();
        assert!(matches!(ring.take_full(false), Next::Later));
        ring.give_full(buffer, 10);
        assert!(matches!(ring.take_full(true), Next::Full(1, 10)));
        ring.give_empty(1);
        ring.end();
        assert!(matches!(ring.take_full(true), Next::Ended));
        assert_eq!(ring.into_empty(), [1]);
    }

    #[test]
    fn a_side_that_panics_stops_the_ring_for_the_other() {
        let ring = ring_of(&[]);
        std::thread::scope(|scope| {
            let emptier = scope.spawn(|| matches!(ring.take_full(true), Next::Ended));
            let filler = scope.spawn(|| {
                let _guard = Guard(&ring);
                panic!("on purpose");
            });
            assert!(filler.join().is_err());
            assert!(emptier.join().unwrap());
        });
        assert!(ring.take_empty().is_none());
        let ring = ring_of(&[1]);
        Guard(&ring).disarm();
        assert_eq!(ring.take_empty(), Some(1));
    }

    #[test]
    fn after_a_stop_nobody_gets_a_buffer() {
        let ring = ring_of(&[1]);
        ring.give_full(2, 12);
        assert!(!ring.is_stopped());
        ring.stop();
        assert!(ring.is_stopped());
        assert!(ring.take_empty().is_none());
        assert!(matches!(ring.take_full(true), Next::Ended));
    }

    #[test]
    fn a_buffer_whose_filling_fails_is_the_rings_again() {
        let ring = ring_of(&[1]);
        let cancelled = || crate::error::Error::Cancelled { path: Default::default() };
        assert!(ring.fill(|_| Err(cancelled())).is_err());
        assert!(ring.is_stopped());
        assert_eq!(ring.into_empty(), [1]);
        let ring = ring_of(&[1]);
        let panicking = AssertUnwindSafe(|| ring.fill(|_| panic!("on purpose")));
        assert!(catch_unwind(panicking).is_err());
        assert!(ring.is_stopped());
        assert_eq!(ring.into_empty(), [1]);
    }
}
