//! A record of a zip archive as a caller wants it: its bytes, or the stamp by which its tensors' bytes will be read. What is
//! deflated is inflated here only if it is a header.

use super::zip::Entry;
use crate::{
    error::{Fault, Result},
    source::{ReadAt, unpacked},
    stamp::{Encoding, FileStamp, Packed},
};

/// A deflated header may be this long however short it was before.
const MAX_INFLATED_BYTES: u64 = 16 << 20;

/// Longer ones may be so many times as long as before; real pickles shrink to a tenth or so.
const MAX_RATIO: u64 = 100;

/// A small record's content. `max_bytes` is the most that it may have.
pub(super) fn read(source: &dyn ReadAt, entry: &Entry, name: &str, max_bytes: u64) -> Result<Vec<u8>> {
    let max_bytes = match entry.is_stored() {
        true => max_bytes,
        false => max_bytes.min(MAX_INFLATED_BYTES.max(entry.packed_bytes.saturating_mul(MAX_RATIO))),
    };
    if entry.len_bytes > max_bytes {
        let expected = format!("a record `{name}` of at most {max_bytes} bytes");
        return Err(Fault::new(expected, format!("{} bytes", entry.len_bytes)).unsupported());
    }
    if entry.is_stored() {
        return source.read_range(entry.start_byte..entry.start_byte + entry.len_bytes);
    }
    unpacked(source, &packed(entry, name.as_bytes(), source.len_bytes()), entry.len_bytes)
}

/// The stamp of a deflated record of an archive.
pub(super) fn stamp(archive: &FileStamp, entry: &Entry, name: &[u8]) -> FileStamp {
    archive.of_packed(entry.len_bytes, packed(entry, name, archive.len_bytes))
}

/// How a deflated record is packed in its file.
pub(super) fn packed(entry: &Entry, name: &[u8], file_len_bytes: u64) -> Packed {
    Packed {
        name: String::from_utf8_lossy(name).into(),
        encoding: Encoding::Deflate,
        start_byte: entry.start_byte,
        len_bytes: entry.packed_bytes,
        file_len_bytes,
        crc32: Some(entry.crc32).filter(|it| *it != 0),
    }
}
