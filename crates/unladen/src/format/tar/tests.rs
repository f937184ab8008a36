//! Archives of the first releases by hand: views, ties, every way of writing a header, and every lie.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::{checkpoint::Warning, source::MemorySource, tensor::Backing};
use std::path::PathBuf;

fn integer(number: i32) -> Vec<u8> {
    [b"J", &number.to_le_bytes()[..]].concat()
}

fn longs(numbers: &[i64]) -> Vec<u8> {
    numbers.iter().flat_map(|it| it.to_le_bytes()).collect()
}

fn pickle(parts: &[&[u8]]) -> Vec<u8> {
    [b"\x80\x02", &parts.concat()[..], b"."].concat()
}

/// A storage of floats in its member.
fn storage(number: i32, n_elems: i64, n_written: usize) -> Vec<u8> {
    let head = pickle(&[b"(", &integer(number), b"X\x03\0\0\0cpuctorch\nFloatStorage\nt"]);
    [head, longs(&[n_elems]), vec![7; 4 * n_written]].concat()
}

fn view(number: i32, root: i32, offset: i32, n_elems: i32) -> Vec<u8> {
    [&b"("[..], &integer(number), &integer(root), &integer(offset), &integer(n_elems), b"t"].concat()
}

/// A tensor of floats in its member.
fn tensor(number: i32, storage: &[u8], shape: &[i64], stride: &[i64], offset: i64) -> Vec<u8> {
    let head = pickle(&[b"(", &integer(number), storage, b"ctorch\nFloatTensor\nt"]);
    let n_dims = (shape.len() as i32).to_le_bytes();
    [head, n_dims.to_vec(), vec![0; 4], longs(shape), longs(stride), longs(&[offset])].concat()
}

fn member(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    sign(&mut header);
    let mut bytes = [&header[..], content].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// Writes a header's checksum.
fn sign(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u64 = header[..512].iter().map(|&it| u64::from(it)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

fn storages(entries: &[Vec<u8>], views: &[Vec<u8>]) -> Vec<u8> {
    let count = pickle(&[&integer(entries.len() as i32)]);
    [count, entries.concat(), pickle(&[b"](", &views.concat(), b"e"])].concat()
}

fn tensors(entries: &[Vec<u8>]) -> Vec<u8> {
    [pickle(&[&integer(entries.len() as i32)]), entries.concat()].concat()
}

/// The four members of a checkpoint with two tensors on one storage, one of them by two names.
fn members() -> Vec<(&'static str, Vec<u8>)> {
    let stores = storages(&[storage(1, 6, 6), storage(2, 2, 2)], &[view(3, 1, 2, 4)]);
    let rows = tensors(&[
        tensor(11, &integer(1), &[2, 3], &[3, 1], 0),
        tensor(12, &integer(3), &[2, 2], &[1, 2], 0),
        tensor(13, b"N", &[], &[], 0),
    ]);
    let items = b"U\x01aU\x0211QU\x01bP12\nU\x01cU\x0211QU\x01dU\x012QU\x01eU\x0213Q";
    let object = pickle(&[b"ccollections\nOrderedDict\n)R(", items, b"u"]);
    vec![("sys_info", pickle(&[b"}"])), ("pickle", object), ("tensors", rows), ("storages", stores)]
}

fn archive(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut bytes: Vec<u8> = members.iter().flat_map(|(name, content)| member(name, b'0', content)).collect();
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

fn with(name: &str, content: Vec<u8>) -> Vec<u8> {
    let replaced = |(it, old): (&'static str, Vec<u8>)| (it, if it == name { content.clone() } else { old });
    archive(&members().into_iter().map(replaced).collect::<Vec<_>>())
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    let len_bytes = bytes.len() as u64;
    let stamp =
        FileStamp { path: PathBuf::from("x.pt"), dev: 0, ino: 0, len_bytes, mtime_ns: 0, packed: None };
    super::super::parse(&MemorySource::new("x.pt", bytes), stamp, &OpenOptions::default())
}

#[test]
fn tensors_are_found_by_number_with_views_and_ties() {
    let bytes = archive(&members());
    let checkpoint = open(bytes.clone()).unwrap();
    assert_eq!(checkpoint.format, Format::Tar);
    let names: Vec<&str> = checkpoint.tensors.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "e"]);
    let [a, b, c, e] = &checkpoint.tensors[..] else { panic!("{names:?}") };
    assert_eq!((a.layout.shape(), b.layout.stride()), (&[2, 3][..], &[1, 2][..]));
    assert_eq!((&a.layout, &a.backing), (&c.layout, &c.backing));
    assert_eq!((e.layout.shape(), &e.backing), (&[0][..], &Backing::Meta));
    let (Backing::Storage(a), Backing::Storage(b)) = (&a.backing, &b.backing) else { panic!("{names:?}") };
    let [a, b] = [a, b].map(|it| &checkpoint.storages[it.0 as usize]);
    assert_eq!((b.start_byte - a.start_byte, a.len_bytes, b.len_bytes), (8, 24, 16));
    assert_eq!(bytes[a.start_byte as usize..][..24], [7; 24]);
    assert!(matches!(&checkpoint.warnings[0], Warning::LeftOut(it) if it.contains("storage `d`")));
}

#[test]
fn every_cut_ends_in_a_typed_error() {
    let whole = archive(&members());
    // The last member's padding and the blocks of zeros behind it are not missed.
    let needed = whole.iter().rposition(|&it| it != 0).unwrap() + 1;
    for len in 0..needed {
        let error = open(whole[..len].to_vec()).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_) | Error::Unsupported(_)), "{len}: {error}");
    }
}

#[test]
fn headers_are_read_as_every_program_writes_them() {
    let [info, pickle, tensors, storages] = &members()[..] else { panic!("four members") };
    let mut large = member("storages", b'0', &storages.1);
    large[124..136].fill(0);
    large[124] = 0x80;
    large[128..136].copy_from_slice(&(storages.1.len() as u64).to_be_bytes());
    sign(&mut large);
    let record = format!("size={}\n", tensors.1.len());
    let record = format!("{} {record}12 path=tensors\n", record.len() + 3).replace("12 path", "16 path");
    let mut by_extension = member("other", b'0', &tensors.1);
    by_extension[124..135].copy_from_slice(b"00000000000");
    sign(&mut by_extension);
    let parts = [
        member("././@LongLink", b'L', b"sys_info\0"),
        member("x", b'0', &info.1),
        member("pickle", 0, &pickle.1),
        member("ext", b'x', record.as_bytes()),
        by_extension,
        large,
    ];
    let checkpoint = open(parts.concat()).unwrap();
    assert_eq!(checkpoint.tensors.len(), 4);
}

#[test]
fn archives_of_something_else_and_members_that_lie_are_refused() {
    let good = members();
    let unsupported = |bytes: Vec<u8>, expected: &str| {
        let error = open(bytes).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains(expected), "{error}");
    };
    let corrupt = |bytes: Vec<u8>, expected: &str| {
        let error = open(bytes).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains(expected), "{error}");
    };
    unsupported(archive(&[("model/weights.bin", vec![1])]), "something else (`model/weights.bin`)");
    unsupported(archive(&[&good[..], &[("../storages", vec![])]].concat()), "something else");
    corrupt(archive(&good[..3]), "member `storages`");
    corrupt(archive(&[&good[..], &[("pickle", vec![])]].concat()), "one member `pickle`");
    for kind in *b"1256" {
        let bytes = [member("storages", kind, b""), archive(&good[..3])].concat();
        corrupt(bytes, "as a regular file");
    }
    let mut broken = archive(&good);
    broken[0] = b'S';
    corrupt(broken, "checksum");
    let mut long = archive(&good);
    long[124..135].copy_from_slice(b"77777777777");
    sign(&mut long);
    corrupt(long, "8589934591 bytes of a member");
}

#[test]
fn lies_in_the_tables_are_found() {
    let stores = |entries: &[Vec<u8>], views: &[Vec<u8>]| with("storages", storages(entries, views));
    let rows = |entries: &[Vec<u8>]| with("tensors", tensors(entries));
    let two = [storage(1, 6, 6), storage(2, 2, 2)];
    let one = integer(1);
    let cases = [
        stores(&[storage(1, 60, 6), storage(2, 2, 2)], &[]),
        stores(&[storage(1, -6, 6), storage(2, 2, 2)], &[]),
        stores(&[storage(1, i64::MAX, 6)], &[]),
        stores(&[storage(1, 6, 6), storage(1, 2, 2)], &[]),
        stores(&two, &[view(3, 9, 0, 1)]),
        stores(&two, &[view(3, 1, 2, 5)]),
        stores(&two, &[view(3, 1, -1, 2)]),
        stores(&two, &[view(3, 1, i32::MAX, i32::MAX)]),
        stores(&two, &[view(1, 1, 0, 1)]),
        stores(&two, &[b"K\x01".to_vec()]),
        // Numbers that the pickle names are missing.
        rows(&[tensor(11, &one, &[2, 3], &[3, 1], 0)]),
        rows(&[tensor(11, &one, &[2, 4], &[4, 1], 0)]),
        rows(&[tensor(11, &one, &[-2, 3], &[3, 1], 0)]),
        rows(&[tensor(11, &one, &[2, 3], &[3, -1], 0)]),
        rows(&[tensor(11, &one, &[2, 3], &[3, 1], -1)]),
        rows(&[tensor(11, &integer(5), &[2, 3], &[3, 1], 0)]),
        rows(&[tensor(11, b"N", &[2], &[1], 0)]),
        rows(&[tensor(11, &one, &[1; 65], &[1; 65], 0)]),
        with("tensors", pickle(&[&integer(1_000_000)])),
        with("tensors", pickle(&[&integer(-1)])),
        with("pickle", pickle(&[b"U\x0299Q"])),
        with("pickle", pickle(&[b"U\x02xxQ"])),
        with("pickle", b"\x80\x02(".to_vec()),
    ];
    for (index, bytes) in cases.into_iter().enumerate() {
        let error = open(bytes).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{index}: {error}");
    }
}
