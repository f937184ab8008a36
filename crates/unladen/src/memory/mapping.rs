//! A file mapped into memory, private and read-only.
#![allow(unsafe_code)]

use super::{PAGE_BYTES, Reservation};
use crate::error::{Error, Fault, Result};
use memmap2::{Advice, Mmap, MmapOptions};
use std::{
    fmt,
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
};

/// A whole file as memory. Pages are read at their first touch, and the system may take them back at any time.
///
/// If somebody else shortens the file while it is mapped, touching the lost part kills the process (SIGBUS), and if
/// somebody writes to it, the bytes change: choose a strategy that copies where that can happen.
pub struct Mapping {
    // Unmapped before the ledger hears of it: fields are dropped in this order.
    map: Option<Mmap>,
    path: PathBuf,
    _reservation: Reservation,
}

impl Mapping {
    /// Maps as many bytes from the start of `file` as were reserved.
    pub fn new(file: &File, reservation: Reservation, path: &Path) -> Result<Mapping> {
        if reservation.len_bytes() == 0 {
            return Ok(Mapping { map: None, path: path.to_owned(), _reservation: reservation });
        }
        let len = usize::try_from(reservation.len_bytes())
            .map_err(|_| Error::io(path, "map the file", io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: the mapping is private and read-only, so nothing in this process writes to it. That no other process
        // writes to the file or shortens it cannot be enforced; the type's documentation hands that condition to whoever
        // chooses a mapping strategy, and every byte pattern is valid for the `&[u8]` that is handed out.
        let map = unsafe { MmapOptions::new().len(len).map_copy_read_only(file) };
        let map = map.map_err(|source| Error::io(path, "map the file", source))?;
        Ok(Mapping { map: Some(map), path: path.to_owned(), _reservation: reservation })
    }

    /// The file's bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// Reads the pages of a range of bytes and maps them, so that touching them waits for nothing. Several threads may
    /// populate ranges of their own at once. A kernel that cannot (before 5.14) leaves it to the first touch.
    ///
    /// Fails with [`Error::Mismatch`] at the first page that is not to be had: the file was shortened, or the disk fails.
    /// Touching that page would kill the process. What is cut off within a page reads as zeros, here as at a touch.
    pub fn populate(&self, range: Range<u64>) -> Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        let len_bytes = map.len() as u64;
        let (mut start_byte, mut end_byte) = (range.start.min(len_bytes), range.end.min(len_bytes));
        match populate(map, start_byte, end_byte) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {}
            Err(error) => return Err(Error::io_at(&self.path, "populate the mapping", start_byte, error)),
        }
        // The kernel does not say where it stopped: halve the range until it is the page that failed.
        start_byte -= start_byte % PAGE_BYTES;
        while end_byte - start_byte > PAGE_BYTES {
            let n_pages = (end_byte - start_byte).div_ceil(PAGE_BYTES);
            let middle_byte = start_byte + n_pages / 2 * PAGE_BYTES;
            match populate(map, start_byte, middle_byte) {
                Ok(()) => start_byte = middle_byte,
                Err(_) => end_byte = middle_byte,
            }
        }
        let expected = format!("{len_bytes} bytes, as when the file was mapped");
        Err(Fault::new(expected, "bytes that the system cannot read")
            .at(start_byte)
            .hint("something shortened the file, or its disk fails; check both, then load again")
            .mismatch()
            .in_file(&self.path))
    }
}

/// The pages that a range touches.
fn populate(map: &Mmap, start_byte: u64, end_byte: u64) -> io::Result<()> {
    if start_byte >= end_byte {
        return Ok(());
    }
    loop {
        // Rounds to pages itself.
        match map.advise_range(Advice::PopulateRead, start_byte as usize, (end_byte - start_byte) as usize) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
            result => return result,
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} bytes)", self.as_slice().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(len_bytes: u64) -> (tempfile::NamedTempFile, Mapping) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len_bytes).unwrap();
        let mapping = Mapping::new(file.as_file(), Reservation::uncounted(len_bytes), file.path()).unwrap();
        (file, mapping)
    }

    #[test]
    fn any_range_can_be_populated() {
        let (_file, mapping) = mapped(10_000);
        for range in [0..10_000, 1..2, 4095..4097, 9_999..10_000, 0..0, 5_000..u64::MAX, 20_000..30_000] {
            mapping.populate(range).unwrap();
        }
        let (_file, empty) = mapped(0);
        empty.populate(0..1).unwrap();
    }

    #[test]
    fn populating_what_was_cut_off_is_an_error_with_its_place_and_kills_nobody() {
        let (file, mapping) = mapped(64 * PAGE_BYTES);
        file.as_file().set_len(20 * PAGE_BYTES + 1).unwrap();
        // The page that holds the end is there.
        mapping.populate(0..21 * PAGE_BYTES).unwrap();
        for (range, first_lost_page) in [(0..64, 21), (20..22, 21), (30..64, 30), (63..64, 63)] {
            let range = range.start * PAGE_BYTES + 5..range.end * PAGE_BYTES - 5;
            let error = mapping.populate(range).unwrap_err();
            let Error::Mismatch(fault) = &error else { panic!("{error}") };
            assert_eq!(fault.offset_bytes, Some(first_lost_page * PAGE_BYTES), "{error}");
            assert_eq!(fault.path, file.path());
        }
    }
}
