//! Checkpoints of many files: weight maps, numbered files, distributed checkpoints, offloaded tensors. What is well made
//! loads by every strategy; what contradicts itself, or leads out of its folder, is an error that names the file.

mod dcp;
mod maps;
mod offload;
mod write;

use std::{collections::BTreeMap, path::Path};
use unladen::{
    DType, Error, OpenCheckpoint, OpenOptions, PlanOptions, RunOptions, Strategy, open, open_with,
};

/// A tensor as it was loaded.
type Loaded = (DType, Vec<u64>, Vec<u8>);

/// What each strategy loads, which must be the same.
fn load(path: &Path) -> BTreeMap<String, Loaded> {
    load_opened(&open(path).unwrap())
}

fn load_opened(checkpoint: &OpenCheckpoint) -> BTreeMap<String, Loaded> {
    let mut first: Option<BTreeMap<String, Loaded>> = None;
    for strategy in Strategy::all() {
        let plan = checkpoint.plan(&PlanOptions::unlimited(strategy)).unwrap();
        let loaded = checkpoint.run(&plan, RunOptions::default()).unwrap();
        assert_eq!(loaded.peaks, plan.predicted(), "{strategy}");
        let tensors = loaded.state.iter().map(|(name, view)| {
            let mut bytes = Vec::new();
            view.for_each_chunk(|chunk| bytes.extend_from_slice(chunk)).unwrap();
            (name.to_owned(), (view.dtype, view.shape.to_vec(), bytes))
        });
        let tensors = tensors.collect();
        match &first {
            None => first = Some(tensors),
            Some(first) => assert_eq!(*first, tensors, "{strategy}"),
        }
    }
    first.unwrap()
}

/// The error of opening, which must be the files' fault or ours, and name the path.
fn refused(path: &Path) -> String {
    refused_with(path, &OpenOptions::default())
}

fn refused_with(path: &Path, options: &OpenOptions) -> String {
    let error = open_with(path, options).unwrap_err();
    assert!(matches!(error, Error::Corrupt(_) | Error::Unsupported(_)), "{error:?}");
    assert!(!error.hint().is_empty());
    let folder = if path.is_dir() { path } else { path.parent().unwrap() };
    assert!(error.to_string().starts_with(&folder.display().to_string()), "{error}");
    error.to_string()
}

fn warnings(checkpoint: &OpenCheckpoint) -> String {
    checkpoint.warnings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
