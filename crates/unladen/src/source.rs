//! Where bytes come from: positional reads of files and of memory. Interprets no byte.

mod file;
mod memory;
mod raw;
mod read;
mod set;
#[cfg(test)]
mod tests;

pub use file::FileSource;
pub use memory::MemorySource;
pub use raw::RawRead;
pub use set::FileSet;

use crate::error::Result;
use std::{ops::Range, path::Path};

/// Bytes that can be read at any place by several threads at once.
pub trait ReadAt: Send + Sync {
    /// How many bytes there are.
    fn len_bytes(&self) -> u64;

    /// The path, for messages.
    fn path(&self) -> &Path;

    /// Fills `target` with the bytes from `start_byte` on.
    ///
    /// Fails with [`Error::Io`](crate::Error::Io) if the system does, with [`Error::Corrupt`](crate::Error::Corrupt)
    /// if the source ends first; `target` then holds anything.
    fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()>;

    /// A small range in a buffer of its own, for headers.
    ///
    /// Nothing is allocated for a range that lies outside the source.
    fn read_range(&self, range: Range<u64>) -> Result<Vec<u8>> {
        if range.start > range.end || range.end > self.len_bytes() {
            return Err(memory::ends_early(range.end, self.len_bytes()).in_file(self.path()));
        }
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.read_exact_at(range.start, &mut bytes)?;
        Ok(bytes)
    }
}
