//! Bytes that are in memory already: for tests and for archives inside archives.

use super::ReadAt;
use crate::error::{Error, Fault, Result};
use std::path::{Path, PathBuf};

/// A file that is in memory.
#[derive(Clone, Debug)]
pub struct MemorySource {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl MemorySource {
    /// `path` only serves messages.
    pub fn new(path: impl Into<PathBuf>, bytes: Vec<u8>) -> MemorySource {
        MemorySource { path: path.into(), bytes }
    }
}

impl ReadAt for MemorySource {
    fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        let end_byte = start_byte.saturating_add(target.len() as u64);
        let range = usize::try_from(start_byte).unwrap_or(usize::MAX)
            ..usize::try_from(end_byte).unwrap_or(usize::MAX);
        let bytes = self
            .bytes
            .get(range)
            .ok_or_else(|| ends_early(end_byte, self.len_bytes()).in_file(&self.path))?;
        target.copy_from_slice(bytes);
        Ok(())
    }
}

/// The error of every source that ends before a read does.
pub(super) fn ends_early(end_byte: u64, len_bytes: u64) -> Error {
    Fault::new(format!("at least {end_byte} bytes"), format!("{len_bytes} bytes"))
        .hint("the file looks truncated; compare its size with the publisher's")
        .corrupt()
}
