//! Lists the records of a zip archive with their checksums. Reads no record: comparing them is `verify`'s.

use super::{
    Limits,
    zip::{Archive, Entry, show},
};
use crate::{error::Result, source::ReadAt};
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
    /// The CRC-32 of its bytes; `None`: whoever wrote the archive computed none.
    pub crc32: Option<u32>,
}

/// The records of a file in the archive's order: none if it is no zip archive.
///
/// Fails as opening the file does: on anything ambiguous.
pub fn records(source: &dyn ReadAt, limits: &Limits) -> Result<Vec<Record>> {
    let start_bytes = START.len() as u64;
    if source.len_bytes() < start_bytes || source.read_range(0..start_bytes)? != START {
        return Ok(Vec::new());
    }
    let archive = Archive::read(source, limits).map_err(|error| error.in_file(source.path()))?;
    let record = |entry: &Entry| Record {
        name: show(archive.name(entry)),
        range: entry.is_stored().then(|| entry.start_byte..entry.start_byte + entry.len_bytes),
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
    }

    #[test]
    fn a_file_that_is_no_archive_has_no_records() {
        for bytes in [&b""[..], b"PK", b"\x02\0\0\0\0\0\0\0{}"] {
            assert!(records(&MemorySource::new("x", bytes.to_vec()), &Limits::default()).unwrap().is_empty());
        }
    }
}
