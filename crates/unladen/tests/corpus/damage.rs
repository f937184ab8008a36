//! Good files with a few bytes changed, and read from memory.

use super::{roots, samples};
use proptest::prelude::*;
use std::{
    fs,
    path::{Path, PathBuf},
};
use unladen::{
    Checkpoint, Error, Format, OpenOptions,
    format::parse,
    open,
    source::{FileSource, MemorySource},
    stamp::FileStamp,
};

/// The bytes of every sample that is one file and opens.
fn good_samples() -> Vec<(PathBuf, Vec<u8>)> {
    let paths = samples().into_iter().map(|(path, _)| path);
    let shards = roots().into_iter().map(|it| it.join("samples/sharded/model-00001-of-00002.safetensors"));
    let good: Vec<_> = { paths }
        .chain(shards)
        .filter(|it| it.is_file() && open(it).is_ok())
        .map(|it| {
            let bytes = fs::read(&it).unwrap();
            (it, bytes)
        })
        .collect();
    assert!(!good.is_empty());
    good
}

fn parse_bytes(path: &Path, bytes: Vec<u8>) -> Result<Checkpoint, Error> {
    let len_bytes = bytes.len() as u64;
    let stamp = FileStamp { path: path.to_owned(), dev: 0, ino: 0, len_bytes, mtime_ns: 0, packed: None };
    parse(&MemorySource::new(path, bytes), stamp, &OpenOptions::default())
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
        let ours = parse(&source, source.stamp().clone(), &OpenOptions::default()).unwrap();
        let memory = parse_bytes(&path, bytes).unwrap();
        assert_eq!((ours.tensors, ours.storages), (memory.tensors, memory.storages));
        assert!(!matches!(ours.format, Format::Folder));
    }
}
