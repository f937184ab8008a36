//! Lists the records of a zip archive with their checksums. Reads no record: comparing them is `verify`'s.

use super::{
    Limits, OpenOptions, dcp, record,
    zip::{Archive, Entry, show},
};
use crate::{
    checkpoint::{Checkpoint, Format},
    error::{Fault, Result},
    source::{FileSet, ReadAt, Section},
    stamp::Packed,
    tensor::FileId,
};
use foldhash::HashMap;
use std::ops::Range;

/// How every archive that is read starts.
const START: &[u8] = b"PK\x03\x04";

/// A record of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name, as messages show it.
    pub name: String,
    /// Where its bytes stand in the file; `None`: they are packed.
    pub range: Option<Range<u64>>,
    /// How they are packed.
    pub packed: Option<Packed>,
    /// How many they are, unpacked.
    pub len_bytes: u64,
    /// The CRC-32 of its bytes; `None`: whoever wrote the archive computed none.
    pub crc32: Option<u32>,
}

/// The records of a file in the archive's order: none if it is no zip archive.
///
/// Fails as opening the file does: on anything ambiguous.
pub fn records(source: &dyn ReadAt, limits: &Limits) -> Result<Vec<Record>> {
    records_inside(source, 0..source.len_bytes(), limits)
}

/// The records of all files of a checkpoint, by the file. A file of a distributed checkpoint is an archive for each chunk
/// and for each value that is no tensor, and its metadata are read once more to say where. What is packed in a file is none itself, whatever it starts with.
///
/// Fails like [`records`], and with [`Error::Mismatch`](crate::Error::Mismatch) if those metadata changed.
pub fn records_of(
    checkpoint: &Checkpoint,
    files: &FileSet,
    limits: &Limits,
) -> Result<Vec<(FileId, Record)>> {
    let mut found = Vec::new();
    let mut add = |index: usize, range: Range<u64>| -> Result<()> {
        let records = records_inside(&*files.file(index)?, range, limits)?;
        found.extend(records.into_iter().map(|it| (FileId(index as u32), it)));
        Ok(())
    };
    let whole = |index: &usize| files.stamp(*index).is_some_and(|it| it.packed.is_none());
    if checkpoint.format != Format::Dcp {
        let len_bytes = |index| files.stamp(index).map_or(0, |it| it.len_bytes);
        (0..files.len()).filter(whole).try_for_each(|it| add(it, 0..len_bytes(it)))?;
        return Ok(found);
    }
    let by_path: HashMap<_, _> =
        (0..files.len()).filter(whole).filter_map(|it| Some((files.path(it)?, it))).collect();
    let options = OpenOptions { limits: *limits, ..OpenOptions::default() };
    for (name, range) in dcp::archives(&checkpoint.path, &options)? {
        match by_path.get(&*checkpoint.path.join(&name)) {
            Some(&index) => add(index, range)?,
            None => {
                let found = format!("one in `{}`", name.escape_debug());
                return Err(Fault::new("chunks in the files that were opened", found)
                    .hint("the folder changed meanwhile; try again")
                    .mismatch()
                    .in_file(&checkpoint.path));
            }
        }
    }
    Ok(found)
}

/// The records of the archive that a part of a file is: none if it is no zip archive.
pub(super) fn records_inside(source: &dyn ReadAt, part: Range<u64>, limits: &Limits) -> Result<Vec<Record>> {
    let (first_byte, file_len_bytes) = (part.start, source.len_bytes());
    let section = Section::new(source, part)?;
    let start_bytes = START.len() as u64;
    if section.len_bytes() < start_bytes || section.read_range(0..start_bytes)? != START {
        return Ok(Vec::new());
    }
    let archive = Archive::read(&section, limits).map_err(|error| error.in_file(source.path()))?;
    // Inside the part, and so inside the file.
    let packed = |entry: &Entry| {
        let packed = record::packed(entry, archive.name(entry), file_len_bytes);
        Packed { start_byte: first_byte + packed.start_byte, ..packed }
    };
    let range = |entry: &Entry| {
        let start_byte = first_byte + entry.start_byte;
        start_byte..start_byte + entry.len_bytes
    };
    let record = |entry: &Entry| Record {
        name: show(archive.name(entry)),
        range: entry.is_stored().then(|| range(entry)),
        packed: (!entry.is_stored()).then(|| packed(entry)),
        len_bytes: entry.len_bytes,
        // PyTorch writes zeros where it is told to compute none. Of no bytes at all, zero is right.
        crc32: (entry.crc32 != 0 || entry.len_bytes == 0).then_some(entry.crc32),
    };
    Ok(archive.entries.iter().map(record).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;
    use std::io::{Cursor, Write as _};
    use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

    #[test]
    fn records_have_the_places_and_checksums_that_the_zip_crate_finds() {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        let packed = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        for (name, options, bytes) in
            [("x/data.pkl", stored, &b"abc"[..]), ("x/empty", stored, b""), ("x/code", packed, &[7; 99])]
        {
            writer.start_file(name, options).unwrap();
            writer.write_all(bytes).unwrap();
        }
        let bytes = writer.finish().unwrap().into_inner();
        let records = records(&MemorySource::new("x.pt", bytes.clone()), &Limits::default()).unwrap();
        let [first, empty, code] = &records[..] else { panic!("{records:?}") };
        assert_eq!((&*first.name, first.crc32), ("x/data.pkl", Some(crc32fast::hash(b"abc"))));
        let range = first.range.clone().unwrap();
        assert_eq!(&bytes[range.start as usize..range.end as usize], b"abc");
        assert_eq!((empty.crc32, empty.range.clone().map(|it| it.is_empty())), (Some(0), Some(true)));
        assert_eq!((&code.range, code.crc32), (&None, Some(crc32fast::hash(&[7; 99]))));
        let packed = code.packed.as_ref().unwrap();
        assert_eq!((code.len_bytes, packed.file_len_bytes), (99, bytes.len() as u64));
        assert!(first.packed.is_none());
    }

    #[test]
    fn a_file_that_is_no_archive_has_no_records() {
        for bytes in [&b""[..], b"PK", b"\x02\0\0\0\0\0\0\0{}"] {
            assert!(records(&MemorySource::new("x", bytes.to_vec()), &Limits::default()).unwrap().is_empty());
        }
    }
}
