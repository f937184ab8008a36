//! Opens and loads every file of the corpora: `samples/` must give what its `expected.json` says, `hostile/` must end
//! as its `expected.json` says. Roots: `tests/fixtures`, and the folder in the environment variable `UNLADEN_CORPUS`.

#![allow(clippy::print_stderr)]

mod damage;
mod hostile;
mod samples;

use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn roots() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let corpus = std::env::var_os("UNLADEN_CORPUS").map(PathBuf::from);
    if corpus.is_none() {
        eprintln!("UNLADEN_CORPUS is not set: the large corpus is not tested");
    }
    [Some(fixtures), corpus].into_iter().flatten().collect()
}

/// The entries of a folder's `expected.json`, with the files' paths.
fn expected(folder: &Path) -> Vec<(PathBuf, Value)> {
    let text = fs::read_to_string(folder.join("expected.json")).unwrap();
    let Value::Object(files) = serde_json::from_str(&text).unwrap() else { panic!("{}", folder.display()) };
    assert!(!files.is_empty(), "{}", folder.display());
    files.into_iter().map(|(name, value)| (folder.join(name), value)).collect()
}

/// The samples of every root.
fn samples() -> Vec<(PathBuf, Value)> {
    roots().iter().flat_map(|root| expected(&root.join("samples"))).collect()
}
