//! Reads a zip archive's directory with one strict interpretation: whatever two readers could understand differently
//! is refused. Sizes come from the directory, places of payloads from the local headers. Inflates nothing.

mod end;
mod local;

use super::Limits;
use crate::{
    error::{Error, Fault, Result},
    source::ReadAt,
    stamp::Encoding,
};
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use std::{
    hash::{BuildHasher as _, Hash, Hasher},
    ops::Range,
};

/// A record's name: PyTorch's are a file name and a few characters.
const MAX_NAME_BYTES: usize = 512;
/// The names and extra fields of the whole directory.
const MAX_NAMES_BYTES: u64 = 64 << 20;
/// A directory entry without its name, extra fields and comment.
const FIXED_BYTES: usize = 46;

const STORED: u16 = 0;
const DEFLATED: u16 = 8;
/// Encryption (bits 0, 6, 13) and patches (bit 5).
const REFUSED_FLAGS: u16 = 1 | 1 << 5 | 1 << 6 | 1 << 13;
/// A field that is continued in the zip64 extra field.
const SATURATED: u32 = u32::MAX;

/// A record of the archive.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// In [`Archive::directory`].
    name: Range<u32>,
    method: u16,
    flags: u16,
    /// 0: not computed.
    pub(super) crc32: u32,
    /// Bytes in the file.
    pub(super) packed_bytes: u64,
    /// Bytes after inflating.
    pub(super) len_bytes: u64,
    /// Where the local header starts.
    header_byte: u64,
    /// Where the payload starts.
    pub(super) start_byte: u64,
}

impl Entry {
    /// The payload is the content.
    pub(super) fn is_stored(&self) -> bool {
        self.method == STORED
    }
}

/// The directory of an archive, checked against itself and against the local headers.
#[derive(Debug)]
pub(super) struct Archive {
    directory: Vec<u8>,
    /// In the directory's order.
    pub(super) entries: Vec<Entry>,
    /// Bytes behind the end of the archive.
    pub(super) trailing_bytes: u64,
}

impl Archive {
    /// Reads the directory and every local header. Fails on anything ambiguous.
    pub(super) fn read(source: &dyn ReadAt, limits: &Limits) -> Result<Archive> {
        let max_entries = limits.n_records;
        let fixed_bytes = max_entries.saturating_mul(FIXED_BYTES as u64);
        // Names have positions of 32 bits.
        let max_directory_bytes = fixed_bytes.saturating_add(MAX_NAMES_BYTES).min(u32::MAX.into());
        let end = end::find(source)?;
        if end.n_entries > max_entries || end.len_bytes > max_directory_bytes {
            let found = format!("{} records, a directory of {} bytes", end.n_entries, end.len_bytes);
            let expected = format!("a zip archive of at most {max_entries} records");
            return Err(Fault::new(expected, found).over_limit("n_records"));
        }
        let directory = source.read_range(end.start_byte..end.start_byte + end.len_bytes)?;
        let mut entries = parse_directory(&directory, end.start_byte, end.n_entries)?;
        local::locate(source, &directory, &mut entries, end.start_byte)?;
        Ok(Archive { directory, entries, trailing_bytes: end.trailing_bytes })
    }

    /// An entry's name.
    pub(super) fn name(&self, entry: &Entry) -> &[u8] {
        &self.directory[entry.name.start as usize..entry.name.end as usize]
    }

    /// The entries by name. Fails if two names are equal, or equal but for their case.
    pub(super) fn by_name(&self) -> Result<Records<'_>> {
        let state = RandomState::default();
        let name_at = |&position: &u32| AnyCase(self.name(&self.entries[position as usize]));
        let mut by_name = HashTable::with_capacity(self.entries.len());
        for (position, entry) in self.entries.iter().enumerate() {
            let name = AnyCase(self.name(entry));
            let hash = state.hash_one(&name);
            if let Some(other) = by_name.find(hash, |it| name_at(it) == name) {
                let other = name_at(other).0;
                let found = format!("`{}` and `{}`", show(other), show(self.name(entry)));
                return Err(Fault::new("one record of a name in the zip archive", found)
                    .hint("readers differ in which of the two they take; do not trust this file")
                    .corrupt());
            }
            by_name.insert_unique(hash, position as u32, |it| state.hash_one(name_at(it)));
        }
        Ok(Records { archive: self, state, by_name })
    }
}

/// The entries of an archive by name.
pub(super) struct Records<'a> {
    archive: &'a Archive,
    state: RandomState,
    /// Positions alone: the names stand in the directory.
    by_name: HashTable<u32>,
}

impl<'a> Records<'a> {
    /// The entry of exactly this name.
    pub(super) fn get(&self, name: &[u8]) -> Option<&'a Entry> {
        self.find(name).map(|(_, entry)| entry)
    }

    /// The entry of exactly this name, and its position.
    pub(super) fn find(&self, name: &[u8]) -> Option<(usize, &'a Entry)> {
        let hash = self.state.hash_one(AnyCase(name));
        let position = *self.by_name.find(hash, |&it| self.is_at(it as usize, name))? as usize;
        Some((position, &self.archive.entries[position]))
    }

    /// The same, with a guess where it is: records mostly stand in the order in which the pickle names them.
    pub(super) fn find_near(&self, guess: usize, name: &[u8]) -> Option<(usize, &'a Entry)> {
        let is_right = guess < self.len() && self.is_at(guess, name);
        if is_right { Some((guess, &self.archive.entries[guess])) } else { self.find(name) }
    }

    fn is_at(&self, position: usize, name: &[u8]) -> bool {
        self.archive.name(&self.archive.entries[position]) == name
    }

    /// Positions are below this.
    pub(super) fn len(&self) -> usize {
        self.archive.entries.len()
    }
}

/// A name that equals every other which differs in the case of ASCII letters alone.
struct AnyCase<'a>(&'a [u8]);

impl PartialEq for AnyCase<'_> {
    fn eq(&self, other: &Self) -> bool {
        // Most lookups are of the exact name, which is compared many bytes at a time.
        self.0 == other.0 || self.0.eq_ignore_ascii_case(other.0)
    }
}

impl Eq for AnyCase<'_> {}

impl Hash for AnyCase<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut folded = [0; 64];
        for part in self.0.chunks(folded.len()) {
            let folded = &mut folded[..part.len()];
            folded.copy_from_slice(part);
            folded.make_ascii_lowercase();
            state.write(folded);
        }
    }
}

/// A name as messages show it.
pub(super) fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().to_string()
}

fn parse_directory(directory: &[u8], start_byte: u64, n_entries: u64) -> Result<Vec<Entry>> {
    // No more than fit, whatever the end record claims.
    let mut entries = Vec::with_capacity((n_entries as usize).min(directory.len() / FIXED_BYTES));
    let mut at = 0;
    while at < directory.len() {
        let broken =
            |expected: &str, found: &str| Fault::new(expected, found).at(start_byte + at as u64).corrupt();
        let Some(fixed) = directory[at..].first_chunk::<FIXED_BYTES>() else {
            return Err(broken("an entry of the zip directory", "its end"));
        };
        if fixed[..4] != *b"PK\x01\x02" {
            return Err(broken("an entry of the zip directory", "other bytes"));
        }
        let [name_bytes, extra_bytes, comment_bytes] = [28, 30, 32].map(|it| usize::from(u16_at(fixed, it)));
        let name_at = at + FIXED_BYTES;
        let extra_at = name_at + name_bytes;
        let end = extra_at + extra_bytes + comment_bytes;
        if end > directory.len() {
            return Err(broken("an entry of the zip directory", "its end"));
        }
        if name_bytes == 0 || name_bytes > MAX_NAME_BYTES {
            let found = format!("{name_bytes} bytes");
            return Err(broken(&format!("a record name of 1 to {MAX_NAME_BYTES} bytes"), &found));
        }
        let mut entry = Entry {
            name: name_at as u32..extra_at as u32,
            flags: u16_at(fixed, 8),
            method: u16_at(fixed, 10),
            crc32: u32_at(fixed, 16),
            packed_bytes: 0,
            len_bytes: 0,
            header_byte: 0,
            start_byte: 0,
        };
        let name = &directory[name_at..extra_at];
        let mut wide = Zip64(zip64_extra(&directory[extra_at..extra_at + extra_bytes]));
        // In this order stand the fields that are continued.
        let sizes = [24, 20, 42].map(|it| wide.continued(u32_at(fixed, it)));
        let [Some(len_bytes), Some(packed_bytes), Some(header_byte)] = sizes else {
            return Err(broken("a zip64 extra field", "none, or a short one"));
        };
        (entry.len_bytes, entry.packed_bytes, entry.header_byte) = (len_bytes, packed_bytes, header_byte);
        check_entry(&entry, name).map_err(|error| match error {
            Error::Corrupt(fault) => fault.at(start_byte + at as u64).corrupt(),
            other => other,
        })?;
        if !matches!(u16_at(fixed, 34), 0 | u16::MAX) {
            return Err(broken("an archive of one part", "one of several"));
        }
        entries.push(entry);
        at = end;
    }
    if entries.len() as u64 != n_entries {
        let found = format!("{}", entries.len());
        return Err(Fault::new(format!("{n_entries} entries in the zip directory"), found).corrupt());
    }
    Ok(entries)
}

fn check_entry(entry: &Entry, name: &[u8]) -> Result<()> {
    let record = || format!("record `{}`", show(name));
    if entry.flags & REFUSED_FLAGS != 0 {
        return Err(Fault::new("a plain record", format!("{}, which is encrypted or patched", record()))
            .hint("unpack it with the password and zip it again without")
            .unsupported());
    }
    match entry.method {
        STORED if entry.packed_bytes != entry.len_bytes => {
            let found = format!("{} in {} bytes", entry.len_bytes, entry.packed_bytes);
            Err(Fault::new(format!("{} stored as it is", record()), found).corrupt())
        }
        DEFLATED if entry.len_bytes > Encoding::Deflate.max_unpacked_bytes(entry.packed_bytes) => {
            let found = format!("{} in {} bytes", entry.len_bytes, entry.packed_bytes);
            Err(Fault::new(format!("{} no longer than inflating can make it", record()), found).corrupt())
        }
        STORED | DEFLATED => Ok(()),
        method => Err(Fault::new("a stored record", format!("{}, compressed by method {method}", record()))
            .hint("zip it again without compression (`zip -0`)")
            .unsupported()),
    }
}

/// What is left of a zip64 extra field: the fields that are saturated elsewhere, in their order.
struct Zip64<'a>(&'a [u8]);

impl Zip64<'_> {
    fn continued(&mut self, field: u32) -> Option<u64> {
        if field != SATURATED {
            return Some(u64::from(field));
        }
        let (value, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*value))
    }
}

/// The content of the extra field with id 1, or nothing.
fn zip64_extra(mut extra: &[u8]) -> &[u8] {
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let Some(content) = extra.get(4..4 + len) else { break };
        if id == 1 {
            return content;
        }
        extra = &extra[4 + len..];
    }
    &[]
}

/// `at + 2` is within `bytes` at every call.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// `at + 4` is within `bytes` at every call.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

/// `at + 8` is within `bytes` at every call.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;
    use std::io::{Cursor, Write as _};
    use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

    fn written(names: &[&str], options: SimpleFileOptions, comment: &str) -> Vec<u8> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (index, name) in names.iter().enumerate() {
            writer.start_file(*name, options).unwrap();
            writer.write_all(&vec![index as u8; 100 * index]).unwrap();
        }
        writer.set_comment(comment).unwrap();
        writer.finish().unwrap().into_inner()
    }

    fn read(bytes: &[u8]) -> Result<Archive> {
        Archive::read(&MemorySource::new("x.pt", bytes.to_vec()), &Limits::default())
    }

    fn stored() -> SimpleFileOptions {
        SimpleFileOptions::default().compression_method(CompressionMethod::Stored)
    }

    #[test]
    fn agrees_with_another_reader_on_every_record() {
        for options in [stored(), stored().large_file(true), SimpleFileOptions::default()] {
            let bytes = written(&["x/data.pkl", "x/data/0", "x/data/1"], options, "a comment");
            let archive = read(&bytes).unwrap();
            let mut oracle = ZipArchive::new(Cursor::new(&bytes)).unwrap();
            assert_eq!(archive.entries.len(), oracle.len());
            for (index, entry) in archive.entries.iter().enumerate() {
                let theirs = oracle.by_index_raw(index).unwrap();
                assert_eq!(archive.name(entry), theirs.name_raw());
                assert_eq!(Some(entry.start_byte), theirs.data_start());
                assert_eq!((entry.len_bytes, entry.packed_bytes), (theirs.size(), theirs.compressed_size()));
                assert_eq!(entry.crc32, theirs.crc32());
            }
        }
    }

    #[test]
    fn names_are_found_by_their_exact_case_and_must_differ_in_more() {
        let archive = read(&written(&["x/Data.pkl", "x/data/0"], stored(), "")).unwrap();
        let records = archive.by_name().unwrap();
        assert!(records.get(b"x/Data.pkl").is_some() && records.get(b"x/data.pkl").is_none());
        assert!(records.get(&[b'x'; 600]).is_none());
        let twins = read(&written(&["x/data.pkl", "x/DATA.PKL"], stored(), "")).unwrap();
        assert!(twins.by_name().is_err());
    }

    #[test]
    fn the_end_record_is_the_last_that_fits() {
        let fake = "PK\u{5}\u{6}\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let bytes = written(&["x/data.pkl", "x/data/0"], stored(), fake);
        assert_eq!(read(&bytes).unwrap().entries.len(), 2);
        let junk = [&bytes[..], b"trailing"].concat();
        assert_eq!(read(&junk).unwrap().trailing_bytes, 8);
        let prefixed = [b"prefix", &bytes[..]].concat();
        assert!(read(&prefixed).is_err());
        // Two of them, of which readers take the one or the other.
        for options in [stored(), stored().large_file(true)] {
            let other = written(&["y/data.pkl"], options, "");
            for between in [&b""[..], b"gap", &[0; 100_000]] {
                let error = read(&[&bytes[..], between, &other].concat()).unwrap_err().to_string();
                assert!(error.contains("another one behind the first"), "{error}");
            }
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = written(&["x/data.pkl", "x/data/0"], stored(), "");
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn local_headers_that_disagree_are_refused() {
        let bytes = written(&["x/data.pkl", "x/data/1"], stored(), "");
        let second = bytes.windows(4).skip(1).position(|it| it == b"PK\x03\x04").unwrap() + 1;
        for (at, what) in
            [(second + 30, "name"), (second + 8, "method"), (second + 6, "flags"), (second + 18, "size")]
        {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            let error = read(&bad).unwrap_err();
            assert!(error.to_string().contains("local header"), "{what}: {error}");
        }
    }

    #[test]
    fn records_that_share_bytes_are_refused() {
        let mut bytes = written(&["x/data/1", "x/data/2"], stored(), "");
        let entry = bytes.windows(4).rposition(|it| it == b"PK\x01\x02").unwrap();
        // The second entry becomes the first once more, under its own name in both headers.
        bytes.copy_within(30 + 7..30 + 8, entry + FIXED_BYTES + 7);
        bytes[entry + 42..entry + 46].fill(0);
        bytes[entry + 16..entry + 28].fill(0);
        let error = read(&bytes).unwrap_err();
        assert!(
            error.to_string().contains("local header") || error.to_string().contains("overlap"),
            "{error}"
        );
    }
}
