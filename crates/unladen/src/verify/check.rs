//! Checks one checkpoint: every record of an archive against its checksum, every tensor against a manifest.

use super::{
    archives::{Archives, Place},
    indices,
    jobs::{self, BYTES_PER_GOAL, BYTES_PER_JOB, Bytes, Goal, Seen},
    made::Made,
    manifest::{Fingerprint, Manifest},
};
use crate::{
    checkpoint::Checkpoint,
    contents::{ReadPlan, Reads, is_in_order},
    error::{Error, Result},
    format::{Limits, Record},
    progress::Progress,
    source::FileSet,
    tensor::{Backing, FileId, Tensor, TensorId},
};
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    path::PathBuf,
};

/// What to check, and in how much memory.
#[derive(Clone, Copy, Debug)]
pub struct Check<'m> {
    /// What the check may hold.
    pub host_budget_bytes: u64,
    /// How much a file may claim, as it was opened with.
    pub limits: Limits,
    /// Hash every tensor: what comes back then has a manifest.
    pub hashes: bool,
    /// Hash every tensor, and tell what is not as this says.
    pub manifest: Option<&'m Manifest>,
}

/// What a check saw.
#[derive(Debug)]
pub struct Checked {
    /// Records that were compared with their checksums.
    pub n_compared: u64,
    /// Records that were read and have no checksum, because whoever wrote them computed none.
    pub n_without_checksum: u64,
    /// Records of both kinds that are packed, and were unpacked for it.
    pub n_packed: u64,
    /// Bytes that were read. The indices of sparse and nested tensors, which are read once more, count once.
    pub read_bytes: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// Every tensor with its hash, if that was asked for and all could be read.
    pub manifest: Option<Manifest>,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which.
    pub kind: Kind,
    /// In which file (or folder).
    pub path: PathBuf,
    /// In which record of an archive, if it is about one.
    pub record: Option<String>,
    /// Which tensors it concerns: maybe none.
    pub tensors: Vec<String>,
    /// What should be there.
    pub expected: String,
    /// What is.
    pub found: String,
}

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A record's bytes do not have its checksum.
    Checksum,
    /// Bytes that could not be read.
    Unreadable,
    /// A tensor of the manifest's is missing.
    Missing,
    /// A tensor that the manifest does not have.
    Extra,
    /// A tensor of another type than in the manifest.
    DType,
    /// A tensor of another shape.
    Shape,
    /// A tensor with other bytes.
    Bytes,
    /// A tensor that is made of others, and of other ones or in another way than in the manifest.
    Composite,
    /// A part of a sparse or nested tensor has an index that is out of bounds.
    Parts,
}

impl Kind {
    /// The word for it, for `--json` and bindings.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Checksum => "checksum",
            Kind::Unreadable => "unreadable",
            Kind::Missing => "missing",
            Kind::Extra => "extra",
            Kind::DType => "dtype",
            Kind::Shape => "shape",
            Kind::Bytes => "bytes",
            Kind::Composite => "composite",
            Kind::Parts => "parts",
        }
    }
}

/// The most threads that read.
const MAX_THREADS: usize = 8;

/// Reads everything once, on several threads, and says what is wrong with it. What is read leaves the page cache as it is.
///
/// Fails if the budget is too small (naming one that is not), if a file changes meanwhile, or if the caller cancels;
/// what the system cannot read is a [`Finding`].
pub fn check(
    checkpoint: &Checkpoint,
    files: &FileSet,
    what: &Check<'_>,
    progress: &Progress,
) -> Result<Checked> {
    let archives = Archives::read(checkpoint, files, &what.limits)?;
    let wants_hashes = what.hashes || what.manifest.is_some();
    let first = checkpoint.first_with_same_bytes();
    let mut goals = goals_of(&archives);
    match wants_hashes {
        true => add_tensors(&mut goals, checkpoint, &first),
        false => add_storages(&mut goals, checkpoint, &archives),
    }
    let jobs = jobs::jobs(&goals, checkpoint);
    let held_bytes = archives.held_bytes(MAX_THREADS)
        + jobs.len() as u64 * BYTES_PER_JOB
        + goals.len() as u64 * BYTES_PER_GOAL
        + what.manifest.map_or(0, Manifest::len_bytes);
    let reads = if wants_hashes { Reads::Tensors } else { Reads::Files };
    let budget_bytes = what.host_budget_bytes;
    let plan = ReadPlan::beside(held_bytes, reads, checkpoint, files, budget_bytes, MAX_THREADS);
    // They are read when everything else was.
    let of_indices = indices::plan(checkpoint, files, held_bytes, reads, budget_bytes);
    let (plan, of_indices) = match (plan, of_indices) {
        (Err(one), Err(other)) => return Err(needs_more(one, other)),
        (plan, of_indices) => (plan?, of_indices?),
    };
    let open = |file| archives.open(file);
    let seen = jobs::read(&goals, &jobs, checkpoint, &open, &plan, progress)?;
    files.check_unchanged()?;

    let mut checked = Checked {
        n_compared: goals.iter().filter(|it| it.wants_crc32).count() as u64,
        n_without_checksum: archives.count(|it| it.crc32.is_none()),
        n_packed: archives.count(|it| it.range.is_none()),
        read_bytes: goals.iter().fold(0, |sum, it| sum.saturating_add(it.len_bytes(checkpoint))),
        findings: findings(&archives, &goals, &seen, checkpoint, &first),
        manifest: None,
    };
    if let Some(plan) = of_indices {
        let unreadable = checked.findings.iter().filter(|it| it.kind == Kind::Unreadable);
        let unread: HashSet<String> = unreadable.flat_map(|it| &it.tensors).cloned().collect();
        checked.findings.extend(indices::check(checkpoint, &open, &plan, &first, &unread, progress)?);
        files.check_unchanged()?;
    }
    if wants_hashes {
        let manifest = manifest(checkpoint, &goals, &seen, &first)?;
        let unreadable = checked.findings.iter().filter(|it| it.kind == Kind::Unreadable);
        let unread: HashSet<&str> = unreadable.flat_map(|it| &it.tensors).map(String::as_str).collect();
        let is_whole = unread.is_empty();
        let differences =
            what.manifest.map(|wanted| wanted.differences(&manifest, &checkpoint.path, &unread));
        checked.findings.extend(differences.into_iter().flatten());
        checked.manifest = is_whole.then_some(manifest);
    }
    Ok(checked)
}

/// Of two budgets that are too small, the one that has to become larger: it does for both.
fn needs_more(one: Error, other: Error) -> Error {
    let needed_bytes = |error: &Error| match error {
        Error::OverBudget { needed_bytes, .. } => Some(*needed_bytes),
        _ => None,
    };
    if needed_bytes(&other) > needed_bytes(&one) { other } else { one }
}

/// Each record is a goal, in this order.
fn goals_of(archives: &Archives<'_>) -> Vec<Goal> {
    let goal = |place: &Place| Goal {
        bytes: Bytes::OfFile(place.file, place.range.clone()),
        wants_crc32: place.record.crc32.is_some(),
        hash_of: None,
    };
    archives.places.iter().map(goal).collect()
}

/// What reading the goals found. The first of them are the records.
fn findings(
    archives: &Archives<'_>,
    goals: &[Goal],
    seen: &[Seen],
    checkpoint: &Checkpoint,
    first: &[TensorId],
) -> Vec<Finding> {
    let records = archives.places.iter().map(|it| Some(&it.record)).chain(std::iter::repeat(None));
    let finding = |((goal, seen), record): ((&Goal, &Seen), Option<&Record>)| {
        let wanted = record.and_then(|it| it.crc32);
        let (kind, expected, found) = match (&seen.trouble, wanted, seen.crc32) {
            (Some(trouble), ..) => {
                (Kind::Unreadable, "bytes that can be read".to_owned(), trouble.to_string())
            }
            (None, Some(wanted), Some(found)) if wanted != found => {
                (Kind::Checksum, format!("CRC-32 {wanted:08x}"), format!("{found:08x}"))
            }
            _ => return None,
        };
        let path = match &goal.bytes {
            Bytes::OfFile(file, _) => archives.path(*file).to_owned(),
            Bytes::OfTensor(_) => checkpoint.path.clone(),
        };
        let tensors = concerned(goal, checkpoint, first);
        Some(Finding { kind, path, record: record.map(|it| it.name.clone()), tensors, expected, found })
    };
    goals.iter().zip(seen).zip(records).filter_map(finding).collect()
}

/// Adds what hashing every tensor takes. A record that is a tensor, from its first byte to its last, is read once for both.
fn add_tensors(goals: &mut Vec<Goal>, checkpoint: &Checkpoint, first: &[TensorId]) {
    let place = |goal: &Goal| match &goal.bytes {
        Bytes::OfFile(file, range) if !range.is_empty() => Some((*file, range.start)),
        _ => None,
    };
    let by_place: HashMap<(FileId, u64), usize> =
        goals.iter().enumerate().filter_map(|(index, goal)| Some((place(goal)?, index))).collect();
    for (id, tensor) in checkpoint.iter() {
        if first[id.0 as usize] != id || tensor.backing == Backing::Meta {
            continue;
        }
        let as_it_stands = stored_range(checkpoint, id);
        let goal = as_it_stands.as_ref().and_then(|(file, range)| by_place.get(&(*file, range.start)));
        match goal.map(|&it| &mut goals[it]) {
            Some(goal)
                if goal.hash_of.is_none()
                    && as_it_stands.is_some_and(|(file, range)| is_range(&goal.bytes, file, &range)) =>
            {
                goal.hash_of = Some(id);
            }
            _ => goals.push(Goal { bytes: Bytes::OfTensor(id), wants_crc32: false, hash_of: Some(id) }),
        }
    }
}

fn is_range(bytes: &Bytes, file: FileId, range: &Range<u64>) -> bool {
    matches!(bytes, Bytes::OfFile(other, other_range) if *other == file && other_range == range)
}

/// Where a tensor's bytes stand in a file, if they stand there as they are hashed.
fn stored_range(checkpoint: &Checkpoint, id: TensorId) -> Option<(FileId, Range<u64>)> {
    let tensor = checkpoint.tensor(id);
    let piece = checkpoint.pieces(id).next().filter(|it| it.resolve.is_nothing() && is_in_order(tensor))?;
    let storage = checkpoint.storage_of(&piece);
    let stored = piece.layout.stored_bytes();
    Some((storage.file, storage.start_byte + stored.start..storage.start_byte + stored.end))
}

/// Adds the storages that stand in no record: nothing is known of their bytes, but they can be read or not.
fn add_storages(goals: &mut Vec<Goal>, checkpoint: &Checkpoint, archives: &Archives<'_>) {
    let mut in_records: Vec<(FileId, Range<u64>)> =
        archives.places.iter().map(|it| (it.file, it.range.clone())).collect();
    in_records.sort_unstable_by_key(|(file, range)| (*file, range.start));
    let mut known = HashSet::new();
    for storage in &checkpoint.storages {
        let range = storage.start_byte..storage.start_byte + storage.len_bytes;
        let next =
            in_records.partition_point(|(file, it)| (*file, it.start) <= (storage.file, storage.start_byte));
        let is_in_record = next.checked_sub(1).and_then(|it| in_records.get(it)).is_some_and(|(file, it)| {
            *file == storage.file && it.start <= range.start && range.end <= it.end
        });
        if !is_in_record && !range.is_empty() && known.insert((storage.file, range.clone())) {
            let bytes = Bytes::OfFile(storage.file, range);
            goals.push(Goal { bytes, wants_crc32: false, hash_of: None });
        }
    }
}

/// The names of all tensors that have bytes in common with a goal.
fn concerned(goal: &Goal, checkpoint: &Checkpoint, first: &[TensorId]) -> Vec<String> {
    let is_concerned = |id: TensorId| match &goal.bytes {
        Bytes::OfTensor(goal) => first[id.0 as usize] == *goal,
        Bytes::OfFile(file, range) => checkpoint.pieces(id).any(|piece| {
            let storage = checkpoint.storage_of(&piece);
            let stored = piece.layout.stored_bytes();
            let (start, end) = (storage.start_byte + stored.start, storage.start_byte + stored.end);
            storage.file == *file && start < range.end && range.start < end && start < end
        }),
    };
    let concerned = checkpoint.iter().filter(|(id, _)| is_concerned(*id));
    concerned.map(|(_, tensor)| tensor.name.clone()).collect()
}

/// Every tensor with its hash, and those that have no data.
fn manifest(checkpoint: &Checkpoint, goals: &[Goal], seen: &[Seen], first: &[TensorId]) -> Result<Manifest> {
    let hashes: HashMap<TensorId, [u8; 32]> =
        goals.iter().zip(seen).filter_map(|(goal, seen)| Some((goal.hash_of?, seen.blake3?))).collect();
    let fingerprint = |(id, tensor): (TensorId, &Tensor)| Fingerprint {
        name: tensor.name.clone(),
        dtype: tensor.layout.dtype(),
        shape: tensor.layout.shape().to_vec(),
        blake3: hashes.get(&first[id.0 as usize]).copied(),
    };
    let manifest = Manifest::new(checkpoint.iter().map(fingerprint).collect())
        .map_err(|error| error.in_file(&checkpoint.path))?;
    Ok(manifest.with_composites(Made::all(checkpoint)))
}
