//! Bytes done and total, and the wish to stop. Prints nothing: whoever wants to show it polls it.

use crate::error::{Error, Result};
use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

/// How often a callback is called.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// What the thread that calls it has for its stack. The callback is the caller's, and may print.
const REPORT_STACK_BYTES: usize = 128 << 10;

struct Stop<'s, 'scope> {
    is_over: &'s AtomicBool,
    watcher: Option<thread::ScopedJoinHandle<'scope, ()>>,
}

impl Stop<'_, '_> {
    fn end(&mut self) {
        self.is_over.store(true, Ordering::Release);
        let Some(watcher) = self.watcher.take() else { return };
        watcher.thread().unpark();
        // A callback that panicked is not called from there any more; that is no reason to lose what was loaded.
        let _ = watcher.join();
    }
}

impl Drop for Stop<'_, '_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// How far a load, a save or a hash is. Shared by the thread that works and the one that watches.
#[derive(Debug, Default)]
pub struct Progress {
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    is_cancelled: AtomicBool,
}

impl Progress {
    /// Says how many more bytes there are to do.
    pub fn expect(&self, more_bytes: u64) {
        self.total_bytes.fetch_add(more_bytes, Ordering::Relaxed);
    }

    /// Says that bytes are done.
    pub fn add(&self, done_bytes: u64) {
        self.done_bytes.fetch_add(done_bytes, Ordering::Relaxed);
    }

    /// Bytes done and total.
    pub fn get(&self) -> (u64, u64) {
        (self.done_bytes.load(Ordering::Relaxed), self.total_bytes.load(Ordering::Relaxed))
    }

    /// Asks the work to stop within one chunk.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    /// Does some work while a thread calls `callback` with bytes done and total, twenty times a second and once at the
    /// end. Without a thread to be had, only at the end.
    pub fn report<T>(&self, callback: &mut (dyn FnMut(u64, u64) + Send), work: impl FnOnce() -> T) -> T {
        let is_over = AtomicBool::new(false);
        let mut call = || {
            let (done_bytes, total_bytes) = self.get();
            callback(done_bytes, total_bytes);
        };
        let result = thread::scope(|scope| {
            let watch = || {
                while !is_over.load(Ordering::Acquire) {
                    call();
                    thread::park_timeout(REPORT_EVERY);
                }
            };
            let watcher =
                thread::Builder::new().stack_size(REPORT_STACK_BYTES).spawn_scoped(scope, watch).ok();
            // The thread ends when the work panics, too: else the scope would wait for it.
            let mut stop = Stop { is_over: &is_over, watcher };
            let result = work();
            stop.end();
            result
        });
        call();
        result
    }

    /// Fails with [`Error::Cancelled`] once somebody asked to stop.
    pub fn check(&self, path: &Path) -> Result<()> {
        match self.is_cancelled.load(Ordering::Relaxed) {
            true => Err(Error::Cancelled { path: path.to_owned() }),
            false => Ok(()),
        }
    }
}
