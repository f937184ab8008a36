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

#[test]
fn bytes_as_latin_1_text_are_named() {
    let text = b"c_codecs\nencode\nX\x02\0\0\0\xc2\x80X\x06\0\0\0latin1\x86R";
    let error = open([b"\x80\x02", &tensor(text, 4)[..], b"."].concat()).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains("Latin-1"), "{error}");
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
    assert_eq!(names, ["c", "f", "b", "w", "e"]);
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
    assert!(
        warnings.iter().any(|it| it.contains("`o`")) && warnings.iter().any(|it| it.contains("Latin-1")),
        "{warnings:?}"
    );
}

#[test]
fn arrays_that_lie_about_their_length_are_corrupt() {
    for (shape, len) in [(&[2, 3][..], 23), (&[2, 3], 25), (&[255; 9], 24), (&[], 0)] {
        let pickle = [b"\x80\x03", &array("f4", b'<', shape, 0x89, &bytes(&vec![1; len]))[..], b"."].concat();
        let error = open(pickle).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error}");
    }
}
