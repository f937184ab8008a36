//! Finds a zip archive's end record, and with it the directory.

use super::{FIXED_BYTES, u16_at, u32_at, u64_at};
use crate::{
    error::{Fault, Result},
    source::ReadAt,
};

/// The end record without its comment.
const END_BYTES: usize = 22;
/// The zip64 end record without its free part.
const END64_BYTES: usize = 56;
/// What points to the zip64 end record, right in front of the end record.
const LOCATOR_BYTES: usize = 20;
/// The longest comment.
const MAX_COMMENT_BYTES: usize = u16::MAX as usize;

/// Where the directory is.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub(super) start_byte: u64,
    pub(super) len_bytes: u64,
    pub(super) n_entries: u64,
    /// Bytes behind the archive.
    pub(super) trailing_bytes: u64,
}

/// Takes the last end record whose comment reaches the end of the file and whose directory ends where it begins;
/// if there is none, the last one with such a directory.
///
/// Fails also where that is another archive than readers find that allow for bytes in front of it.
pub(super) fn find(source: &dyn ReadAt) -> Result<End> {
    let file_len_bytes = source.len_bytes();
    if let Some(end) = without_comment(source)? {
        return Ok(end);
    }
    let tail_byte =
        file_len_bytes.saturating_sub((END_BYTES + LOCATOR_BYTES + END64_BYTES + MAX_COMMENT_BYTES) as u64);
    let tail = source.read_range(tail_byte..file_len_bytes)?;
    let (mut cut_short, mut nearest): (Option<End>, Option<usize>) = (None, None);
    for at in (0..tail.len().saturating_sub(END_BYTES - 1)).rev() {
        if tail[at..at + 4] != *b"PK\x05\x06" {
            continue;
        }
        let end_byte = at + END_BYTES + usize::from(u16_at(&tail, at + 20));
        let trailing_bytes = tail.len().checked_sub(end_byte);
        match (directory(source, &tail, tail_byte, at)?, trailing_bytes) {
            (Some(end), Some(0)) => return Ok(end),
            (Some(end), Some(trailing_bytes)) if cut_short.is_none() => {
                cut_short = Some(End { trailing_bytes: trailing_bytes as u64, ..end });
            }
            (None, _) if nearest.is_none() => nearest = Some(at),
            _ => {}
        }
    }
    if let Some(at) = nearest
        && let Some(first_byte) = shifted(source, &tail, tail_byte, at)?
    {
        return Err(Fault::new("one zip archive", "another one behind the first")
            .at(first_byte)
            .hint("chunks of a distributed checkpoint (.distcp): open their folder; anything else: readers differ in which of the two they take, do not trust this file")
            .corrupt());
    }
    cut_short.ok_or_else(|| {
        let hint = "the file looks truncated; compare its size with the publisher's";
        match nearest {
            None => Fault::new("the directory of a zip archive at the end of the file", "none").hint(hint),
            Some(at) => {
                let (len_bytes, start_byte) = (u32_at(&tail, at + 12), u32_at(&tail, at + 16));
                let found = format!("one of {len_bytes} bytes at byte {start_byte}");
                Fault::new("a zip directory right in front of its end record", found)
                    .at(tail_byte + at as u64)
                    .hint(hint)
            }
        }
        .corrupt()
    })
}

/// Where the archive begins whose end record stands at `tail[at..]`, if it counts from there and not from the file's beginning,
/// and that is an archive as well.
fn shifted(source: &dyn ReadAt, tail: &[u8], tail_byte: u64, at: usize) -> Result<Option<u64>> {
    const START: &[u8] = b"PK\x03\x04";
    let directory_end_byte = u64::from(u32_at(tail, at + 12)) + u64::from(u32_at(tail, at + 16));
    let locator = at.checked_sub(LOCATOR_BYTES).map(|it| &tail[it..at]);
    let in_front = match locator.filter(|it| it.starts_with(b"PK\x06\x07")) {
        Some(locator) => u64_at(locator, 8).saturating_add((END64_BYTES + LOCATOR_BYTES) as u64),
        None => directory_end_byte,
    };
    let first_byte = (tail_byte + at as u64).checked_sub(in_front).filter(|it| *it > 0);
    let starts = |at: u64| -> Result<bool> { Ok(source.read_range(at..at + START.len() as u64)? == START) };
    match first_byte {
        Some(first_byte) if starts(0)? && starts(first_byte)? => Ok(Some(first_byte)),
        _ => Ok(None),
    }
}

/// The end record in the last bytes of the file, which is where nearly every archive has it: the first that [`find`] would
/// come upon, without reading the length of a comment first. A file of many archives is opened in few reads.
fn without_comment(source: &dyn ReadAt) -> Result<Option<End>> {
    let file_len_bytes = source.len_bytes();
    let Some(tail_byte) = file_len_bytes.checked_sub((LOCATOR_BYTES + END_BYTES) as u64) else {
        return Ok(None);
    };
    let tail = source.read_range(tail_byte..file_len_bytes)?;
    if !tail[LOCATOR_BYTES..].starts_with(b"PK\x05\x06") || u16_at(&tail, LOCATOR_BYTES + 20) != 0 {
        return Ok(None);
    }
    directory(source, &tail, tail_byte, LOCATOR_BYTES)
}

/// The directory that the end record at `tail[at..]` speaks of, if it ends right there.
fn directory(source: &dyn ReadAt, tail: &[u8], tail_byte: u64, at: usize) -> Result<Option<End>> {
    let record = &tail[at..at + END_BYTES];
    let [disk, directory_disk, disk_entries, n_entries] = [4, 6, 8, 10].map(|it| u16_at(record, it));
    let (len_bytes, start_byte) = (u32_at(record, 12), u32_at(record, 16));
    let fits = |narrow: u64, limit: u64, wide: u64| narrow == limit || narrow == wide;
    let mut end = End {
        start_byte: start_byte.into(),
        len_bytes: len_bytes.into(),
        n_entries: n_entries.into(),
        trailing_bytes: 0,
    };
    let mut directory_end_byte = tail_byte + at as u64;
    let locator = at.checked_sub(LOCATOR_BYTES).map(|it| &tail[it..at]);
    if let Some(locator) = locator.filter(|it| it.starts_with(b"PK\x06\x07")) {
        let record_byte = u64_at(locator, 8);
        let locator_byte = directory_end_byte - LOCATOR_BYTES as u64;
        if locator_byte.checked_sub(record_byte).is_none_or(|it| it < END64_BYTES as u64) {
            return Ok(None);
        }
        let wide = source.read_range(record_byte..record_byte + END64_BYTES as u64)?;
        let ends_at = u64_at(&wide, 4).checked_add(record_byte + 12);
        if !wide.starts_with(b"PK\x06\x06") || ends_at != Some(locator_byte) {
            return Ok(None);
        }
        let (wide_n, wide_len, wide_start) = (u64_at(&wide, 32), u64_at(&wide, 40), u64_at(&wide, 48));
        // A narrow field is either full, or says the same.
        if !fits(n_entries.into(), u16::MAX.into(), wide_n)
            || !fits(len_bytes.into(), u32::MAX.into(), wide_len)
            || !fits(start_byte.into(), u32::MAX.into(), wide_start)
            || u64_at(&wide, 24) != wide_n
        {
            return Ok(None);
        }
        end = End { start_byte: wide_start, len_bytes: wide_len, n_entries: wide_n, trailing_bytes: 0 };
        directory_end_byte = record_byte;
    }
    let one_part =
        [disk, directory_disk].iter().all(|it| matches!(*it, 0 | u16::MAX)) && disk_entries == n_entries;
    let ends_here = end.start_byte.checked_add(end.len_bytes) == Some(directory_end_byte);
    let holds_entries = end.n_entries.saturating_mul(FIXED_BYTES as u64) <= end.len_bytes;
    // A fake end record of zeros speaks of no directory at all.
    let speaks = end.n_entries > 0;
    Ok((one_part && ends_here && holds_entries && speaks).then_some(end))
}
