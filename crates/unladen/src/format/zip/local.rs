//! Checks local headers against the directory and takes from them where payloads start.

use super::{Entry, REFUSED_FLAGS, SATURATED, show, u16_at, u32_at};
use crate::{
    error::{Fault, Result},
    source::ReadAt,
};

/// A local header without its name and extra fields.
const FIXED_BYTES: usize = 30;
/// Small records are read many headers at a time, in reads of at most this size.
const WINDOW_BYTES: u64 = 64 << 10;
/// A window is worth its bytes if it holds this many headers.
const MIN_HEADERS: usize = 8;
/// Sizes stand behind the payload, not in the local header.
const DESCRIPTOR_FLAG: u16 = 1 << 3;

/// Fills in [`Entry::start_byte`]. Fails if a header disagrees with the directory, or two records share bytes.
pub(super) fn locate(
    source: &dyn ReadAt,
    directory: &[u8],
    entries: &mut [Entry],
    directory_byte: u64,
) -> Result<()> {
    let mut order: Vec<u32> = (0..entries.len() as u32).collect();
    order.sort_by_key(|&it| entries[it as usize].header_byte);
    if let Some(first_byte) = order.first().map(|&it| entries[it as usize].header_byte).filter(|&it| it != 0)
    {
        return Err(Fault::new("the zip archive's first record at byte 0", format!("byte {first_byte}"))
            .hint("bytes stand in front of the archive; cut them off")
            .corrupt());
    }
    let mut window = Window { source, start_byte: 0, bytes: Vec::new() };
    for (position, &index) in order.iter().enumerate() {
        let header_byte = |ahead| order.get(position + ahead).map(|&it| entries[it as usize].header_byte);
        let next_byte = header_byte(1).unwrap_or(directory_byte);
        let far_byte = header_byte(MIN_HEADERS);
        let entry = &mut entries[index as usize];
        let name = &directory[entry.name.start as usize..entry.name.end as usize];
        let at = entry.header_byte;
        let ahead_bytes = match far_byte {
            Some(far_byte) if far_byte - at <= WINDOW_BYTES => WINDOW_BYTES,
            _ => 0,
        };
        let needed_bytes = (FIXED_BYTES + name.len()) as u64;
        if at.checked_add(needed_bytes).is_none_or(|end| end > directory_byte) {
            let found = format!("byte {at} of a directory at byte {directory_byte}");
            return Err(
                Fault::new(format!("record `{}` in front of the zip directory", show(name)), found).corrupt()
            );
        }
        let header = window.get(at, needed_bytes, ahead_bytes.min(directory_byte - at))?;
        check(entry, name, header)?;
        let extra_bytes = u64::from(u16_at(header, 28));
        entry.start_byte = at + needed_bytes + extra_bytes;
        if entry.start_byte.checked_add(entry.packed_bytes).is_none_or(|end| end > next_byte) {
            let found = format!("{} bytes from byte {}", entry.packed_bytes, entry.start_byte);
            let expected =
                format!("record `{}` to end by byte {next_byte}, records do not overlap", show(name));
            return Err(Fault::new(expected, found).at(at).corrupt());
        }
    }
    Ok(())
}

fn check(entry: &Entry, name: &[u8], header: &[u8]) -> Result<()> {
    let [flags, method, name_bytes] = [6, 8, 26].map(|it| u16_at(header, it));
    let differs = |expected: String, found: String| {
        let expected = format!("a local header of record `{}` with {expected}", show(name));
        Err(Fault::new(expected, found).at(entry.header_byte).corrupt())
    };
    if !header.starts_with(b"PK\x03\x04") {
        return differs("its signature".into(), "other bytes".into());
    }
    if usize::from(name_bytes) != name.len() || &header[FIXED_BYTES..] != name {
        return differs("the directory's name".into(), format!("`{}`", show(&header[FIXED_BYTES..])));
    }
    if method != entry.method {
        return differs(format!("method {}", entry.method), method.to_string());
    }
    // The other flags may differ: they say how the name is spelled, or that sizes follow behind the payload.
    if flags & REFUSED_FLAGS != 0 {
        return differs("no encryption or patch".into(), format!("flags {flags:#06x}"));
    }
    let sizes = [(18, entry.packed_bytes), (22, entry.len_bytes)].map(|(at, it)| (u32_at(header, at), it));
    for (size, expected) in sizes {
        let unknown = size == 0 && (flags | entry.flags) & DESCRIPTOR_FLAG != 0;
        if !unknown && size != SATURATED && u64::from(size) != expected {
            return differs(format!("a size of {expected}"), size.to_string());
        }
    }
    Ok(())
}

/// The last read, from which the next headers are served.
struct Window<'a> {
    source: &'a dyn ReadAt,
    start_byte: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// `len_bytes` from `at` on; if they must be read, then `ahead_bytes` at once, should that be more.
    fn get(&mut self, at: u64, len_bytes: u64, ahead_bytes: u64) -> Result<&[u8]> {
        let end_byte = self.start_byte + self.bytes.len() as u64;
        if at < self.start_byte || at + len_bytes > end_byte {
            self.bytes.resize(len_bytes.max(ahead_bytes) as usize, 0);
            self.source.read_exact_at(at, &mut self.bytes)?;
            self.start_byte = at;
        }
        let from = (at - self.start_byte) as usize;
        Ok(&self.bytes[from..from + len_bytes as usize])
    }
}
