//! Reading a range of a file by one of the ways that there are, whatever single system calls give.

use super::{FileSource, memory::ends_early, raw::Alignment};
use crate::{
    error::{Error, Result},
    io_path::IoPath,
    memory::{self, PAGE_BYTES},
};
use rustix::fs::Advice;
use std::{io, num::NonZeroU64, ops::Range, sync::atomic::Ordering::Relaxed};

/// A range of which the page cache holds this much is read through it: direct reads of what is there take twice as long,
/// buffered reads of what is not up to four times, and they leave it there.
const MOSTLY_CACHED: f64 = 0.75;

impl FileSource {
    /// Fills the first `need_bytes` of `target` with the bytes from `start_byte` on. The rest of `target` is room to read
    /// whole blocks into, and holds anything afterwards.
    ///
    /// Direct reads go straight into `target` where its address and `start_byte` lie alike in a block. What is before the
    /// first whole block and behind the last, or all of it where they lie differently or the file system refuses, is
    /// read through the page cache and dropped from it.
    ///
    /// Fails with [`Error::Io`] at the first byte that the system could not read, with [`Error::Corrupt`] if the file ends
    /// before that many bytes; `target` then holds anything.
    pub fn read(&self, path: IoPath, start_byte: u64, target: &mut [u8], need_bytes: usize) -> Result<()> {
        if need_bytes > target.len() {
            return Err(super::too_short(&self.stamp().path, start_byte));
        }
        match path {
            IoPath::Buffered => self.read_buffered(start_byte, &mut target[..need_bytes]),
            IoPath::DropBehind => self.read_drop_behind(start_byte, &mut target[..need_bytes]),
            IoPath::Direct => self.read_direct(start_byte, target, need_bytes),
            IoPath::Mixed if self.is_mostly_cached(start_byte, need_bytes) => {
                self.read_buffered(start_byte, &mut target[..need_bytes])
            }
            IoPath::Mixed => self.read_direct(start_byte, target, need_bytes),
        }
    }

    /// True if the file can be read past the page cache. Tried once, by reading a block.
    pub fn can_read_direct(&self) -> bool {
        #[repr(align(4096))]
        struct Page([u8; PAGE_BYTES as usize]);
        let can = || {
            let mut page = Box::new(Page([0; PAGE_BYTES as usize]));
            loop {
                match self.raw.read_at(true, 0, &mut page.0) {
                    Ok(_) => return true,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return false,
                }
            }
        };
        self.usable_alignment().is_some() && *self.direct.is_tried_well.get_or_init(can)
    }

    /// Bytes of the file that are in the page cache; `None` where the kernel does not tell.
    pub fn cached_bytes(&self) -> Option<u64> {
        memory::cached_bytes(self.file(), self.stamp().len_bytes)
    }

    /// Not where the kernel does not tell: a direct read keeps the promise to leave nothing behind.
    fn is_mostly_cached(&self, start_byte: u64, len_bytes: usize) -> bool {
        memory::cached_range_bytes(self.file(), start_byte, len_bytes as u64)
            .is_some_and(|cached_bytes| cached_bytes as f64 >= MOSTLY_CACHED * len_bytes as f64)
    }

    pub(super) fn read_buffered(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < target.len() {
            let at_byte = start_byte.saturating_add(done as u64);
            match self.raw.read_at(false, at_byte, &mut target[done..]) {
                Ok(0) => {
                    let end_byte = start_byte.saturating_add(target.len() as u64);
                    return Err(ends_early(end_byte, at_byte).in_file(&self.stamp().path));
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(at_byte, error)),
            }
        }
        Ok(())
    }

    fn read_drop_behind(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        if target.is_empty() {
            return Ok(());
        }
        // Reading ahead would leave pages behind that no range of ours covers. A file system that ignores the advice
        // costs page cache, not correctness: that goes for both pieces of advice.
        if !self.direct.is_read_ahead_off.swap(true, Relaxed) {
            let _ = rustix::fs::fadvise(self.file(), 0, None, Advice::Random);
        }
        let read = self.read_buffered(start_byte, target);
        // The kernel keeps pages that a range only touches: round outwards. Half a page may be dropped before its
        // neighbour reads the other half; it is read again then.
        let end_byte = start_byte.saturating_add(target.len() as u64);
        let from_byte = start_byte - start_byte % PAGE_BYTES;
        let len_bytes = end_byte.checked_next_multiple_of(PAGE_BYTES).unwrap_or(end_byte) - from_byte;
        let _ = rustix::fs::fadvise(self.file(), from_byte, NonZeroU64::new(len_bytes), Advice::DontNeed);
        read
    }

    fn read_direct(&self, start_byte: u64, target: &mut [u8], need_bytes: usize) -> Result<()> {
        let blocks = self.usable_alignment().and_then(|it| Blocks::of(it, start_byte, target, need_bytes));
        let Some(Blocks { alignment, range }) = blocks else {
            return self.read_drop_behind(start_byte, &mut target[..need_bytes]);
        };
        // In order, so that an error names the first byte that did not come.
        self.read_drop_behind(start_byte, &mut target[..range.start])?;
        let body_byte = start_byte.saturating_add(range.start as u64);
        let done = range.start + self.read_blocks(body_byte, &mut target[range.clone()], alignment)?;
        // What does not fill a block, or did not come: a file that ends early is told apart from a refusal here.
        if done < need_bytes {
            self.read_drop_behind(start_byte.saturating_add(done as u64), &mut target[done..need_bytes])?;
        }
        Ok(())
    }

    /// Reads whole blocks and says how many bytes came; fewer than asked for at the end of the file, or if the file system
    /// refuses.
    fn read_blocks(&self, start_byte: u64, target: &mut [u8], alignment: Alignment) -> Result<usize> {
        let mut done = 0;
        while done < target.len() {
            // Behind a short read, the block that came in part is read again.
            let from = done - done % alignment.file_bytes;
            match self.raw.read_at(true, start_byte.saturating_add(from as u64), &mut target[from..]) {
                Ok(n) if from + n <= done => break,
                Ok(n) => done = from + n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_refusal(&error) => {
                    self.direct.is_refused.store(true, Relaxed);
                    break;
                }
                Err(error) => return Err(self.failed(start_byte.saturating_add(done as u64), error)),
            }
        }
        Ok(done)
    }

    /// `None` where this file cannot be read directly, as far as is known.
    fn usable_alignment(&self) -> Option<Alignment> {
        if self.direct.is_refused.load(Relaxed) {
            return None;
        }
        *self.direct.alignment.get_or_init(|| super::raw::direct_alignment(self.file()))
    }

    fn failed(&self, at_byte: u64, error: io::Error) -> Error {
        Error::io_at(&self.stamp().path, "read", at_byte, error)
    }
}

/// What a file system says that has no direct reads, or none as we ask for them.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// The part of a target that whole blocks can be read into.
#[derive(Debug, PartialEq, Eq)]
struct Blocks {
    alignment: Alignment,
    /// Within the target; may end in the room behind what is needed.
    range: Range<usize>,
}

impl Blocks {
    /// `None` if there is no whole block, or blocks of the file do not lie in memory as a direct read needs them.
    fn of(alignment: Alignment, start_byte: u64, target: &[u8], need_bytes: usize) -> Option<Blocks> {
        let block = alignment.file_bytes;
        let start = (start_byte.checked_next_multiple_of(block as u64)? - start_byte) as usize;
        if start >= need_bytes {
            return None;
        }
        let room = (target.len() - start) / block * block;
        let range = start..start + (need_bytes - start).next_multiple_of(block).min(room);
        let is_aligned = (target.as_ptr().addr() + start).is_multiple_of(alignment.memory_bytes);
        (is_aligned && !range.is_empty()).then_some(Blocks { alignment, range })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Aligned([u8; 16384]);

    #[test]
    fn whole_blocks_are_found_between_odd_ends() {
        let buffer = Box::new(Aligned([0; 16384]));
        let alignment = Alignment { file_bytes: 4096, memory_bytes: 512 };
        let range = |start_byte, target: &[u8], need_bytes| {
            Blocks::of(alignment, start_byte, target, need_bytes).map(|it| it.range)
        };
        // Rounded up where there is room for it, down where there is not.
        assert_eq!(range(8192, &buffer.0[..8192], 5000), Some(0..8192));
        assert_eq!(range(8192, &buffer.0[..5000], 5000), Some(0..4096));
        // A head up to the next block, if file and memory lie alike.
        assert_eq!(range(8192 + 100, &buffer.0[100..9000], 8900), Some(3996..8092));
        assert_eq!(range(8192 + 100, &buffer.0[612..], 9000), Some(3996..3996 + 8192));
        assert_eq!(range(8192 + 100, &buffer.0[101..9000], 8900), None);
        // No block at all.
        assert_eq!(range(8192, &buffer.0[..4095], 4095), None);
        assert_eq!(range(8192 + 100, &buffer.0[100..], 3996), None);
        assert_eq!(range(0, &buffer.0, 0), None);
        assert_eq!(range(u64::MAX - 1, &buffer.0, 10), None);
    }
}
