//! What is promised of any file whatever: a typed error or a valid checkpoint, the same one from every source, and the same
//! bytes by every way of loading. A broken promise panics, which is what the fuzzer looks for.

use crate::{
    truth::Truth,
    weight_map::{Named, outside},
};
use rustix::fs::{CWD, FileType, Mode};
use serde::de::IgnoredAny;
use std::{
    collections::HashSet,
    fs,
    ops::Range,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};
use tempfile::TempDir;
use unladen::{
    Checkpoint, Error, Limits, OpenCheckpoint, OpenOptions, PlanOptions, Progress, Strategy,
    checkpoint::Root,
    contents::{ReadPlan, Reader},
    format::{TreeStyle, parse, records, tree},
    io_path::IoPath,
    source::{MemorySource, ReadAt},
    stamp::FileStamp,
    tensor::{Backing, TensorId},
    verify::{self, Check, digest, digest_of, hash_tensors},
};

/// Larger ones are opened and not loaded: expanded views of a few bytes may be of any size.
const MAX_LOAD_BYTES: u64 = 1 << 20;
/// A tree has no more text than this, and some for each byte of the file.
const MAX_TREE_BYTES: usize = 4 << 20;
const MAX_TREE_BYTES_PER_BYTE: usize = 512;
const BUDGET_BYTES: u64 = 64 << 20;

/// Opens bytes in memory, and checks what came of it.
pub fn opens(path: &Path, bytes: &[u8]) -> Result<Checkpoint, Error> {
    let source = MemorySource::new(path, bytes.to_vec());
    let stamp = FileStamp {
        path: path.to_owned(),
        dev: 0,
        ino: 0,
        len_bytes: bytes.len() as u64,
        mtime_ns: 0,
        packed: None,
    };
    let result = parse(&source, stamp, &OpenOptions::default());
    match &result {
        Ok(checkpoint) => {
            checkpoint.validate().expect("what was opened is valid");
            stays_inside(checkpoint);
            let shown: usize = checkpoint.warnings.iter().map(|it| it.to_string().len()).sum();
            assert!(shown < 1 << 20, "warnings of {shown} bytes");
            if bytes.starts_with(b"PK\x03\x04") {
                have_one_reading(&source, checkpoint);
            }
        }
        Err(error) => is_told(error),
    }
    result
}

/// No tensor reaches beyond its storage, no storage beyond its file. Counted here once more, apart from what the library does.
fn stays_inside(checkpoint: &Checkpoint) {
    for storage in &checkpoint.storages {
        let end_byte = u128::from(storage.start_byte) + u128::from(storage.len_bytes);
        let file = &checkpoint.files[storage.file.0 as usize];
        assert!(end_byte <= file.len_bytes.into(), "{storage:?} in {file:?}");
    }
    for tensor in &checkpoint.tensors {
        let (Backing::Storage(storage), layout) = (&tensor.backing, &tensor.layout) else { continue };
        if layout.shape().contains(&0) {
            continue;
        }
        let steps = layout.shape().iter().zip(layout.stride());
        let last: u128 = steps.map(|(n, stride)| u128::from(n - 1) * u128::from(*stride)).sum();
        let end_elems = last + u128::from(layout.offset_elems()) + 1;
        let held_bytes = checkpoint.storages[storage.0 as usize].len_bytes;
        let held_elems = u128::from(held_bytes / layout.dtype().size_bytes());
        assert!(end_elems <= held_elems, "{tensor:?} in {held_bytes} bytes");
    }
}

/// Of the records of an archive no two have one name, or share a byte, and each storage is in one of them.
fn have_one_reading(source: &MemorySource, checkpoint: &Checkpoint) {
    let records = records(source, &Limits::default()).expect("an archive that was opened has records");
    // Bytes that are not UTF-8 look alike.
    let names = records.iter().filter(|it| !it.name.contains(char::REPLACEMENT_CHARACTER));
    let mut seen = HashSet::new();
    names.for_each(|it| assert!(seen.insert(it.name.to_ascii_lowercase()), "two records {}", it.name));
    let mut ranges: Vec<Range<u64>> =
        records.iter().filter_map(|it| it.range.clone()).filter(|it| !it.is_empty()).collect();
    ranges.sort_by_key(|it| it.start);
    assert!(ranges.windows(2).all(|it| it[0].end <= it[1].start), "records that share bytes: {ranges:?}");
    let stored = checkpoint.storages.iter().filter(|it| it.len_bytes > 0);
    for it in stored.filter(|it| checkpoint.files[it.file.0 as usize].packed.is_none()) {
        let end_byte = it.start_byte + it.len_bytes;
        let is_in = |range: &Range<u64>| range.start <= it.start_byte && end_byte <= range.end;
        assert!(ranges.iter().any(is_in), "{it:?} is in none of {ranges:?}");
    }
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
        let file = unladen::open(&path);
        // What names other files is not opened from memory.
        let is_json = bytes.trim_ascii_start().starts_with(b"{");
        match (opens(&path, bytes), &file) {
            (Err(_), _) if is_json => {}
            (Err(memory), Err(file)) => {
                assert_eq!(memory.to_string(), file.to_string(), "from memory and from a file")
            }
            (Ok(memory), Ok(file)) => {
                assert_eq!(memory.tensors, file.tensors);
                assert_eq!(memory.storages, file.storages);
            }
            (memory, file) => {
                panic!("from memory {memory:?}, from a file {:?}", file.as_ref().map(|it| it.tensors.len()))
            }
        }
        if let Err(error) = &file {
            is_told(error);
        }
        opens_otherwise(&path, file.as_deref(), bytes.len());
        if let Ok(file) = file {
            loads_alike(&file, Some(bytes), crc32fast::hash(bytes) as usize);
        }
    }

    /// Keeps every promise for a file that tells the truth, and gives back what it holds.
    pub fn gives_back(&self, truth: &Truth) {
        self.keeps_its_promises(&truth.file);
        let file = unladen::open(self.0.path().join("input")).expect("what tells the truth opens");
        let strategies: Vec<Strategy> = Strategy::all().collect();
        let strategy = strategies[crc32fast::hash(&truth.file) as usize % strategies.len()];
        let state = file.load(strategy).expect("what tells the truth loads").state;
        assert_eq!(state.iter().count(), truth.tensors.len(), "as many tensors as were written");
        for meant in &truth.tensors {
            let view = state.get(&meant.name).expect("a tensor of the name that was written");
            let mut bytes = Vec::new();
            view.for_each_chunk(|chunk| bytes.extend_from_slice(chunk)).expect("a tensor that was loaded");
            let (found, written) = ((view.shape, &bytes), (&*meant.shape, &meant.bytes));
            assert_eq!(found, written, "{} by {strategy}", meant.name);
        }
    }

    /// Where a file is that no folder's index may lead to: beside the folder, and with every tensor.
    pub fn outside(&self) -> PathBuf {
        self.0.path().join("input")
    }

    /// Keeps every promise for a folder of these files, with links, a pipe and a folder among them that nothing may follow.
    /// `opens`: whether it must, where that is known.
    pub fn keeps_its_promises_of(&self, files: &[Named], opens: Option<bool>) {
        let folder = self.0.path().join("folder");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("folder")).expect("room for a folder");
        for path in [self.outside(), folder.join("folder/inner")] {
            fs::write(path, outside()).expect("room for a small file");
        }
        for (name, bytes) in files {
            fs::write(folder.join(name), bytes).expect("room for small files");
        }
        symlink("../input", folder.join("link")).expect("a link");
        symlink(files[0].0, folder.join("link_inside")).expect("a link");
        rustix::fs::mknodat(CWD, folder.join("pipe"), FileType::Fifo, Mode::RUSR, 0).expect("a pipe");
        let opened = unladen::open(&folder);
        if let Some(opens) = opens {
            assert_eq!(opened.is_ok(), opens, "a folder that is known: {:?}", opened.err());
        }
        let len_bytes = files.iter().map(|(_, bytes)| bytes.len()).sum();
        opens_otherwise(&folder, opened.as_deref(), len_bytes);
        match opened {
            Err(error) => is_told(&error),
            Ok(checkpoint) => {
                checkpoint.validate().expect("what was opened is valid");
                stays_inside(&checkpoint);
                for file in &checkpoint.files {
                    // Letter by letter: paths that are equal may be written in several ways.
                    let is_it = |(name, _): &Named| file.path.as_os_str() == folder.join(name).as_os_str();
                    assert!(files.iter().any(is_it), "none of the folder's files: {}", file.path.display());
                }
                let turn: u32 = files.iter().fold(0, |sum, (_, bytes)| sum ^ crc32fast::hash(bytes));
                loads_alike(&checkpoint, None, turn as usize);
            }
        }
    }
}

/// Opens it as others may ask for: strictly, the state dict alone, and printed.
fn opens_otherwise(path: &Path, whole: Result<&Checkpoint, &Error>, len_bytes: usize) {
    let strict = OpenOptions { strict: true, ..OpenOptions::default() };
    match (whole, unladen::open_with(path, &strict)) {
        (Ok(whole), Ok(strict)) => assert_eq!(whole.tensors, strict.tensors, "strictly or not"),
        (Err(_), Ok(_)) => panic!("open only if strictly"),
        (_, Err(error)) => is_told(&error),
    }
    let auto = OpenOptions { root: Some(Root::Auto), ..OpenOptions::default() };
    match (whole, unladen::open_with(path, &auto)) {
        (Ok(whole), Ok(part)) => is_part(whole, &part),
        (Err(whole), Err(part)) => assert_eq!(whole.to_string(), part.to_string(), "of one root"),
        (whole, part) => panic!("whole {:?}, in part {:?}", whole.map(|_| ()), part.map(|_| ())),
    }
    for (json, full) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut text = String::new();
        let printed = tree(path, &OpenOptions::default(), TreeStyle { json, full }, &mut |piece| {
            text.push_str(piece);
            assert!(text.len() < MAX_TREE_BYTES + MAX_TREE_BYTES_PER_BYTE * len_bytes, "an endless tree");
            Ok(())
        });
        match printed {
            Err(error) => is_told(&error),
            Ok(()) => {
                assert!(whole.is_ok(), "what does not open has a tree");
                if json {
                    serde_json::from_str::<IgnoredAny>(&text).expect("a tree is JSON");
                }
            }
        }
    }
}

/// What is below a root is a part of the whole, tensor by tensor, and loads.
fn is_part(whole: &Checkpoint, part: &OpenCheckpoint) {
    part.validate().expect("a part of what is valid is valid");
    let prefix = whole.root().map_or(String::new(), |it| format!("{it}."));
    let wanted =
        whole.tensors.iter().filter_map(|it| it.name.strip_prefix(&prefix).map(|name| (name, &it.layout)));
    assert!(
        wanted.eq(part.tensors.iter().map(|it| (&*it.name, &it.layout))),
        "not the tensors below {prefix}"
    );
    if loaded_bytes(part) <= MAX_LOAD_BYTES && !prefix.is_empty() {
        let digests = [Strategy::Stream, Strategy::Mmap].map(|strategy| {
            let loaded = part.load(strategy).map_err(|error| error.kind())?;
            digest_of(&loaded.state, &part.path, &Progress::default()).map_err(|error| error.kind())
        });
        assert_eq!(digests[0], digests[1], "a part, by two strategies");
    }
}

fn loaded_bytes(checkpoint: &Checkpoint) -> u64 {
    checkpoint.tensors.iter().fold(0u64, |sum, it| sum.saturating_add(it.layout.len_bytes()))
}

/// Two of the strategies, by turns, and verification once in a while: each takes threads, and an input has to be quick.
/// `bytes`: those of the file, if it is one. `turn`: any number that is always the same for the same input.
fn loads_alike(checkpoint: &OpenCheckpoint, bytes: Option<&[u8]>, turn: usize) {
    if turn % 4 == 1 {
        let limits = Limits::default();
        let checksums = Check { host_budget_bytes: BUDGET_BYTES, limits, hashes: false, manifest: None };
        verify::check(checkpoint, checkpoint.files(), &checksums, &Progress::default())
            .expect("what opens can be compared with its checksums");
    }
    if loaded_bytes(checkpoint) > MAX_LOAD_BYTES {
        return is_planned(checkpoint);
    }
    // Files inside files have no bytes of their own in memory.
    let is_one_file = checkpoint.files.len() == 1;
    let from_memory = bytes.filter(|_| is_one_file).map(|it| digest_from_memory(checkpoint, it));
    let strategies: Vec<Strategy> = Strategy::all().collect();
    let at = |turn: usize| strategies[turn % strategies.len()];
    let loads: Vec<Result<String, Error>> = [at(turn), at(turn / strategies.len())]
        .into_iter()
        .map(|strategy| {
            let loaded = checkpoint.load(strategy)?;
            digest_of(&loaded.state, &checkpoint.path, &Progress::default())
        })
        .collect();
    let all = from_memory.iter().chain(&loads);
    let told: Vec<Result<&str, &str>> = all.map(|it| it.as_deref().map_err(|error| error.kind())).collect();
    loads.iter().filter_map(|it| it.as_ref().err()).for_each(is_told);
    assert!(told.windows(2).all(|it| it[0] == it[1]), "ways of loading differ: {told:?}");

    if turn.is_multiple_of(4) {
        is_verified(checkpoint, told[0].is_ok());
    }
}

/// A manifest holds for its own file, and the file is the same as itself.
fn is_verified(checkpoint: &OpenCheckpoint, is_loaded: bool) {
    let limits = Limits::default();
    let check = Check { host_budget_bytes: BUDGET_BYTES, limits, hashes: true, manifest: None };
    let checked = verify::check(checkpoint, checkpoint.files(), &check, &Progress::default());
    let checked = checked.expect("what loads can be verified");
    let Some(manifest) = &checked.manifest else {
        let mut unreadable = checked.findings.iter().filter(|it| it.kind == verify::Kind::Unreadable);
        let is_told = if is_loaded {
            unreadable.all(|it| is_unseen(checkpoint, it))
        } else {
            unreadable.next().is_some()
        };
        assert!(is_told, "what loads can be hashed: {:?}", checked.findings);
        return;
    };
    let check = Check { manifest: Some(manifest), ..check };
    let again = verify::check(checkpoint, checkpoint.files(), &check, &Progress::default());
    assert_eq!(again.expect("as before").findings, checked.findings, "a manifest holds for its own file");
    let sides = [(&**checkpoint, checkpoint.files()); 2];
    let compared = verify::compare(sides, BUDGET_BYTES, &Progress::default());
    match compared {
        Ok(compared) => assert!(is_loaded && compared.is_same(), "a file is the same as itself"),
        // A packed record of another checksum: a finding, not in the way of a hash, but never handed out.
        Err(error) => {
            is_told(&error);
            assert!(!is_loaded && !checked.findings.is_empty(), "what loads can be compared: {error}");
        }
    }
}

/// A load unpacks no more of a record than tensors view; verification goes to its end, and only that may be damaged.
fn is_unseen(checkpoint: &OpenCheckpoint, finding: &verify::Finding) -> bool {
    let is_it = |file: &FileStamp| {
        file.path == finding.path
            && file.packed.as_ref().is_some_and(|it| Some(&*it.name) == finding.record.as_deref())
    };
    let Some(file) = checkpoint.files.iter().position(is_it) else { return false };
    let pieces = checkpoint.iter().flat_map(|(id, _)| checkpoint.pieces(id));
    let mut seen = pieces.filter_map(|piece| {
        let (storage, stored) = (checkpoint.storage_of(&piece), piece.layout.stored_bytes());
        let is_of_it = storage.file.0 as usize == file && !stored.is_empty();
        is_of_it.then_some(storage.start_byte + stored.end)
    });
    seen.all(|end_byte| end_byte < checkpoint.files[file].len_bytes)
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
