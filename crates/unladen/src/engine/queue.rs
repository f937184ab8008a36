//! Hands work to threads, one piece at a time, until there is none or one of them fails.
//!
//! This is all that the threads of a load share beside what they only read: each has its own staging buffer and its own
//! part of the targets, so there is no ring of buffers to wait for, and nobody ever waits but for the cutting of a piece.

#[cfg(all(loom, test))]
use loom::sync::Mutex;
#[cfg(not(all(loom, test)))]
use std::sync::Mutex;
use std::sync::PoisonError;

/// Work that is cut while it is taken. Each piece goes to one thread, in order; what is not taken is never cut.
pub(super) struct Queue<I> {
    /// `None` once it was stopped.
    work: Mutex<Option<I>>,
}

impl<I: Iterator> Queue<I> {
    pub(super) fn new(work: I) -> Queue<I> {
        Queue { work: Mutex::new(Some(work)) }
    }

    /// The next piece; `None` when all are taken, and from the moment that [`Queue::stop`] returns.
    pub(super) fn take(&self) -> Option<I::Item> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.next()
    }

    /// Lets nobody take anything more: a thread failed.
    pub(super) fn stop(&self) {
        *self.work.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(not(loom))]
    #[test]
    fn pieces_come_in_order_until_they_end_or_are_stopped() {
        let queue = Queue::new(0..3);
        assert_eq!(
            [queue.take(), queue.take(), queue.take(), queue.take()],
            [Some(0), Some(1), Some(2), None]
        );
        let queue = Queue::new(0..3);
        assert_eq!(queue.take(), Some(0));
        queue.stop();
        assert_eq!([queue.take(), queue.take()], [None, None]);
    }

    /// Every order in which threads can meet, by `RUSTFLAGS="--cfg loom" cargo test -p unladen --lib models`.
    #[cfg(loom)]
    mod models {
        use super::*;
        use loom::{sync::Arc, thread};

        const N_PIECES: u32 = 3;

        /// Takes until there is nothing, or until `stops_at` comes, as a thread does whose piece fails.
        fn takes(queue: &Queue<std::ops::Range<u32>>, stops_at: Option<u32>) -> Vec<u32> {
            let mut taken = Vec::new();
            while let Some(piece) = queue.take() {
                taken.push(piece);
                if stops_at == Some(piece) {
                    queue.stop();
                    assert_eq!(queue.take(), None, "after its own stop");
                }
            }
            taken
        }

        /// What three threads take, each piece of theirs in order.
        fn taken_by_three(stops_at: Option<u32>) -> Vec<u32> {
            let queue = Arc::new(Queue::new(0..N_PIECES));
            let others = [0, 1].map(|_| {
                let queue = Arc::clone(&queue);
                thread::spawn(move || takes(&queue, stops_at))
            });
            let mut all = vec![takes(&queue, stops_at)];
            all.extend(others.map(|it| it.join().unwrap()));
            assert!(all.iter().all(|taken| taken.is_sorted()), "{all:?}");
            assert_eq!(queue.take(), None);
            let mut all = all.concat();
            all.sort_unstable();
            all
        }

        #[test]
        fn each_piece_goes_to_one_thread() {
            loom::model(|| assert_eq!(taken_by_three(None), [0, 1, 2]));
        }

        #[test]
        fn a_stop_leaves_no_hole_and_lets_nobody_take_what_comes_after() {
            loom::model(|| {
                let all = taken_by_three(Some(1));
                // Another thread may take the last piece before the stop.
                assert!(all == [0, 1] || all == [0, 1, 2], "{all:?}");
            });
        }

        #[test]
        fn once_a_stop_returned_every_thread_sees_it() {
            loom::model(|| {
                let queue = Arc::new(Queue::new(0..N_PIECES));
                let stopping = Arc::clone(&queue);
                thread::spawn(move || stopping.stop()).join().unwrap();
                assert_eq!(queue.take(), None);
            });
        }
    }
}
