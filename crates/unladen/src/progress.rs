//! Bytes done and total, and the wish to stop. Prints nothing: whoever wants to show it polls it.

use crate::error::{Error, Result};
use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

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

    /// Fails with [`Error::Cancelled`] once somebody asked to stop.
    pub fn check(&self, path: &Path) -> Result<()> {
        match self.is_cancelled.load(Ordering::Relaxed) {
            true => Err(Error::Cancelled { path: path.to_owned() }),
            false => Ok(()),
        }
    }
}
