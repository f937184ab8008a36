//! Reads small things that stand near each other in a file, or far apart, with few reads and little of what lies between.

use crate::{error::Result, source::ReadAt};
use std::ops::Range;

/// The least that a read brings.
const MIN_AHEAD_BYTES: usize = 512;
/// The most that a read brings beyond what is asked for.
const MAX_AHEAD_BYTES: usize = 256 << 10;

/// A part of a file, of which a few bytes at a time are in memory.
pub(super) struct Window<'s> {
    pub(super) source: &'s dyn ReadAt,
    /// The part: what lies beyond is never read.
    pub(super) range: Range<u64>,
    buffer: Vec<u8>,
    /// Where the buffer's first byte stands in the file.
    buffer_start: u64,
    ahead_bytes: usize,
}

impl<'s> Window<'s> {
    /// What of the range lies beyond the end of the file is not in it.
    pub(super) fn new(source: &'s dyn ReadAt, range: Range<u64>) -> Window<'s> {
        let range = range.start..range.end.min(source.len_bytes()).max(range.start);
        Window { source, buffer: Vec::new(), buffer_start: range.start, range, ahead_bytes: MIN_AHEAD_BYTES }
    }

    /// At least `want_bytes` bytes from `at_byte` on, or all there are until the end of the part.
    pub(super) fn from(&mut self, at_byte: u64, want_bytes: usize) -> Result<&[u8]> {
        let left_bytes = self.range.end.saturating_sub(at_byte);
        if left_bytes == 0 {
            return Ok(&[]);
        }
        let want_bytes = want_bytes.min(usize::try_from(left_bytes).unwrap_or(usize::MAX));
        let held = at_byte.checked_sub(self.buffer_start).and_then(|it| usize::try_from(it).ok());
        if let Some(held) = held.filter(|&it| it <= self.buffer.len() && self.buffer.len() - it >= want_bytes)
        {
            return Ok(&self.buffer[held..]);
        }
        // Where one read follows the other, more is worth reading at a time; where they are far apart, it is not.
        let buffer_end = self.buffer_start + self.buffer.len() as u64;
        let is_near = (self.buffer_start..=buffer_end + self.ahead_bytes as u64).contains(&at_byte);
        self.ahead_bytes =
            if is_near { (self.ahead_bytes * 2).min(MAX_AHEAD_BYTES) } else { MIN_AHEAD_BYTES };
        let read_bytes = (want_bytes.max(self.ahead_bytes) as u64).min(left_bytes);
        self.buffer = self.source.read_range(at_byte..at_byte + read_bytes)?;
        self.buffer_start = at_byte;
        Ok(&self.buffer)
    }

    /// Exactly `N` bytes; `None` if the part ends before.
    pub(super) fn array<const N: usize>(&mut self, at_byte: u64) -> Result<Option<[u8; N]>> {
        Ok(self.from(at_byte, N)?.first_chunk::<N>().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;
    use std::{
        path::Path,
        sync::atomic::{AtomicUsize, Ordering},
    };

    /// Counts what is read.
    struct Counted(MemorySource, AtomicUsize, AtomicUsize);

    impl ReadAt for Counted {
        fn len_bytes(&self) -> u64 {
            self.0.len_bytes()
        }

        fn path(&self) -> &Path {
            self.0.path()
        }

        fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.2.fetch_add(target.len(), Ordering::Relaxed);
            self.0.read_exact_at(start_byte, target)
        }
    }

    fn counted(len: usize) -> Counted {
        let bytes = (0..len).map(|it| it as u8).collect();
        Counted(MemorySource::new("x", bytes), AtomicUsize::new(0), AtomicUsize::new(0))
    }

    #[test]
    fn neighbours_are_read_together_and_far_ones_alone() {
        let source = counted(4 << 20);
        let mut window = Window::new(&source, 0..u64::MAX);
        for at in (0..1 << 20).step_by(100) {
            assert_eq!(window.array::<2>(at).unwrap(), Some([at as u8, (at + 1) as u8]));
        }
        let n_reads = source.1.swap(0, Ordering::Relaxed);
        assert!(n_reads < 20, "{n_reads}");
        source.2.store(0, Ordering::Relaxed);
        for at in (0..4 << 20).step_by(600 << 10) {
            assert_eq!(window.array::<1>(at).unwrap(), Some([at as u8]));
        }
        assert!(source.2.load(Ordering::Relaxed) < 8 * 4096);
    }

    #[test]
    fn nothing_beyond_the_part_is_read() {
        let source = counted(1000);
        let mut window = Window::new(&source, 10..20);
        assert_eq!(window.from(15, 100).unwrap().len(), 5);
        assert_eq!(window.array::<6>(15).unwrap(), None);
        assert!(window.from(20, 1).unwrap().is_empty() && window.from(5000, 1).unwrap().is_empty());
        assert!(Window::new(&source, 900..2000).from(900, 200).unwrap().len() == 100);
    }
}
