//! Archives by hand with what is no plain tensor of a state dict: packed weights of quantised modules, parameters without a
//! shape, packed elements, keys of bytes, exported programs.

use super::tests::{archive, key, names, open, open_records, tensor, utils};
use crate::{
    checkpoint::{Checkpoint, CompositeKind},
    error::Error,
    format::{OpenOptions, folder},
    tensor::Backing,
};
use std::fs;

fn warnings(checkpoint: &Checkpoint) -> String {
    checkpoint.warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// An object of C++ as PyTorch pickles it.
fn script_object(class: &str, state: &[u8]) -> Vec<u8> {
    let name = key(&format!("__torch__.torch.classes.{class}"));
    [b"ctorch\nScriptObject\n)\x81", state, &name, b"\x86b"].concat()
}

/// A module with these attributes, and modules in it.
fn module(attributes: &[u8], modules: &[u8]) -> Vec<u8> {
    let parts = [&key("_parameters")[..], b"}", &key("_buffers"), b"}", &key("_modules"), modules].concat();
    [b"cmy\nModule\n)\x81}(", &parts[..], attributes, b"ub"].concat()
}

#[test]
fn packed_weights_of_whole_modules_are_named_as_in_their_state_dict() {
    let pair = [&tensor(0, 4)[..], &tensor(1, 2), b"\x86"].concat();
    let linear = script_object("quantized.LinearPackedParamsBase", &pair);
    let weights = module(&[&key("_packed_params")[..], &linear, &key("extra"), &tensor(0, 1)].concat(), b"}");
    let modules = [b"}", &key("_packed_params")[..], &weights, b"s"].concat();
    let fc = module(&[&key("scale")[..], b"G\x3f\xf0\0\0\0\0\0\0"].concat(), &modules);
    let embedding = [b"(K\x01](", &tensor(0, 3)[..], b"e]]K\x08at"].concat();
    let embedding = script_object("quantized.EmbeddingPackedParamsBase", &embedding);
    let embedding = module(&[&key("_packed_weight")[..], &embedding].concat(), b"}");
    let other = module(&[&key("thing")[..], &script_object("mine.Thing", &tensor(0, 2))].concat(), b"}");
    let modules = [b"}(", &key("fc")[..], &fc, &key("emb"), &embedding, &key("other"), &other, b"u"];
    let checkpoint = open(&[&module(b"", &modules.concat())]).unwrap();
    let expected =
        ["fc._packed_params._packed_params.0", "fc._packed_params._packed_params.1", "emb._packed_weight"];
    assert_eq!(names(&checkpoint), expected);
    let warnings = warnings(&checkpoint);
    assert!(warnings.contains("`fc._packed_params.extra`, which is not in the module's state"), "{warnings}");
    assert!(warnings.contains("`other.thing`"), "{warnings}");
    assert_eq!(warnings.matches("scales and zero points").count(), 1, "{warnings}");
    assert!(!warnings.contains("ScriptObject"), "{warnings}");
}

#[test]
fn quantised_convolutions_are_named_as_in_their_state_dict() {
    let convolution = |class: &str, others: &[u8]| {
        let state = [b"(K\x01K\x02", &others.repeat(8)[..], &tensor(0, 4), b"N", b"K\x01K\0\x89t"].concat();
        [b"ctorch.ao.nn.quantized.modules.conv\n", class.as_bytes(), b"\n)\x81", &state, b"b"].concat()
    };
    let within = |conv: &[u8]| module(b"", &[b"}", &key("0")[..], conv, b"s"].concat());
    let checkpoint = open(&[&within(&convolution("Conv2d", b"K\x01K\x01\x86"))]).unwrap();
    assert_eq!(names(&checkpoint), ["0.weight"]);
    assert!(warnings(&checkpoint).contains("scales and zero points"), "{}", warnings(&checkpoint));
    // What is no such tuple after all keeps all that it has, by its places.
    let checkpoint = open(&[&within(&convolution("Conv2d", &tensor(0, 1)))]).unwrap();
    assert_eq!(checkpoint.tensors.len(), 9);
    let checkpoint = open(&[&within(&convolution("Other", b"N"))]).unwrap();
    assert_eq!(names(&checkpoint), ["0.10"]);
}

#[test]
fn parameters_of_lazy_modules_are_said_to_have_no_shape() {
    let lazy = b"ctorch.nn.parameter\nUninitializedParameter\n\x88\x85R";
    let checkpoint = open(&[b"}(", &key("w"), &tensor(0, 1), &key("lazy.bias"), lazy, b"u"]).unwrap();
    assert_eq!(names(&checkpoint), ["w"]);
    let [warning] = &checkpoint.warnings[..] else { panic!("{:?}", checkpoint.warnings) };
    let warning = warning.to_string();
    assert!(warning.contains("`lazy.bias`") && warning.contains("no shape"), "{warning}");
}

/// A quantised tensor with two elements a byte, of four bytes.
fn nibbles(size: &[u8], stride: &[u8]) -> Vec<u8> {
    let storage = b"(X\x07\0\0\0storagectorch\nQUInt4x2Storage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ";
    let quantiser = b"ctorch\nper_tensor_affine\nG\x3f\xe0\0\0\0\0\0\0K\x02\x87";
    utils("_rebuild_qtensor", &[storage, b"K\0", size, stride, quantiser, b"\x89N"])
}

#[test]
fn a_part_of_packed_elements_is_left_out_and_not_the_file_with_it() {
    let whole = nibbles(b"K\x04K\x08\x86", b"K\x08K\x01\x86");
    let turned = nibbles(b"K\x08K\x04\x86", b"K\x01K\x08\x86");
    let items = [&key("q")[..], &whole, &key("t"), &turned, &key("w"), &tensor(0, 4)].concat();
    let checkpoint = open(&[b"}(", &items, b"u"]).unwrap();
    assert_eq!((names(&checkpoint), checkpoint.composites.len()), (vec!["q", "w"], 1));
    let warnings = warnings(&checkpoint);
    assert!(warnings.contains("tensor `t`") && warnings.contains("int_repr"), "{warnings}");
    let beyond = nibbles(b"K\x04K\x09\x86", b"K\x09K\x01\x86");
    assert!(matches!(open(&[b"}", &key("q"), &beyond, b"s"]).unwrap_err(), Error::Corrupt(_)));
}

#[test]
fn keys_of_bytes_have_one_name_in_all_protocols() {
    let encoded =
        |letters: &str| [b"c_codecs\nencode\n", &key(letters)[..], &key("latin1"), b"\x86R"].concat();
    let of_two =
        [b"}(", &encoded("w.\u{c3}\u{a4}")[..], &tensor(0, 1), &encoded("\u{ff}"), &tensor(0, 2), b"u"]
            .concat();
    let of_two = open(&[&of_two]).unwrap();
    let of_three = [b"}(C\x04w.\xc3\xa4", &tensor(0, 1)[..], b"C\x01\xff", &tensor(0, 2), b"u"].concat();
    let of_three = open(&[&of_three]).unwrap();
    assert_eq!(names(&of_two), names(&of_three));
    assert_eq!(names(&of_two), ["w.\u{e4}", "\u{ff}"]);
    let empty = open(&[b"}(", &key("a"), b"}c__builtin__\nbytes\n)R", &tensor(0, 1), b"su"]).unwrap();
    assert_eq!(names(&empty), ["a."]);
    // Whatever else is called is no key that can be named.
    let object = open(&[b"}(c_codecs\nencode\n", &key("a"), &key("rot13"), b"\x86R", &tensor(0, 1), b"u"]);
    assert_eq!(names(&object.unwrap()), ["<object>"]);
}

#[test]
fn exported_programs_are_named_and_say_what_to_save() {
    let archives: [&[&str]; 4] = [
        &["m/archive_format", "m/models/model.json", "m/data/weights/weight_0", "m/.data/version"],
        &["m/models/model.json", "m/data/weights/weight_0"],
        &["m/data/aotinductor/model/a.so"],
        &["serialized_exported_program.json", "serialized_state_dict.pt", "version"],
    ];
    for records in archives {
        let records: Vec<(&str, &[u8])> = records.iter().map(|it| (*it, &b"3"[..])).collect();
        let error = open_records(&records).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{records:?}: {error}");
        assert!(error.to_string().contains("torch.export") && error.hint().contains("state_dict"), "{error}");
    }
    // A checkpoint may have any folder, and other records.
    let pickle = [b"\x80\x02", &tensor(0, 4)[..], b"."].concat();
    for root in ["models", "data"] {
        let named = |it: &str| format!("{root}/{it}");
        let [data, storage, more] = [named("data.pkl"), named("data/0"), named("models/x")];
        let records: Vec<(&str, &[u8])> = vec![(&data, &pickle), (&storage, &[0; 16]), (&more, b"")];
        assert_eq!(open_records(&records).unwrap().tensors.len(), 1);
    }
}

/// A sparse tensor of two floats.
fn sparse() -> Vec<u8> {
    let layout = [b"ctorch.serialization\n_get_layout\n", &key("torch.sparse_coo")[..], b"\x85R"].concat();
    let indices = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nLongStorage\nX\x01\0\0\x001X\x03\0\0\0cpuK\x02tQK\0K\x01K\x02\x86K\x02K\x01\x86\x89ccollections\nOrderedDict\n)RtR";
    utils("_rebuild_sparse_tensor", &[&layout, b"(", indices, &tensor(0, 2), b"K\x05\x85t"])
}

fn write(path: &std::path::Path, value: &[u8]) {
    let pickle = [b"\x80\x02", value, b"."].concat();
    let records: [(&str, &[u8]); 4] =
        [("x/data.pkl", &pickle), ("x/data/0", &[0; 16]), ("x/data/1", &[0; 16]), ("x/version", b"3\n")];
    fs::write(path, archive(&records)).unwrap();
}

#[test]
fn a_tensor_of_several_parts_may_have_a_file_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("a.w.pt"), &sparse());
    write(&dir.path().join("b.pt"), &tensor(0, 4));
    let (checkpoint, _) = folder::open(dir.path(), &OpenOptions::default()).unwrap();
    assert_eq!(names(&checkpoint), ["a.w.indices", "a.w.values", "b"]);
    let [composite] = &checkpoint.composites[..] else { panic!("{:?}", checkpoint.composites) };
    assert_eq!((&*composite.name, composite.parts.clone()), ("a.w", 0..2));
    assert!(matches!(composite.kind, CompositeKind::Sparse { .. }));
    assert!(checkpoint.tensors.iter().all(|it| it.backing != Backing::Meta));

    write(&dir.path().join("a.w.values.pt"), &tensor(0, 4));
    let error = folder::open(dir.path(), &OpenOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)) && error.to_string().contains("`a.w.values`"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("two.pth"), &[b"(", &tensor(0, 4)[..], &sparse(), b"t"].concat());
    let error = folder::open(dir.path(), &OpenOptions::default()).unwrap_err();
    assert!(error.hint().contains("open `two.pth`"), "{}", error.hint());
}
