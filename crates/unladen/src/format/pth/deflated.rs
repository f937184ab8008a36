//! Archives whose records are deflated: they open as if they were stored, and what they claim is checked before anything is
//! inflated.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::{
    dtype::DType,
    error::Error,
    source::{MemorySource, unpacked},
    stamp::Encoding,
    tensor::{Backing, Layout},
};
use std::{
    io::{Cursor, Write as _},
    path::PathBuf,
};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

const FLOAT: &[u8] = b"torch\nFloatStorage\n";

/// A pickle of one tensor of so many floats on storage `0`.
fn pickle(n_elems: u32) -> Vec<u8> {
    let n = [b"J", &n_elems.to_le_bytes()[..]].concat();
    let storage = [b"(X\x07\0\0\0storagec", FLOAT, b"X\x01\0\0\x000X\x03\0\0\0cpu", &n, b"tQ"].concat();
    let call =
        [b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(", &storage[..], b"K\0", &n, b"\x85K\x01\x85\x89"];
    [&call.concat()[..], b"ccollections\nOrderedDict\n)RtR."].concat()
}

/// An archive, each record deflated or stored.
fn archive(records: &[(&str, &[u8], bool)]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes, is_deflated) in records {
        let method = if *is_deflated { CompressionMethod::Deflated } else { CompressionMethod::Stored };
        writer.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn open(bytes: &[u8]) -> Result<Checkpoint> {
    let len_bytes = bytes.len() as u64;
    let stamp =
        FileStamp { path: PathBuf::from("x.pt"), dev: 0, ino: 0, len_bytes, mtime_ns: 0, packed: None };
    crate::format::parse(&MemorySource::new("x.pt", bytes.to_vec()), stamp, &OpenOptions::default())
}

/// Where the directory's entry of a record starts.
fn entry(archive: &[u8], name: &str) -> usize {
    let is_here = |&at: &usize| {
        archive[at..].starts_with(b"PK\x01\x02") && archive[at + 46..].starts_with(name.as_bytes())
    };
    (0..archive.len() - 46).find(is_here).unwrap()
}

/// The archive with another number in the directory's entry and the local header of a record. `at`: in the entry.
fn with_field(archive: &[u8], name: &str, at: usize, value: u32) -> Vec<u8> {
    let mut changed = archive.to_vec();
    let entry = entry(archive, name);
    changed[entry + at..entry + at + 4].copy_from_slice(&value.to_le_bytes());
    let header = u32::from_le_bytes(archive[entry + 42..entry + 46].try_into().unwrap()) as usize;
    // The fields stand in the same order, two bytes nearer to the start.
    changed[header + at - 2..header + at + 2].copy_from_slice(&value.to_le_bytes());
    changed
}

const CRC: usize = 16;
const LEN: usize = 24;

fn good() -> Vec<u8> {
    archive(&[
        ("x/data.pkl", &pickle(1000), true),
        ("x/byteorder", b"big", true),
        ("x/data/0", &[7; 4000], true),
        ("x/version", b"3\n", true),
    ])
}

#[test]
fn a_deflated_record_is_a_file_behind_its_archive() {
    let bytes = good();
    let checkpoint = open(&bytes).unwrap();
    let [file, record] = &checkpoint.files[..] else { panic!("{:?}", checkpoint.files) };
    assert!(record.is_packed_in(file));
    let packed = record.packed.as_ref().unwrap();
    assert_eq!((record.len_bytes, &*packed.name, packed.encoding), (4000, "x/data/0", Encoding::Deflate));
    assert!(packed.crc32.is_some() && packed.len_bytes < 100);
    let storage = Storage { file: FileId(1), start_byte: 0, len_bytes: 4000, swapped: true };
    assert_eq!(checkpoint.storages, [storage]);
    let source = MemorySource::new("x.pt", bytes);
    assert_eq!(unpacked(&source, packed, 4000).unwrap(), [7; 4000]);
    assert_eq!(checkpoint.tensors[0].layout, Layout::contiguous(DType::F32, &[1000]).unwrap());
    assert_eq!(checkpoint.tensors[0].backing, Backing::Storage(StorageId(0)));
    // The same checkpoint, stored.
    let stored = archive(&[
        ("x/data.pkl", &pickle(1000), false),
        ("x/byteorder", b"big", false),
        ("x/data/0", &[7; 4000], false),
        ("x/version", b"3\n", false),
    ]);
    let stored = open(&stored).unwrap();
    assert_eq!((stored.tensors, stored.files.len()), (checkpoint.tensors, 1));
}

#[test]
fn a_record_without_content_may_be_deflated() {
    let empty =
        archive(&[("x/data.pkl", &pickle(0), true), ("x/data/0", b"", true), ("x/version", b"3", true)]);
    let checkpoint = open(&empty).unwrap();
    assert_eq!((checkpoint.tensors[0].layout.n_elems(), checkpoint.files[1].len_bytes), (0, 0));
}

#[test]
fn a_checksum_of_zero_was_not_computed_and_any_other_is_checked() {
    let unknown = with_field(&with_field(&good(), "x/data.pkl", CRC, 0), "x/data/0", CRC, 0);
    let checkpoint = open(&unknown).unwrap();
    assert_eq!(checkpoint.files[1].packed.as_ref().unwrap().crc32, None);
    for name in ["x/data.pkl", "x/version", "x/byteorder"] {
        let error = open(&with_field(&good(), name, CRC, 1)).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains("checksum"), "{error}");
    }
}

#[test]
fn lengths_that_no_inflating_makes_are_refused_and_others_must_be_true() {
    let error = open(&with_field(&good(), "x/data/0", LEN, 4_000_000)).unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains("inflating"), "{error}");
    // Less than what the pickle says the storage has.
    assert!(matches!(open(&with_field(&good(), "x/data/0", LEN, 3996)).unwrap_err(), Error::Corrupt(_)));
    for len in [0, 1, pickle(1000).len() as u32 - 1, pickle(1000).len() as u32 + 1] {
        let error = open(&with_field(&good(), "x/data.pkl", LEN, len)).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{len}: {error}");
    }
}

#[test]
fn headers_that_grow_without_measure_are_refused_before_they_do() {
    let zeros = vec![0; 17 << 20];
    let bomb = archive(&[("x/data.pkl", &zeros, true), ("x/version", b"3", true)]);
    assert!(bomb.len() < 40_000);
    let error = open(&bomb).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains("data.pkl"), "{error}");
    let bomb = archive(&[("x/data.pkl", &pickle(0), true), ("x/version", &zeros[..65], true)]);
    assert!(open(&bomb).unwrap_err().to_string().contains("`version`"));
}

#[test]
fn methods_that_are_not_known_stay_an_error_that_names_the_record() {
    let mut other = good();
    let entry = entry(&other, "x/data/0");
    let header = u32::from_le_bytes(other[entry + 42..entry + 46].try_into().unwrap()) as usize;
    other[entry + 10] = 9;
    other[header + 8] = 9;
    let error = open(&other).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains("method 9"), "{error}");
    assert!(error.hint().contains("zip -0"));
}

#[test]
fn every_change_of_a_byte_is_an_error_or_a_valid_checkpoint() {
    let good = good();
    for at in 0..good.len() {
        for flip in [1, 0x80] {
            let mut broken = good.clone();
            broken[at] ^= flip;
            if let Ok(checkpoint) = open(&broken) {
                checkpoint.validate().unwrap();
            }
        }
    }
}
