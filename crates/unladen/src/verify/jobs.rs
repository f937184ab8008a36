//! Reads what a check wants to see, each byte once if it can be: records for their checksums, tensors for their hashes,
//! and both at once where a record is a tensor. What follows from it is `check`'s.

use super::{
    threads::{on_threads, total},
    tree_hash::{self, Node, PartHasher},
};
use crate::{
    checkpoint::Checkpoint,
    contents::{OpenFile, ReadPlan, Reader, Walk, is_in_order},
    error::{Error, Result},
    progress::Progress,
    tensor::{FileId, TensorId},
};
use std::ops::Range;

/// Bytes that are read from beginning to end, and what is wanted of them.
pub(super) struct Goal {
    pub(super) bytes: Bytes,
    pub(super) wants_crc32: bool,
    /// The hash of which tensor.
    pub(super) hash_of: Option<TensorId>,
}

pub(super) enum Bytes {
    OfFile(FileId, Range<u64>),
    OfTensor(TensorId),
}

impl Goal {
    pub(super) fn len_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        match &self.bytes {
            Bytes::OfFile(_, range) => range.end - range.start,
            Bytes::OfTensor(id) => checkpoint.tensor(*id).layout.len_bytes(),
        }
    }

    /// What one thread reads at a time.
    fn parts(&self, checkpoint: &Checkpoint) -> impl Iterator<Item = Range<u64>> {
        let len_bytes = self.len_bytes(checkpoint);
        let can_cut = match &self.bytes {
            // What is packed is unpacked from its beginning by everybody who reads some of it. Packed records in which no
            // tensor is are numbered behind the checkpoint's files.
            Bytes::OfFile(file, _) => {
                (file.0 as usize) < checkpoint.files.len() && !checkpoint.is_packed(*file)
            }
            Bytes::OfTensor(id) => is_in_order(checkpoint.tensor(*id)),
        };
        let whole = (!can_cut).then_some(0..len_bytes);
        let cut = can_cut.then(|| tree_hash::parts(len_bytes));
        whole.into_iter().chain(cut.into_iter().flatten())
    }

    fn walk(&self, reader: &Reader<'_>, part: &Range<u64>, is_whole: bool) -> Result<Walk> {
        match &self.bytes {
            Bytes::OfFile(file, range) => {
                Ok(reader.walk_file(*file, range.start + part.start..range.start + part.end))
            }
            Bytes::OfTensor(id) if is_whole => reader.walk(*id),
            Bytes::OfTensor(id) => reader.walk_part(*id, part.clone()),
        }
    }
}

/// What reading a goal gave.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) crc32: Option<u32>,
    pub(super) blake3: Option<Node>,
    /// Why it could not be read to the end.
    pub(super) trouble: Option<Box<Error>>,
}

/// A part of a goal, by the goal's position.
pub(super) struct Job {
    goal: u32,
    part: Range<u64>,
}

struct Done {
    crc32: Option<crc32fast::Hasher>,
    node: Option<Node>,
    trouble: Option<Box<Error>>,
}

/// What the lists take for each job and goal, the results and the tables that find them included.
pub(super) const BYTES_PER_JOB: u64 = (2 * size_of::<Job>() + 2 * size_of::<(usize, Done)>()) as u64;
pub(super) const BYTES_PER_GOAL: u64 = (2 * size_of::<Goal>() + 2 * size_of::<Seen>() + 96) as u64;

/// Cuts goals into jobs, the parts of each in order.
pub(super) fn jobs(goals: &[Goal], checkpoint: &Checkpoint) -> Vec<Job> {
    let of_goal = |(index, goal): (usize, &Goal)| {
        let job = move |part| Job { goal: index as u32, part };
        goal.parts(checkpoint).map(job).collect::<Vec<Job>>()
    };
    goals.iter().enumerate().flat_map(of_goal).collect()
}

/// Reads all goals, on the plan's threads, and returns what it saw in their order.
///
/// What the system cannot read, or what contradicts itself, is trouble of that goal alone. Fails if a file changes
/// meanwhile, if the caller cancels, or if there is no memory for the buffers.
pub(super) fn read(
    goals: &[Goal],
    jobs: &[Job],
    checkpoint: &Checkpoint,
    files: &OpenFile<'_>,
    plan: &ReadPlan,
    progress: &Progress,
) -> Result<Vec<Seen>> {
    let sizes: Vec<u64> = jobs.iter().map(|it| it.part.end - it.part.start).collect();
    progress.expect(total(&sizes));
    let reader = || Reader::new(checkpoint, files, plan, progress);
    let done = on_threads(plan.n_threads(), &sizes, reader, |reader, index| {
        let job = &jobs[index];
        let goal = &goals[job.goal as usize];
        let mut done =
            Done { crc32: goal.wants_crc32.then(crc32fast::Hasher::new), node: None, trouble: None };
        match see(goal, &job.part, reader, checkpoint, progress, &mut done) {
            Ok(()) => {}
            Err(error @ (Error::Io { .. } | Error::Corrupt(_) | Error::Unsupported(_))) => {
                done.trouble = Some(Box::new(error));
            }
            Err(error) => return Err(error),
        }
        Ok(done)
    })?;
    Ok(join(goals, jobs, done, checkpoint))
}

fn see(
    goal: &Goal,
    part: &Range<u64>,
    reader: &mut Reader<'_>,
    checkpoint: &Checkpoint,
    progress: &Progress,
    done: &mut Done,
) -> Result<()> {
    let len_bytes = goal.len_bytes(checkpoint);
    let is_whole = *part == (0..len_bytes);
    let mut hasher = goal.hash_of.map(|_| match is_whole {
        true => PartHasher::whole(),
        false => PartHasher::part(part),
    });
    let mut walk = goal.walk(reader, part, is_whole)?;
    while let Some(chunk) = reader.next(&mut walk)? {
        if let Some(crc32) = &mut done.crc32 {
            crc32.update(chunk);
        }
        if let Some(hasher) = &mut hasher {
            hasher.update(chunk);
        }
        progress.add(chunk.len() as u64);
    }
    done.node = hasher.map(|it| it.finish());
    Ok(())
}

/// Puts the parts of each goal together.
fn join(goals: &[Goal], jobs: &[Job], done: Vec<Done>, checkpoint: &Checkpoint) -> Vec<Seen> {
    let mut parts = jobs.iter().zip(done).peekable();
    let seen = goals.iter().enumerate().map(|(index, goal)| {
        let mut seen = Seen::default();
        let mut crc32: Option<crc32fast::Hasher> = None;
        let mut nodes: Vec<Node> = Vec::new();
        while let Some((_, part)) = parts.next_if(|(job, _)| job.goal as usize == index) {
            match (&mut crc32, part.crc32) {
                (Some(before), Some(part)) => before.combine(&part),
                (None, first) => crc32 = first,
                (Some(_), None) => {}
            }
            nodes.extend(part.node);
            seen.trouble = seen.trouble.or(part.trouble);
        }
        if seen.trouble.is_none() {
            seen.crc32 = crc32.map(crc32fast::Hasher::finalize);
            seen.blake3 = goal.hash_of.map(|_| tree_hash::join(&nodes, goal.len_bytes(checkpoint)));
        }
        seen
    });
    seen.collect()
}
