//! A part of a source that reads as a whole one: an archive inside a file.

use super::{ReadAt, memory::ends_early};
use crate::error::Result;
use std::{ops::Range, path::Path};

/// Some bytes of another source.
#[derive(Clone, Copy)]
pub struct Section<'a> {
    source: &'a dyn ReadAt,
    start_byte: u64,
    len_bytes: u64,
}

impl<'a> Section<'a> {
    /// The bytes of a range. Fails with [`Error::Corrupt`](crate::Error::Corrupt) if the source does not hold them all.
    pub fn new(source: &'a dyn ReadAt, range: Range<u64>) -> Result<Section<'a>> {
        match range.end.checked_sub(range.start) {
            Some(len_bytes) if range.end <= source.len_bytes() => {
                Ok(Section { source, start_byte: range.start, len_bytes })
            }
            _ => Err(ends_early(range.start.max(range.end), source.len_bytes()).in_file(source.path())),
        }
    }
}

impl ReadAt for Section<'_> {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn path(&self) -> &Path {
        self.source.path()
    }

    fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        let end_byte = start_byte.saturating_add(target.len() as u64);
        if end_byte > self.len_bytes {
            return Err(ends_early(end_byte, self.len_bytes).in_file(self.path()));
        }
        self.source.read_exact_at(self.start_byte + start_byte, target)
    }

    fn check_unchanged(&self) -> Result<()> {
        self.source.check_unchanged()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;

    #[test]
    fn a_section_shows_its_own_bytes_and_no_others() {
        let whole = MemorySource::new("x", (0..100).collect());
        let section = Section::new(&whole, 10..30).unwrap();
        assert_eq!(section.len_bytes(), 20);
        assert_eq!(section.read_range(0..20).unwrap(), (10..30).collect::<Vec<u8>>());
        let inner = Section::new(&section, 5..6).unwrap();
        assert_eq!(inner.read_range(0..1).unwrap(), [15]);
        assert!(section.read_range(19..21).is_err() && section.read_exact_at(u64::MAX, &mut [0]).is_err());
        assert!(section.read_exact_at(20, &mut [0]).is_err() && section.read_exact_at(20, &mut []).is_ok());
    }

    #[test]
    fn ranges_outside_the_source_are_refused() {
        let whole = MemorySource::new("x", vec![0; 8]);
        for (start, end) in [(0, 9), (9, 9), (5, 4), (u64::MAX, u64::MAX), (8, u64::MAX)] {
            assert!(Section::new(&whole, start..end).is_err(), "{start}..{end}");
        }
        assert!(Section::new(&whole, 8..8).is_ok());
    }
}
