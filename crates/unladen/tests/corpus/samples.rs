//! Good files: their names, shapes, strides and bytes, by every strategy and by reading piece after piece.

use super::{roots, samples};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::{collections::BTreeMap, fs, path::Path};
use unladen::{
    Checkpoint, DType, Format, OpenCheckpoint, Progress, StateDict, Strategy, TensorView,
    checkpoint::CompositeKind,
    contents::{ReadPlan, files_of},
    open,
    plan::DEFAULT_HOST_BUDGET_BYTES,
    tensor::{Backing, Tensor, TensorId},
    verify::{digest, digest_of, hash_tensors},
};

/// Parts that the lists of the samples name by their place among a call's arguments: ours, and theirs behind the tensor's
/// name. `None`: the lists do not have them.
const PARTS: [(&str, Option<&str>); 11] = [
    ("indices", Some("1.0")),
    ("crow_indices", Some("1.0")),
    ("ccol_indices", Some("1.0")),
    ("col_indices", Some("1.1")),
    ("row_indices", Some("1.1")),
    ("buffer", Some("0")),
    ("sizes", Some("1")),
    ("strides", Some("2")),
    ("offsets", Some("3")),
    ("scales", None),
    ("zero_points", None),
];

/// The names that the lists have, by our names where they differ.
fn names_of_lists(checkpoint: &Checkpoint) -> BTreeMap<String, Option<String>> {
    let mut names = BTreeMap::new();
    for composite in &checkpoint.composites {
        let n_parts = composite.parts.len();
        for tensor in composite.part_ids().map(|it| checkpoint.tensor(it)) {
            let start = tensor.name.strip_prefix(&composite.name).unwrap();
            let part = start.trim_start_matches('.');
            let theirs = match (&composite.kind, part) {
                (CompositeKind::Sparse { .. }, "values") => Some(format!("1.{}", n_parts - 1)),
                // The integers of a quantised tensor have its own name.
                (_, "") => continue,
                _ => PARTS.iter().find(|it| it.0 == part).unwrap().1.map(str::to_owned),
            };
            let dot = if composite.name.is_empty() { "" } else { "." };
            names.insert(tensor.name.clone(), theirs.map(|it| format!("{}{dot}{it}", composite.name)));
        }
    }
    names
}

/// The rows that the lists have, by their names.
fn rows_of_lists(rows: &[(String, Row)], names: &BTreeMap<String, Option<String>>) -> Vec<(String, Row)> {
    let renamed = rows.iter().filter_map(|(name, row)| match names.get(name) {
        None => Some((name.clone(), row.clone())),
        Some(theirs) => Some((theirs.clone()?, row.clone())),
    });
    renamed.collect()
}

/// What is known of a tensor.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    dtype: DType,
    shape: Vec<u64>,
    /// Stride and offset in the file, in elements; PyTorch's own list does not say.
    place: Option<(Vec<u64>, u64)>,
    /// Of the resolved bytes in row-major order; a meta tensor has none.
    sha256: Option<String>,
}

impl Row {
    fn of_json(it: &Value) -> Row {
        let numbers = |it: &Value| it.as_array().unwrap().iter().map(|it| it.as_u64().unwrap()).collect();
        Row {
            dtype: DType::from_name(it["dtype"].as_str().unwrap()).unwrap(),
            shape: numbers(&it["shape"]),
            place: it.get("stride").map(|stride| (numbers(stride), it["offset"].as_u64().unwrap())),
            sha256: it["sha256"].as_str().map(str::to_owned),
        }
    }
}

/// The tensors that a sample should have. `None` where their list would be long.
fn rows_of_json(expected: &Value) -> Option<BTreeMap<String, Row>> {
    let listed = expected["tensors"].as_array();
    let torch = expected["torch"].as_object();
    if listed.is_none() && torch.is_none() {
        return None;
    }
    let listed = listed.into_iter().flatten();
    let mut rows: BTreeMap<String, Row> =
        listed.map(|it| (it["name"].as_str().unwrap().to_owned(), Row::of_json(it))).collect();
    let resolved: Vec<&str> =
        expected["differences"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    // PyTorch alone lists meta tensors, and knows the bytes of views that have to be resolved. Where it has a sparse
    // tensor, the list has its parts.
    let is_whole = rows.is_empty();
    for (name, it) in torch.into_iter().flatten() {
        let theirs = Row::of_json(it);
        let is_listed = rows.keys().any(|listed| listed == name || listed.starts_with(&format!("{name}.")));
        if resolved.contains(&name.as_str())
            && let Some(row) = rows.get_mut(name)
        {
            row.sha256 = theirs.sha256;
        } else if is_whole || (theirs.sha256.is_none() && !is_listed) {
            rows.insert(name.clone(), theirs);
        }
    }
    Some(rows)
}

/// The tensors of a checkpoint, read piece after piece.
fn rows_of_file(checkpoint: &OpenCheckpoint) -> Vec<(String, Row)> {
    let files = files_of(checkpoint.files());
    let plan = ReadPlan::new(checkpoint, checkpoint.files(), DEFAULT_HOST_BUDGET_BYTES, 2).unwrap();
    let hashes = hash_tensors(checkpoint, &files, &plan, &Progress::default()).unwrap();
    let mut hashes: BTreeMap<_, _> = hashes.into_iter().map(|(id, hash)| (id.0, hash)).collect();
    let row = |(id, tensor): (TensorId, &Tensor)| {
        let layout = &tensor.layout;
        let row = Row {
            dtype: layout.dtype(),
            shape: layout.shape().to_vec(),
            place: Some((layout.stride().to_vec(), layout.offset_elems())),
            sha256: hashes.remove(&id.0),
        };
        (tensor.name.clone(), row)
    };
    checkpoint.iter().map(row).collect()
}

/// The tensors of loaded weights.
fn rows_of_state(state: &StateDict<'_>) -> Vec<(String, Row)> {
    let row = |(name, view): (&str, TensorView<'_>)| {
        let mut hash = Sha256::new();
        view.for_each_chunk(|chunk| hash.update(chunk)).unwrap();
        let sha256 = hash.finalize().iter().map(|it| format!("{it:02x}")).collect();
        let dtype = view.dtype;
        (name.to_owned(), Row { dtype, shape: view.shape.to_vec(), place: None, sha256: Some(sha256) })
    };
    state.iter().map(row).collect()
}

/// One line for each difference between a file's tensors and what they should be.
fn differences_of_rows(ours: &[(String, Row)], expected: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let Some(mut theirs) = rows_of_json(expected) else { return found };
    for (name, ours) in ours {
        let theirs = theirs.remove(name);
        let place = theirs.as_ref().and_then(|it| it.place.as_ref()).and(ours.place.clone());
        let ours = Some(Row { place, ..ours.clone() });
        if ours != theirs {
            found.push(format!("{name:?}: ours {ours:?}\n    theirs {theirs:?}"));
        }
    }
    found.extend(theirs.keys().map(|name| format!("{name:?} is missing")));
    // An archive lists its tensors in the pickle's order; a folder has no order, and safetensors that of the bytes.
    if expected["container"] == "zip" {
        let with_data = ours.iter().filter(|(_, it)| it.sha256.is_some()).map(|(name, _)| name.as_str());
        let listed = expected["tensors"].as_array().into_iter().flatten();
        let listed: Vec<&str> = listed.map(|it| it["name"].as_str().unwrap()).collect();
        if !listed.is_empty() && !with_data.eq(listed.iter().copied()) {
            found.push(format!("listed in another order than {listed:?}"));
        }
    }
    found
}

/// One line for each difference between a sample and what it should be.
fn differences(path: &Path, expected: &Value) -> Vec<String> {
    let checkpoint = match open(path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return vec![error.to_string()],
    };
    let ours = rows_of_file(&checkpoint);
    let listed = rows_of_lists(&ours, &names_of_lists(&checkpoint));
    let mut found = differences_of_rows(&listed, expected);
    if let Some(n_tensors) = expected["n_tensors"].as_u64()
        && n_tensors != listed.len() as u64
    {
        found.push(format!("{} tensors, not {n_tensors}", listed.len()));
    }

    let with_data: Vec<(String, Row)> = { ours.iter() }
        .filter(|(_, row)| row.sha256.is_some())
        .map(|(name, row)| (name.clone(), Row { place: None, ..row.clone() }))
        .collect();
    let digest_of_rows = |rows: &[(String, Row)]| {
        let with_data = rows
            .iter()
            .filter_map(|(name, row)| Some((&name[..], row.dtype, &row.shape[..], row.sha256.as_deref()?)));
        digest(with_data)
    };
    let our_digest = digest_of_rows(&with_data);
    if let Some(theirs) = expected["digest"].as_str()
        && theirs != digest_of_rows(&listed)
    {
        found.push(format!("digest {}, not {theirs}", digest_of_rows(&listed)));
    }
    for strategy in Strategy::all() {
        let loaded = checkpoint.load(strategy).unwrap();
        if rows_of_state(&loaded.state) != with_data {
            found.push(format!("{strategy} loads {:?}", rows_of_state(&loaded.state)));
        }
        assert_eq!(
            digest_of(&loaded.state, path, &Progress::default()).unwrap(),
            our_digest,
            "{}: {strategy}",
            path.display()
        );
    }
    found
}

#[test]
fn every_sample_gives_its_names_shapes_strides_and_bytes_by_every_strategy() {
    let mut found = Vec::new();
    for (path, expected) in samples() {
        let lines = differences(&path, &expected);
        found.extend(lines.into_iter().map(|line| format!("{}: {line}", path.display())));
    }
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

#[test]
fn every_shard_opens_by_itself() {
    for root in roots() {
        for name in
            ["sharded/model-00001-of-00002.safetensors", "sharded_bin/pytorch_model-00001-of-00002.bin"]
        {
            let path = root.join("samples").join(name);
            if path.exists() {
                let checkpoint = open(&path).unwrap();
                assert!(!checkpoint.tensors.is_empty());
                let loaded = checkpoint.load(Strategy::Stream).unwrap();
                assert_eq!(loaded.state.len(), checkpoint.tensors.len());
                let all = open(path.parent().unwrap()).unwrap();
                assert!(all.format == Format::Sharded && all.tensors.len() > checkpoint.tensors.len());
            }
        }
    }
}

#[test]
fn the_zip_crate_finds_the_same_payloads() {
    let has_storage = |checkpoint: &Checkpoint, index: usize| match checkpoint.tensors.get(index)?.backing {
        Backing::Storage(storage) => Some(storage),
        _ => None,
    };
    let mut n_compared = 0;
    for (path, value) in samples() {
        let Some(keys) = value["tensors"].as_array().filter(|_| value["container"] == "zip") else {
            continue;
        };
        let Ok(checkpoint) = open(&path) else { continue };
        let mut oracle = zip::ZipArchive::new(fs::File::open(&path).unwrap()).unwrap();
        let root = value["root"].as_str().unwrap();
        let names = names_of_lists(&checkpoint);
        let is_listed = |index: &usize| !matches!(names.get(&checkpoint.tensors[*index].name), Some(None));
        let ours: Vec<_> = (0..checkpoint.tensors.len())
            .filter(is_listed)
            .filter_map(|it| has_storage(&checkpoint, it))
            .collect();
        assert_eq!(ours.len(), keys.len(), "{}", path.display());
        for (storage, key) in ours.iter().zip(keys) {
            let record = format!("{root}/data/{}", key["storage"].as_str().unwrap());
            let record = oracle.by_name(&record).unwrap();
            let storage = &checkpoint.storages[storage.0 as usize];
            let packed = checkpoint.file(storage.file).packed.as_ref();
            let start_byte = packed.map_or(storage.start_byte, |it| it.start_byte);
            assert_eq!((Some(start_byte), storage.len_bytes), (record.data_start(), record.size()));
            assert_eq!(packed.map(|it| it.len_bytes), packed.map(|_| record.compressed_size()));
            n_compared += 1;
        }
    }
    assert!(n_compared > 100, "{n_compared}");
}
