//! Plain pickles by hand: what stands inside them stays where it is.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::{
    dtype::DType,
    source::MemorySource,
    tensor::{Backing, Storage},
};
use std::path::PathBuf;

const START: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.";

/// A legacy file that is one storage of floats.
fn storage(n_elems: u32) -> Vec<u8> {
    let id = b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0kX\x03\0\0\0cpuJ";
    let pickles = [START, id, &n_elems.to_le_bytes(), b"NtQ.\x80\x02]X\x01\0\0\0ka."].concat();
    [&pickles[..], &u64::from(n_elems).to_le_bytes(), &vec![7; 4 * n_elems as usize]].concat()
}

fn bytes(bytes: &[u8]) -> Vec<u8> {
    [b"B", &(bytes.len() as u32).to_le_bytes()[..], bytes].concat()
}

fn tensor(storage: &[u8], size: u8) -> Vec<u8> {
    let place = [b"K\0K", &[size][..], b"\x85K\x01\x85\x89}tR"].concat();
    [
        &b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\n"[..],
        storage,
        b"\x85R",
        &place,
    ]
    .concat()
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    let len_bytes = bytes.len() as u64;
    let stamp =
        FileStamp { path: PathBuf::from("x.pkl"), dev: 0, ino: 0, len_bytes, mtime_ns: 0, packed: None };
    super::super::parse(&MemorySource::new("x.pkl", bytes), stamp, &OpenOptions::default())
}

/// The storage of the only tensor with this name.
fn storage_of<'c>(checkpoint: &'c Checkpoint, name: &str) -> &'c Storage {
    let tensor = checkpoint.tensors.iter().find(|it| it.name == name).unwrap();
    let Backing::Storage(id) = tensor.backing else { panic!("{tensor:?}") };
    &checkpoint.storages[id.0 as usize]
}

#[test]
fn storages_inside_a_pickle_are_read_in_place_however_long_they_are() {
    let (short, long) = (bytes(&storage(4)), bytes(&storage(5000)));
    let items = [&b"U\x01a"[..], &tensor(&short, 4), b"U\x01b", &tensor(&long, 200)].concat();
    let pickle = [b"\x80\x03}(", &items[..], b"u."].concat();
    let checkpoint = open(pickle.clone()).unwrap();
    assert_eq!((checkpoint.format, &checkpoint.warnings[..]), (Format::Pickle, &[][..]));
    for (name, len_bytes) in [("a", 16), ("b", 20_000)] {
        let storage = storage_of(&checkpoint, name);
        assert_eq!(storage.len_bytes, len_bytes);
        assert!(pickle[storage.start_byte as usize..][..len_bytes as usize].iter().all(|&it| it == 7));
    }
    for len in 0..pickle.len() {
        assert!(open(pickle[..len].to_vec()).is_err(), "{len}");
    }
}

#[test]
fn one_string_that_two_tensors_share_is_one_storage() {
    let shared = [&bytes(&storage(4))[..], b"q\x01"].concat();
    let items = [&tensor(&shared, 4)[..], &tensor(b"h\x01", 4)].concat();
    let checkpoint = open([b"\x80\x03](", &items[..], b"e."].concat()).unwrap();
    assert_eq!((checkpoint.tensors.len(), checkpoint.storages.len()), (2, 1));
}

#[test]
fn strings_that_are_no_storage_end_in_an_error() {
    let good = storage(4);
    let damaged = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    for inner in [damaged(5, 0), damaged(good.len() - 24, 9), good[..good.len() - 1].to_vec(), Vec::new()] {
        let error = open([b"\x80\x03", &tensor(&bytes(&inner), 4)[..], b"."].concat()).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error}");
    }
    let archive = open([b"\x80\x03", &tensor(&bytes(b"PK\x03\x04rest"), 4)[..], b"."].concat()).unwrap_err();
    assert!(matches!(archive, Error::Unsupported(_)), "{archive}");
    // A file inside the file inside the file.
    let nested = [START, b"\x80\x03", &tensor(&bytes(&good), 4), b".\x80\x02]."].concat();
    let error = open([b"\x80\x03", &tensor(&bytes(&nested), 4)[..], b"."].concat()).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
}

/// Bytes as Python 3 writes them by protocol 1 and 2.
fn letters(bytes: &[u8], encoding: &str) -> Vec<u8> {
    let text: String = bytes.iter().map(|&it| char::from(it)).collect();
    let encoding = [b"X", &(encoding.len() as u32).to_le_bytes()[..], encoding.as_bytes()].concat();
    let text = [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    [b"c_codecs\nencode\n", &text[..], &encoding, b"\x86R"].concat()
}

/// A legacy file that is one storage of floats, all of whose bytes are two in UTF-8.
fn high_storage(n_elems: u32) -> Vec<u8> {
    let mut bytes = storage(n_elems);
    let first = bytes.len() - 4 * n_elems as usize;
    bytes[first..].fill(0xE7);
    bytes
}

#[test]
fn storages_and_arrays_that_stand_as_text_are_files_of_their_own_however_long_they_are() {
    let (short, low, high) = (high_storage(4), storage(20_000), high_storage(20_000));
    let items = [
        &b"U\x01a"[..],
        &tensor(&letters(&short, "latin1"), 4),
        b"U\x01b",
        &tensor(&letters(&low, "latin-1"), 200),
        b"U\x01c",
        &tensor(&letters(&high, "Latin1"), 200),
        b"U\x01d",
        &array("f4", b'>', &[2], 0x89, &letters(&[1, 0xFF, 3, 4, 5, 6, 7, 8], "latin1")),
    ];
    let pickle = [b"\x80\x02}(", &items.concat()[..], b"u."].concat();
    let checkpoint = open(pickle.clone()).unwrap();
    assert_eq!(checkpoint.warnings, []);
    assert_eq!(checkpoint.files.len(), 5);
    let mut n_seen = 0;
    for (name, bytes, head_bytes) in
        [("a", &short, 16), ("b", &low, 80_000), ("c", &high, 80_000), ("d", &vec![0; 8], 8)]
    {
        let storage = storage_of(&checkpoint, name);
        let file = checkpoint.file(storage.file);
        assert_eq!((file.len_bytes, storage.len_bytes), (bytes.len() as u64, head_bytes), "{name}");
        assert_eq!(storage.start_byte, file.len_bytes - storage.len_bytes);
        let packed = file.packed.as_ref().unwrap();
        assert_eq!(packed.file_len_bytes, pickle.len() as u64);
        let text = &pickle[packed.start_byte as usize..][..packed.len_bytes as usize];
        assert_eq!(std::str::from_utf8(text).unwrap().chars().count() as u64, file.len_bytes);
        n_seen += storage.file.0;
    }
    assert!(n_seen == 1 + 2 + 3 + 4 && storage_of(&checkpoint, "d").swapped);
    for len in 0..pickle.len().min(2000) {
        assert!(open(pickle[..len].to_vec()).is_err(), "{len}");
    }
}

#[test]
fn text_that_several_objects_share_is_one_file() {
    let letters = letters(&[1, 2, 3, 200], "latin1");
    let shared = [&letters[..], b"q\x01"].concat();
    let array = |data: &[u8], n: u8| array("i1", b'|', &[n], 0x89, data);
    let items = [&array(&shared, 4)[..], &array(b"h\x01", 4)].concat();
    let checkpoint = open([b"\x80\x02](", &items[..], b"e."].concat()).unwrap();
    assert_eq!((checkpoint.tensors.len(), checkpoint.files.len()), (2, 2));
    let items = [&array(&shared, 4)[..], &array(b"h\x01", 3)].concat();
    let error = open([b"\x80\x02](", &items[..], b"e."].concat()).unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
}

#[test]
fn text_that_holds_no_storage_or_no_latin_1_ends_in_an_error() {
    let good = high_storage(4);
    let long = high_storage(40_000);
    let mut damaged = good.clone();
    damaged[5] = 0;
    let mut other_count = long.clone();
    let at = long.len() - 160_000 - 8;
    other_count[at] ^= 1;
    for inner in [
        &damaged[..],
        &good[..good.len() - 1],
        &[&good[..], b"more"].concat(),
        b"",
        b"\x80",
        &other_count,
        &long[..60_000],
    ] {
        let error = open([b"\x80\x02", &tensor(&letters(inner, "latin1"), 4)[..], b"."].concat());
        assert!(matches!(error, Err(Error::Corrupt(_))), "{error:?}");
    }
    for (inner, encoding) in [(&good[..], "utf-8"), (&good, "rot13"), (b"PK\x03\x04rest", "latin1")] {
        let error = open([b"\x80\x02", &tensor(&letters(inner, encoding), 4)[..], b"."].concat());
        assert!(matches!(error, Err(Error::Unsupported(_))), "{error:?}");
    }
    // The euro sign is none of the 256.
    let text = b"c_codecs\nencode\nX\x06\0\0\0\xe2\x82\xacabcX\x06\0\0\0latin1\x86R";
    let error = open([b"\x80\x02", &tensor(text, 4)[..], b"."].concat()).unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
}

#[test]
fn what_only_looks_like_a_plain_pickle_is_named() {
    let unpacked = b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ.";
    let error = open(unpacked.to_vec()).unwrap_err();
    assert!(error.hint().contains("data.pkl"), "{error}: {}", error.hint());
    let joblib = b"\x80\x03cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}b\0\0\0\0";
    assert!(open(joblib.to_vec()).unwrap_err().to_string().contains("joblib"));
    let checkpoint = open(b"\x80\x03}.more".to_vec()).unwrap();
    let after = "the end of the pickle";
    assert_eq!(checkpoint.warnings, [Warning::TrailingBytes { after, len_bytes: 4 }]);
}

/// An array of NumPy; `order` is Python's `False` or `True`.
fn array(dtype: &str, byte_order: u8, shape: &[u8], order: u8, data: &[u8]) -> Vec<u8> {
    let name = [b"U", &[dtype.len() as u8][..], dtype.as_bytes()].concat();
    let dtype = [
        b"cnumpy\ndtype\n",
        &name[..],
        b"\x89\x88\x87R(K\x03U\x01",
        &[byte_order],
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb",
    ];
    let shape: Vec<u8> = shape.iter().flat_map(|&it| [b'K', it]).collect();
    let state = [b"(K\x01(", &shape[..], b"t", &dtype.concat(), &[order], data, b"tb"].concat();
    [&b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"[..], &state].concat()
}

#[test]
fn arrays_are_listed_as_they_stand() {
    let data = bytes(&[1; 24]);
    let buffer = [
        &b"cnumpy._core.numeric\n_frombuffer\n("[..],
        &[b"\x96", &6u64.to_le_bytes()[..], &[2; 6]].concat(),
        b"cnumpy\ndtype\nU\x02i1\x85R",
        b"K\x02K\x03\x86U\x01CtR",
    ]
    .concat();
    let wrapped = [
        &b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n("[..],
        &array("f4", b'<', &[6], 0x89, &data),
        b"ctorch\nfloat32\nU\x03xla\x89tR",
    ]
    .concat();
    let items: Vec<(&[u8], Vec<u8>)> = vec![
        (b"c", array("f4", b'<', &[2, 3], 0x89, &data)),
        (b"f", array("f8", b'>', &[3, 1], 0x88, &data)),
        (b"b", buffer),
        (b"w", wrapped),
        (b"o", array("O8", b'|', &[1], 0x89, b"]N\x61")),
        (b"l", array("f4", b'<', &[1], 0x89, b"c_codecs\nencode\nX\x05\0\0\0\xc2\x80abcU\x06latin1\x86R")),
        (b"e", array("f4", b'<', &[0, 3], 0x89, b"c__builtin__\nbytes\n)R")),
    ];
    let items: Vec<u8> = items.iter().flat_map(|(key, value)| [&b"U\x01"[..], key, value].concat()).collect();
    let pickle = [b"\x80\x05}(", &items[..], b"u."].concat();
    let checkpoint = open(pickle).unwrap();
    let names: Vec<&str> = checkpoint.tensors.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["c", "f", "b", "w", "l", "e"]);
    let layout = |name: &str| &checkpoint.tensors.iter().find(|it| it.name == name).unwrap().layout;
    assert_eq!(
        (layout("c").dtype(), layout("c").shape(), layout("c").stride()),
        (DType::F32, &[2, 3][..], &[3, 1][..])
    );
    assert_eq!(
        (layout("f").dtype(), layout("f").shape(), layout("f").stride()),
        (DType::F64, &[3, 1][..], &[1, 3][..])
    );
    assert_eq!((layout("b").dtype(), layout("b").shape()), (DType::I8, &[2, 3][..]));
    assert!(storage_of(&checkpoint, "f").swapped && !storage_of(&checkpoint, "c").swapped);
    assert_eq!(layout("e").n_elems(), 0);
    let warnings: Vec<String> = checkpoint.warnings.iter().map(ToString::to_string).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("`o`"), "{warnings:?}");
}

#[test]
fn arrays_that_lie_about_their_length_are_corrupt() {
    for (shape, len) in [(&[2, 3][..], 23), (&[2, 3], 25), (&[255; 9], 24), (&[], 0)] {
        let pickle = [b"\x80\x03", &array("f4", b'<', shape, 0x89, &bytes(&vec![1; len]))[..], b"."].concat();
        let error = open(pickle).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error}");
    }
}
