//! A file mapped into memory, private and read-only.
#![allow(unsafe_code)]

use super::Reservation;
use crate::error::{Error, Result};
use memmap2::{Mmap, MmapOptions};
use std::{fmt, fs::File, path::Path};

/// A whole file as memory. Pages are read at their first touch, and the system may take them back at any time.
///
/// If somebody else shortens the file while it is mapped, touching the lost part kills the process (SIGBUS), and if
/// somebody writes to it, the bytes change: choose a strategy that copies where that can happen.
pub struct Mapping {
    // Unmapped before the ledger hears of it: fields are dropped in this order.
    map: Option<Mmap>,
    _reservation: Reservation,
}

impl Mapping {
    /// Maps as many bytes from the start of `file` as were reserved.
    pub fn new(file: &File, reservation: Reservation, path: &Path) -> Result<Mapping> {
        if reservation.len_bytes() == 0 {
            return Ok(Mapping { map: None, _reservation: reservation });
        }
        let len = usize::try_from(reservation.len_bytes())
            .map_err(|_| Error::io(path, "map the file", std::io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: the mapping is private and read-only, so nothing in this process writes to it. That no other process
        // writes to the file or shortens it cannot be enforced; the type's documentation hands that condition to whoever
        // chooses a mapping strategy, and every byte pattern is valid for the `&[u8]` that is handed out.
        let map = unsafe { MmapOptions::new().len(len).map_copy_read_only(file) };
        let map = map.map_err(|source| Error::io(path, "map the file", source))?;
        Ok(Mapping { map: Some(map), _reservation: reservation })
    }

    /// The file's bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} bytes)", self.as_slice().len())
    }
}
