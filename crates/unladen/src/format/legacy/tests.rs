//! Legacy files by hand: names, views, classes with their source, and every lie that one can tell.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::{error::Error, source::MemorySource, tensor::Backing};
use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

const START: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.";

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn integer(number: u32) -> Vec<u8> {
    [b"J", &number.to_le_bytes()[..]].concat()
}

/// A tensor of floats on a storage; `view`: the part of it that is meant.
fn tensor(key: &[u8], n_elems: u32, size: u32, view: &[u8]) -> Vec<u8> {
    let id = [&text("storage")[..], b"ctorch\nFloatStorage\n", key, &text("cpu"), &integer(n_elems), view]
        .concat();
    let place = [b"K\0", &integer(size)[..], b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)R"].concat();
    [b"ctorch._utils\n_rebuild_tensor_v2\n((", &id[..], b"tQ", &place, b"tR"].concat()
}

fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = items.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [b"\x80\x02}(", &items[..], b"u."].concat()
}

fn file(object: &[u8], keys: &[&str], storages: &[(i64, usize)]) -> Vec<u8> {
    let keys: Vec<u8> = keys.iter().flat_map(|it| text(it)).collect();
    let mut bytes = [START, object, b"\x80\x02](", &keys, b"e."].concat();
    for &(n_elems, len_bytes) in storages {
        bytes.extend(n_elems.to_le_bytes());
        bytes.extend(std::iter::repeat_n(7, len_bytes));
    }
    bytes
}

fn parse_from(source: &dyn ReadAt) -> Result<Checkpoint> {
    let len_bytes = source.len_bytes();
    let stamp =
        FileStamp { path: PathBuf::from("x.pt"), dev: 0, ino: 0, len_bytes, mtime_ns: 0, packed: None };
    super::super::parse(source, stamp, &OpenOptions::default())
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    parse_from(&MemorySource::new("x.pt", bytes))
}

fn small() -> Vec<u8> {
    let view = [b"(", &text("v1")[..], b"K\x01K\x02t"].concat();
    let object = dict(&[
        ("a", tensor(&text("k1"), 4, 4, b"N")),
        ("b", tensor(&text("k0"), 3, 2, b"N")),
        ("c", tensor(b"U\x02k1", 4, 2, &view)),
        ("d", tensor(&text("k1"), 4, 2, &view)),
    ]);
    file(&object, &["k0", "k1"], &[(3, 12), (4, 16)])
}

#[test]
fn storages_are_found_behind_the_keys_and_views_inside_them() {
    let bytes = small();
    let len_bytes = bytes.len() as u64;
    let checkpoint = open(bytes).unwrap();
    assert_eq!((checkpoint.format, &checkpoint.warnings[..]), (Format::Legacy, &[][..]));
    let place = |name: &str| {
        let tensor = checkpoint.tensors.iter().find(|it| it.name == name).unwrap();
        let Backing::Storage(id) = tensor.backing else { panic!("{tensor:?}") };
        let storage = &checkpoint.storages[id.0 as usize];
        (len_bytes - storage.start_byte, storage.len_bytes, tensor.layout.n_elems())
    };
    assert_eq!(place("a"), (16, 16, 4));
    assert_eq!(place("b"), (36, 12, 2));
    assert_eq!([place("c"), place("d")], [(12, 8, 2); 2]);
    assert_eq!(checkpoint.storages.len(), 3);
}

#[test]
fn every_cut_ends_in_a_typed_error() {
    let whole = small();
    for len in 0..whole.len() {
        let error = open(whole[..len].to_vec()).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)) && !error.hint().is_empty(), "{len}: {error}");
    }
    let error = open(whole[..whole.len() - 1].to_vec()).unwrap_err().to_string();
    let (expected, found) = (format!("{} bytes", whole.len()), format!("{} bytes", whole.len() - 1));
    assert!(error.contains(&expected) && error.contains(&found), "{error}");
}

#[test]
fn bytes_behind_the_last_storage_are_told() {
    let checkpoint = open([&small()[..], b"more"].concat()).unwrap();
    assert_eq!(checkpoint.warnings, [Warning::TrailingBytes { after: "the last storage", len_bytes: 4 }]);
}

#[test]
fn lies_about_storages_are_found() {
    let object = dict(&[("a", tensor(&text("k1"), 4, 4, b"N"))]);
    /// Keys, numbers of elements with bytes, and what the error says.
    type Case<'a> = (&'a [&'a str], &'a [(i64, usize)], &'a str);
    let cases: &[Case<'_>] = &[
        (&["k1"], &[(5, 20)], "storage `k1` of 4 elements"),
        (&["k1"], &[(-4, 16)], "-4"),
        (&["k1"], &[(i64::MIN, 16)], "storage `k1` of 4 elements"),
        (&["k2"], &[(4, 16)], "one with key `k2`"),
        (&[], &[], "storage `k1`, which the pickle names"),
        (&["k1", "k1"], &[(4, 16), (4, 16)], "two of them"),
        (&["k1", "k2"], &[(4, 16), (4, 16)], "one with key `k2`"),
    ];
    for (keys, storages, expected) in cases {
        let error = open(file(&object, keys, storages)).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains(expected), "{error}");
    }
    let twice = dict(&[("a", tensor(&text("k1"), 4, 4, b"N")), ("b", tensor(&text("k1"), 5, 4, b"N"))]);
    assert!(open(file(&twice, &["k1"], &[(4, 16)])).unwrap_err().to_string().contains("another time of 20"));
    for view in ["(X\x01\0\0\0vK\x03K\x02t", "(X\x02\0\0\0k1K\0K\x02t", "(X\x01\0\0\0vKKt", "K\x01"] {
        let object = dict(&[("a", tensor(&text("k1"), 4, 1, view.as_bytes()))]);
        assert!(
            matches!(open(file(&object, &["k1"], &[(4, 16)])).unwrap_err(), Error::Corrupt(_)),
            "{view:?}"
        );
    }
    let too_far = dict(&[("a", tensor(&text("k1"), 4, 5, b"N"))]);
    assert!(open(file(&too_far, &["k1"], &[(4, 16)])).is_err());
    // A list of keys that is none.
    let mut bytes = [START, &object[..], b"\x80\x02K\x01."].concat();
    assert!(matches!(open(bytes.clone()).unwrap_err(), Error::Corrupt(_)));
    bytes.truncate(START.len() - 4);
    bytes.extend(b"K\x07.");
    assert!(matches!(open(bytes).unwrap_err(), Error::Corrupt(_)));
}

#[test]
fn another_version_is_named() {
    let mut bytes = small();
    let at = bytes.windows(3).position(|it| it == b"M\xe9\x03").unwrap();
    bytes[at + 1] = 0xEA;
    let error = open(bytes).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains("1002"), "{error}");
}

#[test]
fn classes_with_their_source_stand_for_themselves() {
    let class =
        [b"(", &text("module")[..], b"cmy\nNet\n", &text("net.py"), &text("class Net: ..."), b"tQ"].concat();
    let parameters = [b"}", &text("w")[..], &tensor(&text("k1"), 4, 4, b"N"), b"s"].concat();
    let state = [&b"}("[..], &text("_parameters"), &parameters, &text("_modules"), b"}u"].concat();
    let object = [b"\x80\x02", &class[..], b")\x81", &state, b"b."].concat();
    let checkpoint = open(file(&object, &["k1"], &[(4, 16)])).unwrap();
    let names: Vec<&str> = checkpoint.tensors.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["w"]);
    assert!(checkpoint.warnings[0].to_string().contains("my.Net"));
}

#[test]
fn text_protocols_are_read_as_well() {
    let object = b"(dp0\nS'a'\np1\nctorch._utils\n_rebuild_tensor_v2\np2\n((S'storage'\nctorch\nFloatStorage\nS'k1'\nS'cpu'\nI4\nNtQI0\n(I4\nt(I1\ntI00\nccollections\nOrderedDict\n(tRtRs.";
    let head = b"L119547037146038801333356L\n.I1001\n.(dp0\nS'little_endian'\np1\nI01\ns.";
    let bytes = [&head[..], object, b"(lp0\nS'k1'\np1\na.", &4u64.to_le_bytes(), &[0; 16]].concat();
    let checkpoint = open(bytes.clone()).unwrap();
    assert_eq!((checkpoint.tensors[0].name.as_str(), checkpoint.tensors[0].layout.shape()), ("a", &[4][..]));
    for len in 0..bytes.len() {
        assert!(open(bytes[..len].to_vec()).is_err(), "{len}");
    }
}

/// Counts what is read of bytes that are mostly the same.
struct Counted {
    head: Vec<u8>,
    /// Elements and bytes of each storage.
    n_elems: u64,
    len_bytes: u64,
    n_reads: AtomicU64,
    n_bytes: AtomicU64,
}

impl ReadAt for Counted {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn path(&self) -> &Path {
        Path::new("x.pt")
    }

    fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        self.n_reads.fetch_add(1, Ordering::Relaxed);
        self.n_bytes.fetch_add(target.len() as u64, Ordering::Relaxed);
        let (head, each) = (self.head.len() as u64, 8 + 4 * self.n_elems);
        for (at, byte) in (start_byte..).zip(target) {
            *byte = match at.checked_sub(head) {
                None => self.head[at as usize],
                Some(at) if at % each < 8 => self.n_elems.to_le_bytes()[(at % each) as usize],
                Some(_) => 9,
            };
        }
        Ok(())
    }
}

#[test]
fn thousands_of_storages_take_few_reads_and_large_ones_little_of_the_file() {
    for (n_elems, max_reads, max_bytes) in [(4, 40, 2 << 20), (10_000_000, 2_600, 2 << 20)] {
        let names: Vec<String> = (0..2_500).map(|it| format!("layer.{it}")).collect();
        let items: Vec<_> =
            names.iter().map(|it| (it.as_str(), tensor(&text(it), n_elems, 4, b"N"))).collect();
        let keys: Vec<&str> = names.iter().map(String::as_str).collect();
        let head = file(&dict(&items), &keys, &[]);
        let n_elems = u64::from(n_elems);
        let len_bytes = head.len() as u64 + 2_500 * (8 + 4 * n_elems);
        let source =
            Counted { head, n_elems, len_bytes, n_reads: AtomicU64::new(0), n_bytes: AtomicU64::new(0) };
        let checkpoint = parse_from(&source).unwrap();
        assert_eq!((checkpoint.tensors.len(), checkpoint.warnings.len()), (2_500, 0));
        let (n_reads, n_bytes) = (source.n_reads.into_inner(), source.n_bytes.into_inner());
        assert!(
            n_reads < max_reads && n_bytes < source.head.len() as u64 + max_bytes,
            "{n_reads}, {n_bytes}"
        );
    }
}
