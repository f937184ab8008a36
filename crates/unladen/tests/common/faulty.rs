//! A disk that fails: puts faults between a file and whoever reads it. Shared by the tests of `source` and of the engine.

use super::RawRead;
use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// What goes wrong with system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// At most so many bytes a call; `usize::MAX`: nothing goes wrong.
    Short(usize),
    /// Every other call is interrupted.
    Interrupted,
    /// Calls that start behind this byte fail, calls before it stop there.
    BrokenAt(u64),
    /// The file has fewer bytes than when it was opened.
    EndsAt(u64),
    /// No direct reads, found out at the first.
    DirectRefused(i32),
    /// No direct reads from the second call on.
    DirectRefusedLater,
}

/// Called before each system call, with its number, whether it is direct, and where it starts. May panic, too.
pub(super) type Before = Arc<dyn Fn(usize, bool, u64) + Send + Sync>;

/// System calls with a fault.
pub(super) struct Faulty {
    inner: Box<dyn RawRead>,
    fault: Fault,
    before: Before,
    n_calls: AtomicUsize,
    n_direct_calls: AtomicUsize,
}

impl Faulty {
    /// Puts a fault before `inner`.
    pub(super) fn new(inner: Box<dyn RawRead>, fault: Fault, before: Before) -> Faulty {
        Faulty { inner, fault, before, n_calls: AtomicUsize::new(0), n_direct_calls: AtomicUsize::new(0) }
    }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({:?})", self.fault)
    }
}

impl RawRead for Faulty {
    fn read_at(&self, is_direct: bool, start_byte: u64, target: &mut [u8]) -> io::Result<usize> {
        let n_calls = self.n_calls.fetch_add(1, Relaxed);
        let n_direct_calls = self.n_direct_calls.fetch_add(usize::from(is_direct), Relaxed);
        (self.before)(n_calls, is_direct, start_byte);
        let failed = |code| Err(io::Error::from_raw_os_error(code));
        // The inner call reads as it was asked to, so that direct reads stay aligned; what came is cut down afterwards.
        let read = |target: &mut [u8]| self.inner.read_at(is_direct, start_byte, target);
        let up_to = |end_byte: u64, n: usize| n.min(end_byte.saturating_sub(start_byte) as usize);
        match self.fault {
            Fault::Short(most_bytes) => {
                // Not all of it is read, or one byte a call would take hours.
                let asked = if is_direct { target.len() } else { target.len().min(most_bytes) };
                let n = read(&mut target[..asked])?.min(most_bytes);
                // What a short read did not bring is nobody's.
                target[n..].iter_mut().take(4096).for_each(|byte| *byte = 0xEE);
                Ok(n)
            }
            Fault::Interrupted if n_calls.is_multiple_of(2) => failed(libc::EINTR),
            Fault::Interrupted => read(target),
            Fault::BrokenAt(byte) if start_byte >= byte => failed(libc::EIO),
            Fault::BrokenAt(byte) | Fault::EndsAt(byte) => Ok(up_to(byte, read(target)?)),
            Fault::DirectRefused(code) if is_direct => failed(code),
            Fault::DirectRefusedLater if is_direct && n_direct_calls > 0 => failed(libc::EINVAL),
            Fault::DirectRefusedLater if is_direct => Ok(read(target)?.min(4096 + 512)),
            Fault::DirectRefused(_) | Fault::DirectRefusedLater => read(target),
        }
    }
}
