//! Where bytes come from: positional reads of files and of memory. Interprets no byte.

mod choose;
mod decode;
mod file;
mod memory;
mod raw;
mod read;
mod section;
mod set;
#[cfg(test)]
mod tests;
mod unpack;

pub use choose::io_paths;
pub use file::FileSource;
pub use memory::MemorySource;
pub use raw::RawRead;
pub use section::Section;
pub use set::FileSet;
pub use unpack::{UnpackSource, unpacked, unpacked_head};

use crate::{
    error::{Error, Result},
    io_path::IoPath,
    memory::PAGE_BYTES,
};
use std::{io, ops::Range, path::Path};

/// Bytes that can be read at any place by several threads at once.
pub trait ReadAt: Send + Sync {
    /// How many bytes there are.
    fn len_bytes(&self) -> u64;

    /// The path, for messages.
    fn path(&self) -> &Path;

    /// Fills `target` with the bytes from `start_byte` on.
    ///
    /// Fails with [`Error::Io`] if the system does, with [`Error::Corrupt`]
    /// if the source ends first; `target` then holds anything.
    fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()>;

    /// Fills the first `need_bytes` of `target` like [`ReadAt::read_exact_at`], by one of the ways there are to read a
    /// file: a source that is none has one. The rest of `target` is room for whole blocks, and holds anything afterwards.
    fn read_by(&self, _: IoPath, start_byte: u64, target: &mut [u8], need_bytes: usize) -> Result<()> {
        match target.get_mut(..need_bytes) {
            Some(needed) => self.read_exact_at(start_byte, needed),
            None => Err(too_short(self.path(), start_byte)),
        }
    }

    /// Fails with [`Error::Mismatch`] if the bytes may have changed since the source was opened.
    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }

    /// True if the bytes can only be had from first to last: to skip some is to read them, to go back is to begin again.
    fn is_in_order(&self) -> bool {
        false
    }

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

/// Reads into a buffer of [`staging_bytes`](crate::memory::staging_bytes) that starts at a page, and returns the bytes that
/// were asked for. What comes past the page cache comes in whole pages.
pub fn read_staged<'b>(
    source: &dyn ReadAt,
    path: IoPath,
    start_byte: u64,
    len_bytes: u64,
    buffer: &'b mut [u8],
) -> Result<&'b mut [u8]> {
    let lead_bytes = lead_bytes(path, start_byte);
    let need_bytes = (lead_bytes + len_bytes) as usize;
    let room = need_bytes.next_multiple_of(PAGE_BYTES as usize).min(buffer.len()).max(need_bytes);
    let bytes = buffer.get_mut(..room).ok_or_else(|| too_short(source.path(), start_byte))?;
    source.read_by(path, start_byte - lead_bytes, bytes, need_bytes)?;
    Ok(&mut bytes[lead_bytes as usize..need_bytes])
}

/// Bytes of a staging buffer in front of those that [`read_staged`] was asked for.
pub fn lead_bytes(path: IoPath, start_byte: u64) -> u64 {
    if path.is_past_cache() { start_byte % PAGE_BYTES } else { 0 }
}

/// The caller's fault: a target that is shorter than what it needs.
fn too_short(path: &Path, start_byte: u64) -> Error {
    let error = io::Error::new(io::ErrorKind::InvalidInput, "the target is shorter than what it needs");
    Error::io_at(path, "read", start_byte, error)
}
