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
    hash::{BuildHasher as _, RandomState},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
    time::{Duration, Instant},
};

/// The file is looked at in windows of this size, so that the answer takes 64 KiB at a time.
const WINDOW_BYTES: u64 = 256 << 20;

/// One page of so many bytes is looked at where the kernel does not tell.
const SAMPLE_EVERY_BYTES: u64 = 2 << 20;

/// A byte of the page cache costs 1 to 20 us to ask for, and no less when it is asked for again; disks were seen to answer in
/// 80 us at the earliest. For milliseconds at a time a virtual machine's own memory can be as slow as that (one question of
/// a hundred, beside other work): then a cached file is read past the page cache, which costs time and nothing else.
const LATE: Duration = Duration::from_micros(40);
const TIMES_AS_LONG: u32 = 4;

/// A busy machine makes a few answers of so many late, whatever they tell.
const ONE_LATE_IN: u64 = 16;

/// Files are read in pieces of this size.
const READ_BYTES: u64 = 4 << 20;

/// Bytes among the first `len_bytes` of a file that are in the page cache, whole pages counted up to the end.
///
/// To whoever neither owns nor may write the file, the kernel does not tell: then it is an estimate from a few pages.
/// `None` where that cannot be had either.
pub fn cached_bytes(file: &File, len_bytes: u64) -> Option<u64> {
    cached_range_bytes(file, 0, len_bytes)
}

/// Bytes of a range of a file that are in the page cache, as [`cached_bytes`] counts them. Takes microseconds where the
/// kernel has `cachestat` (6.5).
pub fn cached_range_bytes(file: &File, start_byte: u64, len_bytes: u64) -> Option<u64> {
    if len_bytes == 0 {
        return Some(0);
    }
    let end_byte = start_byte.checked_add(len_bytes)?;
    if !may_know(file) {
        return sampled(file, start_byte, end_byte);
    }
    asked_at_once(file, start_byte, end_byte).or_else(|| asked_by_page(file, start_byte, end_byte))
}

/// By `cachestat`. `None` if the kernel, a container's rules, or the file system do not have it.
fn asked_at_once(file: &File, start_byte: u64, end_byte: u64) -> Option<u64> {
    let page_bytes = rustix::param::page_size() as u64;
    let first_byte = start_byte - start_byte % page_bytes;
    let last_page_byte = (end_byte - 1) - (end_byte - 1) % page_bytes;
    let mut cached_bytes = n_cached_pages(file, first_byte, end_byte - first_byte)? * page_bytes;
    // Whole pages were counted: what they have outside the range goes off, if they are there. They may have come or gone
    // since the first question, hence no plain subtraction.
    let head_bytes = start_byte - first_byte;
    if head_bytes > 0 {
        cached_bytes = cached_bytes.saturating_sub(n_cached_pages(file, first_byte, 1)? * head_bytes);
    }
    let tail_bytes = page_bytes - (end_byte - last_page_byte);
    if tail_bytes > 0 {
        cached_bytes = cached_bytes.saturating_sub(n_cached_pages(file, last_page_byte, 1)? * tail_bytes);
    }
    Some(cached_bytes.min(end_byte - start_byte))
}

/// How many pages that the range touches are in the page cache.
fn n_cached_pages(file: &File, start_byte: u64, len_bytes: u64) -> Option<u64> {
    // The same number on every architecture that has the call.
    const SYS_CACHESTAT: libc::c_long = 451;
    // `struct cachestat_range`, offset and length, and `struct cachestat`, five counts of which the first is ours.
    let range = [start_byte, len_bytes];
    let mut counts = [0u64; 5];
    // SAFETY: the call reads 16 bytes from `range` and writes 40 to `counts`, which both live until it returns and have
    // the layout of the kernel's structs of `u64`s; the descriptor is open as long as `file` is borrowed.
    let status =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0) };
    (status == 0).then_some(counts[0])
}

/// By `mincore` on mappings of the file.
fn asked_by_page(file: &File, start_byte: u64, end_byte: u64) -> Option<u64> {
    let page_bytes = rustix::param::page_size() as u64;
    let mut cached_bytes = 0;
    let mut pages = Vec::new();
    let first_byte = start_byte - start_byte % page_bytes;
    for window_byte in (first_byte..end_byte).step_by(WINDOW_BYTES as usize) {
        let window_bytes = WINDOW_BYTES.min(end_byte - window_byte);
        // SAFETY: the mapping is never read, only asked about, so nobody's writes to the file can be seen through it.
        let map =
            unsafe { MmapOptions::new().offset(window_byte).len(window_bytes as usize).map(file) }.ok()?;
        pages.resize(window_bytes.div_ceil(page_bytes) as usize, 0u8);
        // SAFETY: the range is the mapping's own, page-aligned because windows start at a page, and `pages` has a byte
        // for each of its pages.
        let status = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
        if status != 0 {
            return None;
        }
        for (page, _) in pages.iter().enumerate().filter(|(_, state)| **state & 1 == 1) {
            let page_byte = window_byte + page as u64 * page_bytes;
            cached_bytes += end_byte.min(page_byte + page_bytes) - start_byte.max(page_byte);
        }
    }
    Some(cached_bytes)
}

/// By reading a byte here and there, if that can be had without waiting for a disk. Asking brings in the pages that are
/// missing, hence few.
///
/// `None` if the file system cannot say.
fn sampled(file: &File, start_byte: u64, end_byte: u64) -> Option<u64> {
    // A descriptor of its own: what is said about reading ahead concerns nobody else.
    let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    rustix::fs::fadvise(&own, 0, None, Advice::Random).ok()?;
    let len_bytes = end_byte - start_byte;
    let n_samples = (len_bytes / SAMPLE_EVERY_BYTES).clamp(4, 128);
    let stratum_bytes = len_bytes / n_samples;
    let random = RandomState::new();
    let mut answers = Answers::default();
    for sample in 0..n_samples {
        // Anywhere in its part of the range: what an earlier question brought in would be found again.
        let within_byte = random.hash_one(sample) % stratum_bytes.max(1);
        let at_byte = start_byte + sample * stratum_bytes + within_byte;
        match read_at_once(&own, at_byte) {
            Ok(took) if took < LATE => answers.n_cached += 1,
            // The question itself sends for a missing page, and a quick disk may have answered by the time the system looks.
            Ok(took) => match read_at_once(&own, at_byte) {
                Ok(again) if took < TIMES_AS_LONG * again => answers.n_cached += 1,
                _ => answers.n_late += 1,
            },
            Err(rustix::io::Errno::AGAIN) => answers.n_missing += 1,
            Err(_) => return None,
        }
    }
    Some(answers.cached_bytes(len_bytes))
}

/// How often a byte was in the page cache.
#[derive(Default)]
struct Answers {
    n_cached: u64,
    n_missing: u64,
    /// It came from a disk, or the processor did something else meanwhile.
    n_late: u64,
}

impl Answers {
    /// Of so many bytes, the part that is in the page cache.
    fn cached_bytes(&self, len_bytes: u64) -> u64 {
        let n_all = self.n_cached + self.n_missing + self.n_late;
        // A few late answers say nothing, many come from a disk.
        let n_told = if self.n_late > n_all / ONE_LATE_IN { n_all } else { n_all - self.n_late };
        (u128::from(len_bytes) * u128::from(self.n_cached) / u128::from(n_told.max(1))) as u64
    }
}

/// Reads the byte there if it can be had without waiting: how long that took.
fn read_at_once(file: &File, at_byte: u64) -> rustix::io::Result<Duration> {
    let mut byte = [0];
    let started = Instant::now();
    let into = &mut [io::IoSliceMut::new(&mut byte)];
    match rustix::io::preadv2(file, into, at_byte, rustix::io::ReadWriteFlags::NOWAIT)? {
        // The file has become shorter.
        0 => Err(rustix::io::Errno::AGAIN),
        _ => Ok(started.elapsed()),
    }
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
    use std::io::Write;

    #[test]
    fn an_empty_file_has_nothing_cached() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(cached_bytes(&file, 0), Some(0));
        warm(&file, Path::new("empty"), 0, &Progress::default()).unwrap();
    }

    #[test]
    fn both_ways_to_ask_count_the_same_bytes_of_every_range() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 10 * 4096 + 100]).unwrap();
        let len_bytes = 10 * 4096 + 100;
        evict(file.as_file(), file.path()).unwrap();
        // Leave some pages in the middle and the last.
        rustix::fs::fadvise(file.as_file(), 0, None, Advice::Random).unwrap();
        for at_byte in [3 * 4096 + 5, 4 * 4096, 10 * 4096 + 1] {
            assert_eq!(file.as_file().read_at(&mut [0], at_byte).unwrap(), 1);
        }
        let bytes =
            [0, 1, 3 * 4096, 3 * 4096 + 9, 4 * 4096 - 1, 5 * 4096, 10 * 4096, 10 * 4096 + 7, len_bytes];
        for start_byte in bytes {
            for end_byte in bytes.into_iter().filter(|it| *it > start_byte) {
                let by_page = asked_by_page(file.as_file(), start_byte, end_byte).unwrap();
                assert_eq!(
                    cached_range_bytes(file.as_file(), start_byte, end_byte - start_byte),
                    Some(by_page)
                );
                if let Some(at_once) = asked_at_once(file.as_file(), start_byte, end_byte) {
                    assert_eq!(at_once, by_page, "{start_byte}..{end_byte}");
                }
            }
        }
    }

    #[test]
    fn many_late_answers_come_from_a_disk_and_few_say_nothing() {
        let cached =
            |n_cached, n_missing, n_late| Answers { n_cached, n_missing, n_late }.cached_bytes(1 << 20);
        assert_eq!(cached(32, 0, 0), 1 << 20);
        assert_eq!(cached(30, 0, 2), 1 << 20);
        assert_eq!(cached(24, 0, 8), 3 << 18);
        assert_eq!(cached(16, 16, 0), 1 << 19);
        assert_eq!(cached(16, 0, 16), 1 << 19);
        assert_eq!(cached(15, 15, 2), 1 << 19);
        assert_eq!([cached(0, 31, 1), cached(0, 0, 32), cached(0, 0, 0)], [0; 3]);
    }

    #[test]
    #[allow(clippy::print_stderr)]
    fn a_file_of_somebody_else_is_judged_by_samples() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let len_bytes = 64 << 20;
        file.write_all(&vec![7; len_bytes as usize]).unwrap();
        // What is late for once is not late again.
        let sampled = |start_byte, end_byte| {
            (0..3).map(|_| sampled(file.as_file(), start_byte, end_byte)).max().flatten()
        };
        let Some(all_bytes) = sampled(0, len_bytes) else {
            eprintln!("NOT TESTED: this file system cannot read without waiting");
            return;
        };
        // On a busy machine an answer or two come late.
        assert!(all_bytes >= len_bytes / 4 * 3, "{all_bytes}");
        evict(file.as_file(), file.path()).unwrap();
        if asked_by_page(file.as_file(), 0, len_bytes) != Some(0) {
            eprintln!("NOT TESTED: this file system keeps its pages");
            return;
        }
        if sampled(0, len_bytes).unwrap() > len_bytes / 2 {
            eprintln!("NOT TESTED: this disk answers as quickly as the page cache");
            return;
        }
        evict(file.as_file(), file.path()).unwrap();
        // Half of it comes back.
        let mut half = vec![0; len_bytes as usize / 2];
        file.as_file().read_exact_at(&mut half, 0).unwrap();
        let cached_bytes = sampled(0, len_bytes).unwrap();
        // The system reads ahead.
        assert!((len_bytes / 3..len_bytes / 4 * 3).contains(&cached_bytes), "{cached_bytes}");
        let brought_bytes = asked_by_page(file.as_file(), len_bytes / 4 * 3, len_bytes).unwrap();
        assert!(brought_bytes <= 256 << 10, "{brought_bytes} bytes came in by asking");
    }
}
