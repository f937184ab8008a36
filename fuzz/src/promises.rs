//! What is promised of any file whatever: a typed error or a valid checkpoint, the same one from every source, and the same
//! bytes by every way of loading. A broken promise panics, which is what the fuzzer looks for.

use std::{fs, path::Path, sync::Arc};
use tempfile::TempDir;
use unladen::{
    Checkpoint, Error, Limits, OpenCheckpoint, OpenOptions, PlanOptions, Progress, Strategy,
    contents::{ReadPlan, Reader},
    format::{parse, records},
    io_path::IoPath,
    source::{MemorySource, ReadAt},
    stamp::FileStamp,
    tensor::{Backing, TensorId},
    verify::{self, Check, digest, digest_of, hash_tensors},
};

/// Larger ones are opened and not loaded: expanded views of a few bytes may be of any size.
const MAX_LOAD_BYTES: u64 = 1 << 20;
const BUDGET_BYTES: u64 = 64 << 20;

/// Opens bytes in memory, and checks what came of it.
pub fn opens(path: &Path, bytes: &[u8]) -> Result<Checkpoint, Error> {
    let source = MemorySource::new(path, bytes.to_vec());
    let stamp =
        FileStamp { path: path.to_owned(), dev: 0, ino: 0, len_bytes: bytes.len() as u64, mtime_ns: 0 };
    let result = parse(&source, stamp, &OpenOptions::default());
    match &result {
        Ok(checkpoint) => {
            checkpoint.validate().expect("what was opened is valid");
            let shown: usize = checkpoint.warnings.iter().map(|it| it.to_string().len()).sum();
            assert!(shown < 1 << 20, "warnings of {shown} bytes");
            if bytes.starts_with(b"PK\x03\x04") {
                records(&source, &Limits::default()).expect("an archive that was opened has records");
            }
        }
        Err(error) => is_told(error),
    }
    result
}

/// An error says something, and not too much.
fn is_told(error: &Error) {
    let text = error.to_string();
    assert!(!text.is_empty() && text.len() < 1 << 16 && !error.hint().is_empty(), "{} bytes", text.len());
    assert!(!matches!(error, Error::Panicked { .. }), "{text}");
}

/// A file on disk that is written again for each input.
pub struct Scratch(TempDir);

impl Default for Scratch {
    fn default() -> Scratch {
        // In memory where there is such a folder.
        let shm = Path::new("/dev/shm");
        let folder = if shm.is_dir() { TempDir::new_in(shm) } else { TempDir::new() };
        Scratch(folder.expect("a temporary folder"))
    }
}

impl Scratch {
    /// Keeps every promise for these bytes: from a file and from memory, hashed and loaded by every strategy, verified.
    pub fn keeps_its_promises(&self, bytes: &[u8]) {
        let path = self.0.path().join("input");
        fs::write(&path, bytes).expect("room for a small file");
        match (opens(&path, bytes), unladen::open(&path)) {
            (Err(memory), Err(file)) => {
                assert_eq!(memory.to_string(), file.to_string(), "from memory and from a file")
            }
            (Ok(memory), Ok(file)) => {
                assert_eq!(memory.tensors, file.tensors);
                assert_eq!(memory.storages, file.storages);
                loads_alike(&file, bytes);
            }
            (memory, file) => {
                panic!("from memory {memory:?}, from a file {:?}", file.map(|it| it.tensors.len()))
            }
        }
    }
}

fn loads_alike(checkpoint: &OpenCheckpoint, bytes: &[u8]) {
    let loaded_bytes =
        checkpoint.tensors.iter().fold(0u64, |sum, it| sum.saturating_add(it.layout.len_bytes()));
    if loaded_bytes > MAX_LOAD_BYTES {
        return is_planned(checkpoint);
    }
    // Files inside files have no bytes of their own in memory.
    let is_one_file = checkpoint.files.len() == 1;
    let from_memory = is_one_file.then(|| digest_from_memory(checkpoint, bytes));
    let loads: Vec<Result<String, Error>> = Strategy::all()
        .map(|strategy| {
            let loaded = checkpoint.load(strategy)?;
            digest_of(&loaded.state, &checkpoint.path, &Progress::default())
        })
        .collect();
    let all = from_memory.iter().chain(&loads);
    let told: Vec<Result<&str, &str>> = all.map(|it| it.as_deref().map_err(|error| error.kind())).collect();
    loads.iter().filter_map(|it| it.as_ref().err()).for_each(is_told);
    assert!(told.windows(2).all(|it| it[0] == it[1]), "ways of loading differ: {told:?}");

    let limits = Limits::default();
    let check = Check { host_budget_bytes: BUDGET_BYTES, limits, hashes: true, manifest: None };
    let checked = verify::check(checkpoint, checkpoint.files(), &check, &Progress::default());
    let checked = checked.expect("what loads can be verified");
    let Some(manifest) = &checked.manifest else {
        assert!(told[0].is_err(), "what loads can be hashed: {:?}", checked.findings);
        return;
    };
    let check = Check { manifest: Some(manifest), ..check };
    let again = verify::check(checkpoint, checkpoint.files(), &check, &Progress::default());
    assert_eq!(again.expect("as before").findings, checked.findings, "a manifest holds for its own file");
    let sides = [(&**checkpoint, checkpoint.files()); 2];
    let compared = verify::compare(sides, BUDGET_BYTES, &Progress::default()).expect("as before");
    assert!(compared.is_same(), "a file is the same as itself");
}

/// What is too large to load here has a plan or an error, and what claims too much is refused tensor by tensor.
fn is_planned(checkpoint: &OpenCheckpoint) {
    for strategy in Strategy::all() {
        if let Err(error) = checkpoint.plan(&PlanOptions::new(strategy)) {
            is_told(&error);
        }
    }
    if checkpoint.tensors.iter().all(|it| it.layout.check_expansion().is_err()) {
        let limits = Limits::default();
        let check = Check { host_budget_bytes: BUDGET_BYTES, limits, hashes: true, manifest: None };
        let checked = verify::check(checkpoint, checkpoint.files(), &check, &Progress::default());
        assert!(checked.is_ok_and(|it| !it.findings.is_empty()), "an expanded view that was hashed");
    }
}

/// The digest of every tensor, read from memory piece after piece.
fn digest_from_memory(checkpoint: &Checkpoint, bytes: &[u8]) -> Result<String, Error> {
    let source: Arc<dyn ReadAt> = Arc::new(MemorySource::new(&checkpoint.path, bytes.to_vec()));
    let open = |_| Ok(Arc::clone(&source));
    let plan = ReadPlan::for_paths(checkpoint, vec![IoPath::Buffered], BUDGET_BYTES, 1)?;
    let progress = Progress::default();
    let hashes = hash_tensors(checkpoint, &open, &plan, &progress)?;
    let mut reader = Reader::new(checkpoint, &open, &plan, &progress)?;
    for (id, tensor) in checkpoint.iter().filter(|(_, it)| it.backing != Backing::Meta) {
        let mut len_bytes = 0;
        reader.for_each_chunk(id, &mut |chunk| {
            len_bytes += chunk.len() as u64;
            Ok(())
        })?;
        assert_eq!(len_bytes, tensor.layout.len_bytes(), "{}", tensor.name);
    }
    let tensor = |id: TensorId| checkpoint.tensor(id);
    Ok(digest(hashes.iter().map(|(id, hash)| {
        let tensor = tensor(*id);
        (&*tensor.name, tensor.layout.dtype(), tensor.layout.shape(), &**hash)
    })))
}
