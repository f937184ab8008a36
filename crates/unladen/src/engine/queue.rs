//! Hands work to threads, one piece at a time, until there is none or one of them fails.

#[cfg(loom)]
use loom::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

/// Work that is cut while it is taken. Each piece goes to one thread, in order.
pub(super) struct Queue<I> {
    work: Mutex<I>,
    is_over: AtomicBool,
}

impl<I: Iterator> Queue<I> {
    pub(super) fn new(work: I) -> Queue<I> {
        Queue { work: Mutex::new(work), is_over: AtomicBool::new(false) }
    }

    /// The next piece; `None` when all are taken, or after [`Queue::stop`].
    pub(super) fn take(&self) -> Option<I::Item> {
        if self.is_over.load(Ordering::Relaxed) {
            return None;
        }
        self.work.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    /// Lets nobody take anything more: a thread failed.
    pub(super) fn stop(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}
