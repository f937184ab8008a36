//! Owned host memory: zeroed, page-aligned, straight from the system and straight back to it.

use super::{Reservation, placing::Ending};
use crate::error::{Error, Result};
use memmap2::MmapMut;
use std::{fmt, path::Path};

/// What the system hands out memory in, and what direct reads align to.
pub const PAGE_BYTES: u64 = 4096;

/// Anonymous memory of a fixed size. Pages are taken from the system at their first touch.
pub struct HostBuffer {
    // No longer placed into before it is unmapped, unmapped before the ledger hears of it: fields are dropped in this
    // order.
    pub(super) placing: Option<Ending>,
    map: Option<MmapMut>,
    _reservation: Reservation,
}

impl HostBuffer {
    /// Asks the system for zeroed bytes, as many as were reserved; none are resident yet.
    ///
    /// `path` names the checkpoint that they are for, should the system refuse.
    pub fn new(reservation: Reservation, path: &Path) -> Result<HostBuffer> {
        let len = usize::try_from(reservation.len_bytes())
            .map_err(|_| Error::io(path, "reserve host memory", std::io::ErrorKind::OutOfMemory.into()))?;
        // The system has no empty mappings.
        let map = (len > 0).then(|| MmapMut::map_anon(len)).transpose();
        let map = map.map_err(|source| Error::io(path, "reserve host memory", source))?;
        Ok(HostBuffer { placing: None, map, _reservation: reservation })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// The bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostBuffer({} bytes)", self.as_slice().len())
    }
}
