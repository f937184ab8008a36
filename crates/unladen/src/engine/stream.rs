//! Reads chunks to where they belong, several at a time: in place where they can land there, else by a staging buffer.

use super::{Io, Slots, missing, split};
use crate::{
    destination::Arena,
    error::Result,
    memory::HostBuffer,
    plan::{Chunk, SlotId, Span},
    source::{FileSource, ReadAt},
    tensor::FileId,
};
use std::sync::Arc;

/// What one thread has for itself.
struct Worker<'s> {
    staging: Option<&'s mut HostBuffer>,
    file: Option<(FileId, Arc<FileSource>)>,
}

pub(super) fn stream(
    staging: &[SlotId],
    chunks: &[Chunk],
    slots: &mut Slots<'_>,
    n_threads: usize,
    io: Io<'_>,
) -> Result<()> {
    // Staging buffers leave their slots while they are in use, so that the targets can be split.
    let mut ring = Vec::new();
    for &slot in staging {
        match slots[slot.0 as usize].take().ok_or_else(|| missing(slot))? {
            Arena::Owned(buffer) => ring.push(buffer),
            _ => return Err(missing(slot)),
        }
    }
    let jobs: Vec<(Span, &[Chunk])> = jobs(chunks).map(|job| (job[0].target, job)).collect();
    let n_workers = if staging.is_empty() { n_threads } else { staging.len() };
    let result = split::disjoint(slots, jobs).and_then(|jobs| {
        let mut buffers = ring.iter_mut();
        let workers = (0..n_workers).map(|_| Worker { staging: buffers.next(), file: None });
        split::for_each(jobs, workers.collect(), |worker, (target, chunks)| {
            chunks.iter().try_for_each(|chunk| read(worker, chunk, target, io))?;
            // Files of a large folder do not stay open until the end of the load.
            worker.file.as_ref().map_or(Ok(()), |(_, file)| file.check_unchanged())
        })
    });
    for (&slot, buffer) in staging.iter().zip(ring) {
        slots[slot.0 as usize] = Some(Arena::Owned(buffer));
    }
    result
}

/// One chunk, or the consecutive chunks that share a target and so must go one after the other.
fn jobs(chunks: &[Chunk]) -> impl Iterator<Item = &[Chunk]> {
    chunks.chunk_by(|one, next| one.via.is_some() && one.target == next.target)
}

fn read(worker: &mut Worker<'_>, chunk: &Chunk, target: &mut [u8], io: Io<'_>) -> Result<()> {
    io.progress.check(io.path)?;
    let file = match &worker.file {
        Some((file, source)) if *file == chunk.file => Arc::clone(source),
        _ => {
            let source = io.files.get(chunk.file.0 as usize)?;
            worker.file = Some((chunk.file, Arc::clone(&source)));
            source
        }
    };
    match &chunk.via {
        None => {
            file.read_exact_at(chunk.start_byte, target)?;
            if let Some((dtype, resolve)) = chunk.resolve {
                resolve.apply(dtype, target);
            }
        }
        Some(block) => {
            let staging = worker.staging.as_mut().map(|it| it.as_mut_slice()).unwrap_or_default();
            let Some(bytes) = staging.get_mut(..chunk.len_bytes as usize) else {
                return Err(missing(chunk.target.slot));
            };
            file.read_exact_at(chunk.start_byte, bytes)?;
            if let Some((dtype, resolve)) = chunk.resolve {
                resolve.apply(dtype, bytes);
            }
            block.gather(bytes, target);
        }
    }
    io.progress.add(chunk.len_bytes);
    Ok(())
}
