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

/// Empty buffers `E` and full ones `F`.
pub(super) struct Ring<E, F> {
    state: Mutex<State<E, F>>,
    /// A buffer was given back, or there will be none any more.
    is_empty_there: Condvar,
    /// A buffer was filled, or there will be none any more.
    is_full_there: Condvar,
}

struct State<E, F> {
    empty: Vec<E>,
    full: VecDeque<F>,
    is_ended: bool,
    is_stopped: bool,
}

/// Stops a ring when it is dropped: whoever waits at the other side would wait for ever after a panic on this one.
struct Guard<'r, E, F>(&'r Ring<E, F>);

impl<E, F> Guard<'_, E, F> {
    /// All is well on this side.
    fn disarm(self) {
        std::mem::forget(self);
    }
}

impl<E, F> Drop for Guard<'_, E, F> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Buffers on their way, in the order in which they were handed over. Those that are on their way when this is dropped are
/// waited for.
pub(super) trait Flights<E, F> {
    fn is_empty(&self) -> bool;

    /// True if the first has arrived; if there is none, false.
    fn is_first_done(&self) -> Result<bool>;

    /// Puts a full buffer on its way, behind all others. May [`land`](Flights::land) some before.
    fn hand_over(&mut self, full: F, ring: &Ring<E, F>) -> Result<()>;

    /// Waits for the first, and gives it back.
    fn land(&mut self, ring: &Ring<E, F>) -> Result<()>;
}

/// What there is to be emptied.
enum Next<F> {
    Full(F),
    /// Nothing now.
    Later,
    /// Nothing any more: whoever fills is done, or the ring was stopped.
    Ended,
}

impl<E, F> Ring<E, F> {
    /// Without buffers so far, but with room for so many: [`give_empty`](Ring::give_empty) brings them in.
    pub(super) fn with_room(n_buffers: usize) -> Ring<E, F> {
        let (empty, full) = (Vec::with_capacity(n_buffers), VecDeque::with_capacity(n_buffers));
        let state = State { full, empty, is_ended: false, is_stopped: false };
        Ring { state: Mutex::new(state), is_empty_there: Condvar::new(), is_full_there: Condvar::new() }
    }

    /// Waits for an empty buffer, has it filled, and passes it on. False once the ring was stopped: something else failed, and
    /// says so.
    pub(super) fn fill(&self, fill: impl FnOnce(E) -> Result<F>) -> Result<bool> {
        // A buffer that is lost comes back to nobody who waits for one.
        let guard = Guard(self);
        let Some(empty) = self.take_empty() else { return Ok(false) };
        self.give_full(fill(empty)?);
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
    pub(super) fn empty_all<G: Flights<E, F>>(&self, prepare: impl FnOnce() -> Result<G>) -> Result<()> {
        let guard = Guard(self);
        // What is still on its way is waited for whatever the others do: dropped first, and they are stopped after it.
        let mut flights = prepare()?;
        loop {
            while flights.is_first_done()? {
                flights.land(self)?;
            }
            match self.take_full(flights.is_empty()) {
                Next::Full(full) => flights.hand_over(full, self)?,
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
    fn take_empty(&self) -> Option<E> {
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

    pub(super) fn give_empty(&self, empty: E) {
        self.lock().empty.push(empty);
        self.is_empty_there.notify_one();
    }

    fn give_full(&self, full: F) {
        self.lock().full.push_back(full);
        self.is_full_there.notify_one();
    }

    /// The buffer that was filled first. `waits`: rather than saying [`Next::Later`].
    fn take_full(&self, waits: bool) -> Next<F> {
        let mut state = self.lock();
        loop {
            if state.is_stopped {
                return Next::Ended;
            }
            if let Some(full) = state.full.pop_front() {
                return Next::Full(full);
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

    /// The buffers that nobody has.
    pub(super) fn into_empty(self) -> Vec<E> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).empty
    }

    fn lock(&self) -> MutexGuard<'_, State<E, F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

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
        ring.give_full(buffer + 10);
        assert!(matches!(ring.take_full(true), Next::Full(11)));
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
        ring.give_full(2);
        ring.stop();
        assert!(ring.take_empty().is_none());
        assert!(matches!(ring.take_full(true), Next::Ended));
    }
}
