//! Archives around pickles by hand: names, ties, modules, and what must be refused.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::{dtype::DType, error::Error, source::MemorySource, tensor::Backing};
use std::{
    io::{Cursor, Write as _},
    path::PathBuf,
};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// A `_rebuild_tensor_v2` call on storage `0`, four floats.
pub(super) fn tensor(offset: u8, size: u8) -> Vec<u8> {
    let start = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQK";
    [start, &[offset, b'K', size, 0x85, b'K', 1, 0x85, 0x89][..], b"ccollections\nOrderedDict\n)RtR"].concat()
}

pub(super) fn key(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

pub(super) fn archive(records: &[(&str, &[u8])]) -> Vec<u8> {
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in records {
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

pub(super) fn open_records(records: &[(&str, &[u8])]) -> Result<Checkpoint> {
    let bytes = archive(records);
    let len_bytes = bytes.len() as u64;
    let stamp =
        FileStamp { path: PathBuf::from("x.pt"), dev: 0, ino: 0, len_bytes, mtime_ns: 0, packed: None };
    crate::format::parse(&MemorySource::new("x.pt", bytes), stamp, &OpenOptions::default())
}

pub(super) fn open(parts: &[&[u8]]) -> Result<Checkpoint> {
    let pickle = [b"\x80\x02", &parts.concat()[..], b"."].concat();
    open_records(&[("x/data.pkl", &pickle), ("x/data/0", &[0; 16]), ("x/version", b"3\n")])
}

pub(super) fn names(checkpoint: &Checkpoint) -> Vec<&str> {
    checkpoint.tensors.iter().map(|it| it.name.as_str()).collect()
}

#[test]
fn a_tensor_with_attributes_is_found_wherever_it_stands() {
    let start = b"ctorch._utils\n_rebuild_parameter_with_state\n(";
    let parameter =
        [start, &tensor(0, 2)[..], b"\x88ccollections\nOrderedDict\n)R}", &key("note"), b"NstRq\x01"]
            .concat();
    let checkpoint = open(&[b"}(", &key("a"), &parameter, &key("b"), b"h\x01", b"u"]).unwrap();
    assert_eq!(names(&checkpoint), ["a", "b"]);
}

#[test]
fn no_tensor_is_lost_where_names_collide() {
    let nested = [b"}", &key("b")[..], &tensor(0, 3), b"s"].concat();
    let items: [&[u8]; 8] =
        [b"K\0", &tensor(0, 1), &key("0"), &tensor(0, 2), &key("a"), &nested, &key("a.b"), &tensor(0, 4)];
    let checkpoint = open(&[b"}(", &items.concat(), b"u"]).unwrap();
    assert_eq!(names(&checkpoint), ["0", "0~2", "a.b", "a.b~2"]);
    let sizes: Vec<u64> = checkpoint.tensors.iter().map(|it| it.layout.n_elems()).collect();
    assert_eq!(sizes, [1, 2, 3, 4]);
    let places: Vec<String> = checkpoint.warnings.iter().map(ToString::to_string).collect();
    assert!(places[0].contains("\\'0\\'") || places[0].contains("['0']"), "{places:?}");
}

#[test]
fn one_object_under_two_names_is_a_tie() {
    let first = [&tensor(1, 2)[..], b"q\x09"].concat();
    let checkpoint = open(&[b"}(", &key("a"), &first, &key("b"), b"h\x09", b"u"]).unwrap();
    assert_eq!(names(&checkpoint), ["a", "b"]);
    assert_eq!(checkpoint.tensors[0].layout, checkpoint.tensors[1].layout);
    assert_eq!(checkpoint.tensors[0].backing, checkpoint.tensors[1].backing);
    assert_eq!(checkpoint.storages.len(), 1);
}

#[test]
fn modules_are_named_as_their_state_dict_names_them() {
    let inner_buffers = [b"}(", &key("b")[..], &tensor(0, 1), &key("t"), &tensor(0, 2), b"u"].concat();
    let transient = [b"c__builtin__\nset\n]", &key("t")[..], b"a\x85R"].concat();
    let attributes = [
        b"}(",
        &key("_buffers")[..],
        &inner_buffers,
        &key("_parameters"),
        &[b"}", &key("w")[..], &tensor(0, 3), b"s"].concat(),
        &key("_modules"),
        b"}",
        &key("_non_persistent_buffers_set"),
        &transient,
        &key("extra"),
        &tensor(0, 4),
        b"u",
    ]
    .concat();
    let inner = [b"cmy\nLayer\n)\x81", &attributes[..], b"b"].concat();
    let modules = [b"}", &key("0")[..], &inner, b"s"].concat();
    let checkpoint =
        open(&[b"cmy\nNet\n)\x81}(", &key("_parameters"), b"}", &key("_modules"), &modules, b"ub"]).unwrap();
    assert_eq!(names(&checkpoint), ["0.w", "0.b"]);
    let warnings: Vec<String> = checkpoint.warnings.iter().map(ToString::to_string).collect();
    assert!(warnings[0].contains("my.Layer, my.Net"), "{warnings:?}");
    assert!(warnings[1].contains("`0.t`") && warnings[2].contains("`0.extra`"), "{warnings:?}");
}

#[test]
fn parameters_by_class_and_tensors_of_the_first_releases_are_read() {
    let parameter = [b"ctorch.nn.parameter\nParameter\n)\x81(", &tensor(0, 2)[..], b"\x88Ntb"].concat();
    let old = b"ctorch\nFloatTensor\n)R((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQK\0K\x04\x85K\x01\x85tb";
    let checkpoint = open(&[b"](", &parameter, old, b"e"]).unwrap();
    assert_eq!(names(&checkpoint), ["0", "1"]);
    assert!(checkpoint.tensors.iter().all(|it| it.layout.dtype() == DType::F32));
    assert!(matches!(checkpoint.tensors[1].backing, Backing::Storage(_)));
}

#[test]
fn shared_containers_without_tensors_cost_nothing_and_with_them_are_bounded() {
    let double = |leaf: &[u8]| [leaf, &b"2\x86".repeat(60)].concat();
    assert!(open(&[&double(b"]")]).unwrap().tensors.is_empty());
    let error = open(&[&double(&tensor(0, 1))]).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
}

#[test]
fn cycles_end_and_are_told() {
    let checkpoint = open(&[b"}q\x09(", &key("w"), &tensor(0, 1), &key("self"), b"h\x09u"]).unwrap();
    assert_eq!(names(&checkpoint), ["w"]);
    assert!(checkpoint.warnings[0].to_string().contains("`self`"));
}

#[test]
fn records_decide_about_version_byte_order_and_root() {
    let pickle = [b"\x80\x02", &tensor(0, 4)[..], b"."].concat();
    let good: Vec<(&str, &[u8])> =
        vec![("x/data.pkl", &pickle), ("x/data/0", &[0; 16]), ("x/version", b"3\n")];
    let with = |name, bytes| [&good[..], &[(name, bytes)]].concat();
    assert!(!open_records(&good).unwrap().storages[0].swapped);
    assert!(open_records(&with("x/byteorder", b"big")).unwrap().storages[0].swapped);
    assert!(open_records(&with("x/byteorder", b"middle")).is_err());
    assert!(open_records(&with("y/data", b"")).unwrap_err().to_string().contains("`y/data`"));
    assert!(
        open_records(&with("x/model.json", b"{}")).unwrap_err().to_string().contains("PyTorch 1.0 or 1.1")
    );
    assert_eq!(open_records(&good[..2]).unwrap().warnings, [Warning::MissingRecord("version")]);
    let newer = [&good[..2], &[("x/version", &b"11"[..])]].concat();
    assert!(matches!(open_records(&newer).unwrap_err(), Error::Unsupported(_)));
}

#[test]
fn programs_give_their_tensors_and_constants_and_are_left_out_themselves() {
    let inner = [b"c__torch__.torch.nn\nLinear\n)\x81}(", &key("weight")[..], &tensor(0, 4), b"ub"].concat();
    let lists = [b"ctorch.jit._pickle\nbuild_tensorlist\n](", &tensor(0, 2)[..], b"e\x85R"].concat();
    let tagged =
        [b"ctorch.jit._pickle\nrestore_type_tag\n", &lists[..], &key("List[Tensor]"), b"\x86R"].concat();
    let items = [key("fc"), inner, key("extra"), tagged, key("training"), b"\x89".to_vec()].concat();
    let pickle = [b"\x80\x02c__torch__\nNet\n)\x81}(", &items[..], b"ub."].concat();
    let constants = [b"\x80\x02", &tensor(1, 3)[..], b"\x85."].concat();
    let good: Vec<(&str, &[u8])> = vec![
        ("x/data.pkl", &pickle),
        ("x/data/0", &[0; 16]),
        ("x/code/__torch__.py", b"class Net(Module):"),
        ("x/constants/0", &[1; 16]),
        ("x/constants.pkl", &constants),
        ("x/.data/version", b"6"),
    ];
    let checkpoint = open_records(&good).unwrap();
    assert_eq!(names(&checkpoint), ["fc.weight", "extra.0", "constants.0"]);
    assert_eq!((checkpoint.format, checkpoint.storages.len()), (Format::TorchScript, 2));
    assert_eq!(checkpoint.tensors[2].backing, Backing::Storage(StorageId(1)));
    let warnings: Vec<String> = checkpoint.warnings.iter().map(ToString::to_string).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("TorchScript program"), "{warnings:?}");

    let without_bytes = [&good[..3], &good[4..]].concat();
    let error = open_records(&without_bytes).unwrap_err();
    assert!(error.to_string().contains("`x/constants/0`"), "{error}");
    let broken = [&good[..4], &[("x/constants.pkl", &b"\x80\x02("[..])]].concat();
    assert!(matches!(open_records(&broken).unwrap_err(), Error::Corrupt(_)));
}

#[test]
fn storages_must_have_the_size_that_is_claimed() {
    let pickle = [b"\x80\x02", &tensor(0, 4)[..], b"."].concat();
    for len in [0, 15, 17] {
        let bytes = vec![0; len];
        let error = open_records(&[("x/data.pkl", &pickle), ("x/data/0", &bytes)]).unwrap_err();
        assert!(error.to_string().contains("`x/data/0`"), "{error}");
    }
    assert!(open_records(&[("x/data.pkl", &pickle)]).unwrap_err().to_string().contains("no such record"));
}

/// A call of a function of `torch._utils` with these arguments.
pub(super) fn utils(function: &str, args: &[&[u8]]) -> Vec<u8> {
    [b"ctorch._utils\n", function.as_bytes(), b"\n(", &args.concat()[..], b"tR"].concat()
}

#[test]
fn a_cast_that_pytorch_would_make_is_told() {
    let cast = utils(
        "_rebuild_device_tensor_from_cpu_tensor",
        &[&tensor(0, 2), b"ctorch\nbfloat16\nX\x03\0\0\0xla\x89"],
    );
    let checkpoint = open(&[b"}", &key("w"), &cast, b"s"]).unwrap();
    assert_eq!(checkpoint.tensors[0].layout.dtype(), DType::F32);
    assert!(checkpoint.warnings[0].to_string().contains("`w` to bfloat16"), "{:?}", checkpoint.warnings);
    let same = utils(
        "_rebuild_device_tensor_from_cpu_tensor",
        &[&tensor(0, 2), b"ctorch\nfloat32\nX\x03\0\0\0xla\x89"],
    );
    assert_eq!(open(&[b"}", &key("w"), &same, b"s"]).unwrap().warnings, []);
}

#[test]
fn a_parameter_with_attributes_is_found_wherever_it_stands() {
    let attributes = [b"}", &key("note")[..], &key("x"), b"s"].concat();
    let parameter = utils("_rebuild_parameter_with_state", &[&tensor(0, 1), b"\x89N", &attributes]);
    let parameter = [&parameter[..], b"q\x09"].concat();
    let checkpoint =
        open(&[b"}(", &key("a"), &parameter, &key("b"), b"h\x09", &key("c"), b"h\x09u"]).unwrap();
    assert_eq!(names(&checkpoint), ["a", "b", "c"]);
    assert_eq!(checkpoint.first_with_same_bytes().iter().map(|it| it.0).collect::<Vec<_>>(), [0, 0, 0]);
}

#[test]
fn a_subclass_without_data_is_told_and_a_sparse_tensor_of_sparse_parts_refused() {
    let wrapper =
        utils("_rebuild_wrapper_subclass", &[b"cmy\nFake\nctorch\nfloat32\nK\x02\x85K\x01\x85K\0NN\x89"]);
    let checkpoint = open(&[b"}", &key("w"), &wrapper, b"s"]).unwrap();
    assert!(checkpoint.tensors.is_empty() && checkpoint.composites.is_empty());
    let warnings: String = checkpoint.warnings.iter().map(ToString::to_string).collect();
    assert!(warnings.contains("`w` of class my.Fake, without data"), "{warnings}");

    let layout = [b"ctorch.serialization\n_get_layout\n", &key("torch.sparse_coo")[..], b"\x85R"].concat();
    let sparse = |indices: &[u8], values: &[u8]| {
        utils("_rebuild_sparse_tensor", &[&layout, b"(", indices, values, b"K\x02K\x02\x86t"])
    };
    let mut inner = sparse(&tensor(0, 1), &tensor(0, 1));
    // However deep: a part is looked into once.
    for _ in 0..2000 {
        inner = sparse(&inner, &tensor(0, 1));
    }
    let error = open(&[b"}", &key("w"), &inner, b"s"]).unwrap_err();
    assert!(error.to_string().contains("plain tensor"), "{error}");
}

#[test]
fn long_texts_that_are_referred_to_many_times_take_little() {
    let long = [&key(&"x".repeat(200_000))[..], b"q\x090"].concat();
    // A tuple as a key, of one text many times over.
    let tuple = [b"(", &b"h\x09".repeat(100_000)[..], b"t"].concat();
    let checkpoint = open(&[&long, b"}", &tuple, &tensor(0, 1), b"s"]).unwrap();
    assert!(checkpoint.tensors[0].name.len() < 300_000);
    // Paths of it, and a warning for each storage there.
    let storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ";
    let many = [b"](", &[&storage[..], b"q\x08"].concat()[..], &b"h\x08".repeat(200), b"e"].concat();
    let checkpoint = open(&[&long, b"}h\x09", b"}h\x09", &many, b"ss"]).unwrap();
    assert!(checkpoint.warnings.iter().all(|it| it.to_string().len() < 2_000));
    // Names of code.
    let error = open(&[&long, b"h\x09h\x09\x93"]).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
}
