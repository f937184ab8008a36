//! Staging buffers on their way round: filled by threads that read, emptied by the one that waits for the GPUs.
//!
//! Whoever has a buffer owns it: nobody else can touch it, by type. What is shared is only who gets which next.

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
pub(super) struct Guard<'r, E, F>(pub(super) &'r Ring<E, F>);

impl<E, F> Guard<'_, E, F> {
    /// All is well on this side.
    pub(super) fn disarm(self) {
        std::mem::forget(self);
    }
}

impl<E, F> Drop for Guard<'_, E, F> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What there is to be emptied.
pub(super) enum Next<F> {
    Full(F),
    /// Nothing now.
    Later,
    /// Nothing any more: whoever fills is done, or the ring was stopped.
    Ended,
}

impl<E, F> Ring<E, F> {
    pub(super) fn new(empty: Vec<E>) -> Ring<E, F> {
        let full = VecDeque::with_capacity(empty.len());
        let state = State { full, empty, is_ended: false, is_stopped: false };
        Ring { state: Mutex::new(state), is_empty_there: Condvar::new(), is_full_there: Condvar::new() }
    }

    /// Waits for an empty buffer; `None` once the ring was stopped.
    pub(super) fn take_empty(&self) -> Option<E> {
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

    pub(super) fn give_full(&self, full: F) {
        self.lock().full.push_back(full);
        self.is_full_there.notify_one();
    }

    /// The buffer that was filled first. `waits`: rather than saying [`Next::Later`].
    pub(super) fn take_full(&self, waits: bool) -> Next<F> {
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
    pub(super) fn end(&self) {
        self.lock().is_ended = true;
        self.is_full_there.notify_all();
    }

    /// Nobody gets a buffer any more: something failed.
    pub(super) fn stop(&self) {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Every order in which threads can meet, by `RUSTFLAGS="--cfg loom" cargo test -p unladen --lib models`.
    #[cfg(loom)]
    mod models {
        use super::*;
        use loom::{sync::Arc, thread};
        use std::sync::{Mutex as Plain, PoisonError};

        /// What two fillers with two buffers bring to one that empties them. A buffer is a number, and knows who has it.
        fn emptied(n_pieces: u32, stops_at: Option<u32>) -> Vec<u32> {
            let ring: Arc<Ring<u32, (u32, u32)>> = Arc::new(Ring::new(vec![0, 1]));
            let next = Arc::new(Plain::new(0..n_pieces));
            let fill = |ring: Arc<Ring<u32, (u32, u32)>>, next: Arc<Plain<std::ops::Range<u32>>>| {
                while let Some(buffer) = ring.take_empty() {
                    // Let go of before anything that another thread may come in between of.
                    let piece = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                    match piece {
                        Some(piece) => ring.give_full((buffer, piece)),
                        None => {
                            ring.give_empty(buffer);
                            break;
                        }
                    }
                }
            };
            let fillers = {
                let (ring, next) = (Arc::clone(&ring), Arc::clone(&next));
                thread::spawn(move || {
                    let (theirs, pieces) = (Arc::clone(&ring), Arc::clone(&next));
                    let other = thread::spawn(move || fill(theirs, pieces));
                    fill(Arc::clone(&ring), next);
                    other.join().unwrap();
                    ring.end();
                })
            };
            let (mut in_flight, mut taken) = (VecDeque::new(), Vec::new());
            loop {
                match ring.take_full(in_flight.is_empty()) {
                    Next::Full((buffer, piece)) => {
                        assert!(!in_flight.contains(&buffer), "a buffer that is on its way was filled");
                        in_flight.push_back(buffer);
                        taken.push(piece);
                        if stops_at == Some(piece) {
                            ring.stop();
                        }
                    }
                    Next::Later => ring.give_empty(in_flight.pop_front().unwrap()),
                    Next::Ended => break,
                }
            }
            fillers.join().unwrap();
            taken
        }

        /// All orders in which threads are interrupted at most twice each where they could have gone on: without a bound
        /// they are too many, and what goes wrong does with few.
        fn in_every_order(model: impl Fn() + Sync + Send + 'static) {
            let mut builder = loom::model::Builder::new();
            builder.preemption_bound = Some(2);
            builder.check(model);
        }

        #[test]
        fn every_piece_comes_round_once_and_all_threads_end() {
            in_every_order(|| {
                let mut taken = emptied(3, None);
                taken.sort_unstable();
                assert_eq!(taken, [0, 1, 2]);
            });
        }

        #[test]
        fn a_stop_ends_everybody() {
            in_every_order(|| {
                let taken = emptied(3, Some(0));
                assert_eq!(taken.last(), Some(&0), "nothing comes after the stop: {taken:?}");
            });
        }
    }

    #[cfg(not(loom))]
    #[test]
    fn buffers_go_round_in_order_and_the_end_is_told() {
        let ring: Ring<u8, u8> = Ring::new(vec![1]);
        let buffer = ring.take_empty().unwrap();
        assert!(matches!(ring.take_full(false), Next::Later));
        ring.give_full(buffer + 10);
        assert!(matches!(ring.take_full(true), Next::Full(11)));
        ring.give_empty(1);
        ring.end();
        assert!(matches!(ring.take_full(true), Next::Ended));
        assert_eq!(ring.into_empty(), [1]);
    }

    #[cfg(not(loom))]
    #[test]
    fn a_side_that_panics_stops_the_ring_for_the_other() {
        let ring: Ring<u8, u8> = Ring::new(Vec::new());
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
        let ring: Ring<u8, u8> = Ring::new(vec![1]);
        Guard(&ring).disarm();
        assert_eq!(ring.take_empty(), Some(1));
    }

    #[cfg(not(loom))]
    #[test]
    fn after_a_stop_nobody_gets_a_buffer() {
        let ring: Ring<u8, u8> = Ring::new(vec![1]);
        ring.give_full(2);
        ring.stop();
        assert!(ring.take_empty().is_none());
        assert!(matches!(ring.take_full(true), Next::Ended));
    }
}
