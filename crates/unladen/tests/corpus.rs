//! Opens every file of the corpora: `samples/` must give what its `expected.json` says, `hostile/` must end as its
//! `expected.json` says. Roots: `tests/fixtures`, and the folder in the environment variable `UNLADEN_CORPUS`.

#![allow(clippy::print_stderr)]

use proptest::prelude::*;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};
use unladen::{
    Checkpoint, Error, Format,
    format::{open, parse},
    source::{FileSet, FileSource, MemorySource, ReadAt as _},
    stamp::FileStamp,
    tensor::{Backing, Block, Side, TensorId, Window},
};

/// Elements that are gathered at a time.
const WINDOW_ELEMS: u64 = 1 << 16;
/// Bytes of one tensor that are read at most: some hostile files claim terabytes.
const MAX_READ_BYTES: u64 = 1 << 20;

/// What this version says it does not read, by a word of its message.
const LATER: [&str; 5] = ["deflated", "legacy", "tar archive", "plain pickle", "protocol 0/1"];

fn roots() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let corpus = std::env::var_os("UNLADEN_CORPUS").map(PathBuf::from);
    if corpus.is_none() {
        eprintln!("UNLADEN_CORPUS is not set: the large corpus is not tested");
    }
    [Some(fixtures), corpus].into_iter().flatten().filter(|it| it.is_dir()).collect()
}

/// The entries of `expected.json` in a folder of every root that has one, with the files' paths.
fn expected(folder: &str) -> Vec<(PathBuf, Value)> {
    let mut entries = Vec::new();
    for root in roots() {
        let folder = root.join(folder);
        let Ok(text) = fs::read_to_string(folder.join("expected.json")) else { continue };
        let Value::Object(files) = serde_json::from_str(&text).unwrap() else {
            panic!("{}", folder.display())
        };
        entries.extend(files.into_iter().map(|(name, value)| (folder.join(name), value)));
    }
    entries
}

/// Row-major, resolved bytes of a tensor, at most [`MAX_READ_BYTES`] of them.
fn bytes_of(checkpoint: &Checkpoint, files: &FileSet, id: TensorId) -> Result<Vec<u8>, Error> {
    let layout = &checkpoint.tensor(id).layout;
    let elem_bytes = layout.dtype().size_bytes();
    let mut bytes = Vec::new();
    for window in Window::in_order(layout.shape(), WINDOW_ELEMS) {
        let mut part = vec![0; (window.shape.iter().product::<u64>() * elem_bytes) as usize];
        for piece in checkpoint.pieces(id) {
            let Some(mut block) = Block::within(piece.layout, piece.at, &window) else { continue };
            let storage = checkpoint.storage_of(&piece);
            let first_byte = block.source_byte;
            let mut source = vec![0; block.span_bytes(Side::Source) as usize];
            let file = files.get(storage.file.0 as usize)?;
            file.read_exact_at(storage.start_byte + first_byte, &mut source)?;
            block.source_byte = 0;
            block.gather(&source, &mut part);
            piece.resolve.apply(layout.dtype(), &mut part);
        }
        bytes.extend(part);
        if bytes.len() as u64 > MAX_READ_BYTES {
            break;
        }
    }
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|it| format!("{it:02x}")).collect()
}

fn is_later_work(error: &Error) -> bool {
    matches!(error, Error::Unsupported(_)) && LATER.iter().any(|it| error.to_string().contains(it))
}

/// One line for each difference between a checkpoint and what it should be.
fn differences(path: &Path, expected: &Value) -> Vec<String> {
    let (checkpoint, files) = match open(path) {
        Ok(opened) => opened,
        Err(error) if is_later_work(&error) => return Vec::new(),
        Err(error) => return vec![format!("{}: {error}", path.display())],
    };
    let resolved: Vec<&str> =
        expected["differences"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let line = |name: &str, it: &Value, hash: &Value| {
        let stride = it.get("stride").map(Value::to_string).unwrap_or_default();
        format!("{name:?} {} {} {stride} {hash}", it["dtype"], it["shape"])
    };
    // What PyTorch itself listed stands in for a missing list; it has no strides, and no bytes of meta tensors.
    let listed = expected["tensors"].as_array().filter(|it| !it.is_empty());
    let theirs: Vec<String> = match (listed, &expected["torch"]) {
        (Some(tensors), torch) => { tensors.iter() }
            .map(|it| {
                let name = it["name"].as_str().unwrap();
                line(name, it, if resolved.contains(&name) { &torch[name]["sha256"] } else { &it["sha256"] })
            })
            .collect(),
        (None, Value::Object(torch)) => {
            torch.iter().map(|(name, it)| line(name, it, &it["sha256"])).collect()
        }
        (None, _) => return Vec::new(),
    };
    let mut found = Vec::new();
    let ours: Vec<String> = checkpoint
        .iter()
        .map(|(id, tensor)| {
            let layout = &tensor.layout;
            let hash = match tensor.backing {
                Backing::Meta => Value::Null,
                _ => hex(&Sha256::digest(bytes_of(&checkpoint, &files, id).unwrap())).into(),
            };
            let mut it = serde_json::json!({ "dtype": layout.dtype().name(), "shape": layout.shape() });
            if listed.is_some() {
                it["stride"] = layout.stride().into();
            }
            line(&tensor.name, &it, &hash)
        })
        .collect();
    for (index, line) in ours.iter().enumerate() {
        if theirs.get(index) != Some(line) {
            found.push(format!("{}: ours {line}\n    theirs {:?}", path.display(), theirs.get(index)));
        }
    }
    if ours.len() != theirs.len() {
        found.push(format!("{}: {} tensors, not {}", path.display(), ours.len(), theirs.len()));
    }
    found
}

#[test]
fn every_sample_gives_its_names_shapes_strides_and_bytes() {
    let samples = expected("samples");
    let found: Vec<String> = samples.iter().flat_map(|(path, value)| differences(path, value)).collect();
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

#[test]
fn every_hostile_file_ends_as_it_should() {
    let mut wrong = Vec::new();
    for (path, outcome) in expected("hostile") {
        let start = Instant::now();
        let result = open(&path).and_then(|(checkpoint, files)| {
            checkpoint.iter().try_for_each(|(id, _)| bytes_of(&checkpoint, &files, id).map(drop))
        });
        let seconds = start.elapsed().as_secs_f64();
        let text = match &result {
            Ok(()) => "load".to_owned(),
            Err(error) => format!("error: {error}\n    hint: {}", error.hint()),
        };
        eprintln!("{} ({seconds:.3} s) {text}", path.file_name().unwrap().display());
        let right = match (outcome.as_str().unwrap(), &result) {
            ("either", _) | ("load", Ok(())) | ("error", Err(_)) => true,
            ("load", Err(error)) => is_later_work(error),
            _ => false,
        };
        if !right {
            wrong.push(format!("{} should be {outcome}, is {text}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_shard_opens_by_itself() {
    for root in roots() {
        for name in
            ["sharded/model-00001-of-00002.safetensors", "sharded_bin/pytorch_model-00001-of-00002.bin"]
        {
            let path = root.join("samples").join(name);
            if path.exists() {
                let (checkpoint, files) = open(&path).unwrap();
                assert!(!checkpoint.tensors.is_empty());
                for (id, tensor) in checkpoint.iter() {
                    let bytes = bytes_of(&checkpoint, &files, id).unwrap();
                    assert_eq!(bytes.len() as u64, tensor.layout.len_bytes());
                }
            }
        }
        for name in ["sharded", "sharded_bin"] {
            let path = root.join("samples").join(name);
            if path.exists() {
                assert!(open(&path).unwrap_err().to_string().contains("sharded"));
            }
        }
    }
}

#[test]
fn the_zip_crate_finds_the_same_payloads() {
    for (path, value) in expected("samples") {
        let Some(keys) = value["tensors"].as_array().filter(|_| value["container"] == "zip") else {
            continue;
        };
        let Ok((checkpoint, _)) = open(&path) else { continue };
        let mut oracle = zip::ZipArchive::new(fs::File::open(&path).unwrap()).unwrap();
        let root = value["root"].as_str().unwrap();
        for (tensor, key) in checkpoint.tensors.iter().zip(keys) {
            let Backing::Storage(storage) = tensor.backing else { continue };
            let record = format!("{root}/data/{}", key["storage"].as_str().unwrap());
            let record = oracle.by_name(&record).unwrap();
            let storage = &checkpoint.storages[storage.0 as usize];
            assert_eq!((Some(storage.start_byte), storage.len_bytes), (record.data_start(), record.size()));
        }
    }
}

/// The bytes of every sample that opens.
fn good_samples() -> Vec<(PathBuf, Vec<u8>)> {
    let paths = expected("samples").into_iter().map(|(path, _)| path);
    let shards = roots().into_iter().map(|it| it.join("samples/sharded/model-00001-of-00002.safetensors"));
    { paths }
        .chain(shards)
        .filter(|it| open(it).is_ok())
        .map(|it| {
            let bytes = fs::read(&it).unwrap();
            (it, bytes)
        })
        .collect()
}

fn parse_bytes(path: &Path, bytes: Vec<u8>) -> Result<Checkpoint, Error> {
    let len_bytes = bytes.len() as u64;
    let stamp = FileStamp { path: path.to_owned(), dev: 0, ino: 0, len_bytes, mtime_ns: 0 };
    parse(&MemorySource::new(path, bytes), stamp)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn damage_of_any_kind_ends_in_an_error_or_a_valid_checkpoint(
        sample in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        thread_local!(static SAMPLES: Vec<(PathBuf, Vec<u8>)> = good_samples());
        SAMPLES.with(|samples| {
            if samples.is_empty() {
                return Ok(());
            }
            let (path, mut bytes) = sample.get(samples).clone();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                let len = cut.index(bytes.len());
                bytes.truncate(len);
            }
            match parse_bytes(&path, bytes) {
                Ok(checkpoint) => prop_assert!(checkpoint.validate().is_ok()),
                Err(error) => prop_assert!(!error.to_string().is_empty() && !error.hint().is_empty()),
            }
            Ok(())
        })?;
    }
}

#[test]
fn a_file_and_its_bytes_in_memory_read_the_same() {
    for (path, bytes) in good_samples() {
        let source = FileSource::open(&path).unwrap();
        let ours = parse(&source, source.stamp().clone()).unwrap();
        let memory = parse_bytes(&path, bytes).unwrap();
        assert_eq!((ours.tensors, ours.storages), (memory.tensors, memory.storages));
        assert!(matches!(ours.format, Format::Pth | Format::Safetensors));
    }
}
