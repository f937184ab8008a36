//! How much of a file the system keeps in memory, and making that more or less.
#![allow(unsafe_code)]

use crate::{
    error::{Error, Result},
    progress::Progress,
};
use memmap2::MmapOptions;
use rustix::fs::{Access, Advice, AtFlags, CWD};
use std::{
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

/// The file is looked at in windows of this size, so that the answer takes 64 KiB at a time.
const WINDOW_BYTES: u64 = 256 << 20;

/// Files are read in pieces of this size.
const READ_BYTES: u64 = 4 << 20;

/// Bytes among the first `len_bytes` of a file that are in the page cache, whole pages counted up to the end.
///
/// `None` where the kernel does not tell: to whoever neither owns nor may write a file, it says that all is there.
pub fn cached_bytes(file: &File, len_bytes: u64) -> Option<u64> {
    if !may_know(file) {
        return None;
    }
    let page_bytes = rustix::param::page_size() as u64;
    let mut cached_bytes = 0;
    let mut pages = Vec::new();
    for start_byte in (0..len_bytes).step_by(WINDOW_BYTES as usize) {
        let window_bytes = WINDOW_BYTES.min(len_bytes - start_byte);
        // SAFETY: the mapping is never read, only asked about, so nobody's writes to the file can be seen through it.
        let map =
            unsafe { MmapOptions::new().offset(start_byte).len(window_bytes as usize).map(file) }.ok()?;
        pages.resize(window_bytes.div_ceil(page_bytes) as usize, 0u8);
        // SAFETY: the range is the mapping's own, page-aligned because windows are multiples of a page, and `pages` has
        // a byte for each of its pages.
        let status = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
        if status != 0 {
            return None;
        }
        for (page, _) in pages.iter().enumerate().filter(|(_, state)| **state & 1 == 1) {
            cached_bytes += page_bytes.min(window_bytes - page as u64 * page_bytes);
        }
    }
    Some(cached_bytes)
}

/// The kernel's own condition for answering `mincore` truthfully.
fn may_know(file: &File) -> bool {
    let is_owner = || file.metadata().is_ok_and(|meta| meta.uid() == rustix::process::geteuid().as_raw());
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    is_owner() || rustix::fs::accessat(CWD, opened, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
}

/// Asks the system to forget a file's pages. Those that are mapped somewhere stay; [`cached_bytes`] tells.
pub fn evict(file: &File, path: &Path) -> Result<()> {
    // Pages that the disk does not hold yet would stay.
    file.sync_data().map_err(|error| Error::io(path, "sync", error))?;
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed)
        .map_err(|error| Error::io(path, "drop from the page cache", error.into()))
}

/// Reads a file until 99 % of it is in the page cache, or three times if the system does not tell or keep it.
pub fn warm(file: &File, path: &Path, len_bytes: u64, progress: &Progress) -> Result<()> {
    let mut buffer = vec![0; READ_BYTES.min(len_bytes) as usize];
    for _ in 0..3 {
        if cached_bytes(file, len_bytes).is_some_and(|it| it >= len_bytes - len_bytes / 100) {
            break;
        }
        progress.expect(len_bytes);
        let mut at_byte = 0;
        while at_byte < len_bytes {
            progress.check(path)?;
            match file.read_at(&mut buffer, at_byte) {
                Ok(0) => break,
                Ok(n) => {
                    at_byte += n as u64;
                    progress.add(n as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io_at(path, "read", at_byte, error)),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_has_nothing_cached() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(cached_bytes(&file, 0), Some(0));
        warm(&file, Path::new("empty"), 0, &Progress::default()).unwrap();
    }

    #[test]
    fn a_file_of_somebody_else_is_not_judged() {
        // Readable by all, written by none but root, who is told everything.
        let file = File::open("/etc/passwd").unwrap();
        assert_eq!(cached_bytes(&file, 1).is_some(), rustix::process::geteuid().is_root());
    }
}
