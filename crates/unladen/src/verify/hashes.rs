//! Hashes of tensors, and the digest of all of them: what two loads, two files or two programs agree on.

use super::threads::{on_threads, total};
use crate::{
    checkpoint::Checkpoint,
    contents::{OpenFile, ReadPlan, Reader},
    destination::{StateDict, TensorView},
    dtype::DType,
    error::Result,
    progress::Progress,
    tensor::{Backing, TensorId},
};
use sha2::{Digest, Sha256};
use std::{path::Path, thread};

/// The sha256, in hexadecimal, of each tensor's row-major little-endian bytes, in the checkpoint's order.
///
/// Tensors without data have no hash and are left out. Tied tensors are read once. Threads and buffers are the plan's.
pub fn hash_tensors(
    checkpoint: &Checkpoint,
    files: &OpenFile<'_>,
    plan: &ReadPlan,
    progress: &Progress,
) -> Result<Vec<(TensorId, String)>> {
    let first = checkpoint.first_with_same_bytes();
    let has_data = |id: TensorId| checkpoint.tensor(id).backing != Backing::Meta;
    let apart: Vec<TensorId> = checkpoint
        .iter()
        .map(|(id, _)| id)
        .filter(|&id| first[id.0 as usize] == id && has_data(id))
        .collect();
    let sizes: Vec<u64> = apart.iter().map(|&id| checkpoint.tensor(id).layout.len_bytes()).collect();
    progress.expect(total(&sizes));
    let reader = || Reader::new(checkpoint, files, plan, progress);
    let hashes = on_threads(plan.n_threads(), &sizes, reader, |reader, index| {
        let mut hash = Sha256::new();
        reader.for_each_chunk(apart[index], &mut |chunk| {
            hash.update(chunk);
            progress.add(chunk.len() as u64);
            Ok(())
        })?;
        Ok(hex(hash))
    })?;
    // `apart` is sorted, because it was filtered from the checkpoint's order.
    let hash_of = |id: TensorId| Some(hashes[apart.binary_search(&first[id.0 as usize]).ok()?].clone());
    Ok(checkpoint.iter().filter_map(|(id, _)| Some((id, hash_of(id)?))).collect())
}

/// One hash over names, types, shapes and hashes: the sha256 of the sorted lines `name dtype [2,3] hash`.
pub fn digest<'a>(tensors: impl IntoIterator<Item = (&'a str, DType, &'a [u64], &'a str)>) -> String {
    let line = |(name, dtype, shape, hash): (&str, DType, &[u64], &str)| {
        let sizes: Vec<String> = shape.iter().map(u64::to_string).collect();
        format!("{name} {dtype} [{}] {hash}\n", sizes.join(","))
    };
    let mut lines: Vec<String> = tensors.into_iter().map(line).collect();
    lines.sort_unstable();
    let mut hash = Sha256::new();
    lines.iter().for_each(|line| hash.update(line));
    hex(hash)
}

/// The [`digest`] of weights in memory. `path` names what they were loaded from, for messages.
pub fn digest_of(state: &StateDict<'_>, path: &Path, progress: &Progress) -> Result<String> {
    let tensors: Vec<(&str, TensorView<'_>)> = state.iter().collect();
    let sizes: Vec<u64> = tensors.iter().map(|(_, view)| view.bytes.len_bytes()).collect();
    progress.expect(total(&sizes));
    let hashes = on_threads(
        thread::available_parallelism().map_or(2, |it| it.get()).clamp(2, MAX_THREADS),
        &sizes,
        || Ok(()),
        |_, index| {
            let mut hash = Sha256::new();
            let (name, view) = &tensors[index];
            progress.check(path)?;
            view.for_each_chunk(|chunk| hash.update(chunk))
                .map_err(|error| error.in_tensor(name).in_file(path))?;
            progress.add(sizes[index]);
            Ok(hex(hash))
        },
    )?;
    Ok(digest(
        tensors.iter().zip(&hashes).map(|((name, view), hash)| (*name, view.dtype, view.shape, &hash[..])),
    ))
}

/// Memory is the limit long before this many.
const MAX_THREADS: usize = 8;

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::Format,
        destination::{Arena, Placed},
        error::Error,
        io_path::IoPath,
        source::{MemorySource, ReadAt},
        stamp::FileStamp,
        tensor::{FileId, Layout, Storage, StorageId, Tensor},
    };
    use std::sync::Arc;

    /// `sha256(b"")` and `sha256(b"abc")`, as published.
    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn abc() -> Checkpoint {
        let stamp = FileStamp { path: "a".into(), dev: 0, ino: 0, len_bytes: 3, mtime_ns: 0, packed: None };
        let storage = Storage { file: FileId(0), start_byte: 0, len_bytes: 3, swapped: false };
        let tensor = |name: &str, len, backing| Tensor {
            name: name.into(),
            layout: Layout::contiguous(DType::U8, &[len]).unwrap(),
            backing,
        };
        let stored = || Backing::Storage(StorageId(0));
        let tensors = vec![
            tensor("b", 3, stored()),
            tensor("meta", 3, Backing::Meta),
            tensor("none", 0, stored()),
            tensor("a", 3, stored()),
        ];
        Checkpoint {
            format: Format::Pth,
            path: "a".into(),
            files: vec![stamp],
            storages: vec![storage],
            extents: Vec::new(),
            tensors,
            composites: Vec::new(),
            roots: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn plan() -> ReadPlan {
        ReadPlan::for_paths(&abc(), vec![IoPath::Buffered], 4 << 20, 2).unwrap()
    }

    #[test]
    fn tied_tensors_are_read_once_and_have_one_hash() {
        let source: Arc<dyn ReadAt> = Arc::new(MemorySource::new("a", b"abc".to_vec()));
        let open = |_| Ok(Arc::clone(&source));
        let progress = Progress::default();
        let hashes = hash_tensors(&abc(), &open, &plan(), &progress).unwrap();
        let expected = [(0, ABC), (2, EMPTY), (3, ABC)].map(|(id, hash)| (TensorId(id), hash.to_owned()));
        assert_eq!(hashes, expected);
        assert_eq!(progress.get(), (3, 3));
    }

    #[test]
    fn a_file_that_ends_early_is_an_error_and_no_hash() {
        let source: Arc<dyn ReadAt> = Arc::new(MemorySource::new("a", b"ab".to_vec()));
        let open = |_| Ok(Arc::clone(&source));
        let error = hash_tensors(&abc(), &open, &plan(), &Progress::default()).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "{error}");
    }

    #[test]
    fn a_cancelled_hash_stops() {
        let source: Arc<dyn ReadAt> = Arc::new(MemorySource::new("a", b"abc".to_vec()));
        let open = |_| Ok(Arc::clone(&source));
        let progress = Progress::default();
        progress.cancel();
        let error = hash_tensors(&abc(), &open, &plan(), &progress).unwrap_err();
        assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    }

    #[test]
    fn the_digest_does_not_depend_on_the_order_and_spells_shapes_without_spaces() {
        let tensors = [("b", DType::F32, &[2u64, 3][..], ABC), ("a", DType::U8, &[][..], EMPTY)];
        let mut backwards = tensors;
        backwards.reverse();
        let mut hash = Sha256::new();
        hash.update(format!("a uint8 [] {EMPTY}\nb float32 [2,3] {ABC}\n"));
        assert_eq!(digest(tensors), hex(hash));
        assert_eq!(digest(tensors), digest(backwards));
    }

    #[test]
    fn weights_in_memory_and_in_a_file_have_one_digest() {
        let mut bytes = *b"xxabc";
        let layout = Layout::contiguous(DType::U8, &[3]).unwrap();
        let placed = Placed { arena: 0, start_byte: 2, layout };
        let tensors = [("b".to_owned(), placed.clone()), ("a".to_owned(), placed)];
        let state = StateDict::new(vec![Arena::Caller(&mut bytes)], tensors).unwrap();
        let expected = digest([("a", DType::U8, &[3u64][..], ABC), ("b", DType::U8, &[3], ABC)]);
        assert_eq!(digest_of(&state, Path::new("test"), &Progress::default()).unwrap(), expected);
    }
}
