//! What a load holds besides weights and staging: names, shapes, steps, stacks. An estimate that is never under, so that
//! the budget is kept.

use super::steps::{Gather, Part, Read, Step, Way};
use crate::{
    checkpoint::Checkpoint,
    memory::{PROCESS_BYTES, STACK_BYTES, UNPACKING_BYTES},
};

/// What a tensor takes in the state dict and on the way there, its name apart. Measured on files of 100,000 tensors: at most
/// 460 bytes, of which the allocator's own gaps are a part.
const BYTES_PER_TENSOR: u64 = 472;

/// Bytes that the checkpoint's tables, the plan, the state dict and the threads take.
pub(super) fn bookkeeping_bytes(checkpoint: &Checkpoint, steps: &[Step], n_threads: usize) -> u64 {
    let names: u64 = checkpoint.tensors.iter().map(|it| it.name.len() as u64).sum();
    let state = names + checkpoint.tensors.len() as u64 * BYTES_PER_TENSOR;
    // The caller's thread reads along, unless it has a GPU's driver to wait for.
    let uploads = steps.iter().any(|step| matches!(step, Step::Upload { .. }));
    let n_stacks = n_threads.max(1) as u64 - u64::from(!uploads);
    let stacks = n_stacks.saturating_mul(STACK_BYTES);
    // What passed while the checkpoint was opened is free again when the plan is made.
    let tables = checkpoint.metadata_bytes() + checkpoint.packed_list_bytes() + steps_bytes(steps) + state;
    let unpacking = n_unpacking(checkpoint, steps).min(n_threads) as u64 * UNPACKING_BYTES;
    PROCESS_BYTES + checkpoint.opening_peak_bytes().max(tables) + stacks + unpacking
}

/// How many packed records can be read at the same time, were there threads for all of them.
fn n_unpacking(checkpoint: &Checkpoint, steps: &[Step]) -> usize {
    if checkpoint.n_packed() == 0 {
        return 0;
    }
    let unpacks = |read: &Read| match &read.way {
        Way::Gather(gathers) => gathers.iter().any(|it| checkpoint.is_packed(it.file)),
        Way::Plain | Way::Elements(_) | Way::Parts(_) | Way::Boxes(_) => checkpoint.is_packed(read.file),
    };
    let of_step =
        |step: &Step| step.reads().chunk_by(Read::goes_with).filter(|run| run.iter().any(unpacks)).count();
    steps.iter().map(of_step).max().unwrap_or(0)
}

/// Bytes of the steps on the heap.
fn steps_bytes(steps: &[Step]) -> u64 {
    let of_read = |read: &Read| match &read.way {
        Way::Plain | Way::Elements(_) => 0,
        Way::Parts(parts) => parts.capacity() * size_of::<Part>(),
        Way::Gather(gathers) => gathers.capacity() * size_of::<Gather>(),
        Way::Boxes(_) => size_of::<Gather>(),
    };
    let of_step = |step: &Step| match step {
        Step::Stream { reads, .. } | Step::Upload { reads, .. } => {
            reads.capacity() * size_of::<Read>() + reads.iter().map(of_read).sum::<usize>()
        }
        Step::Fill(fills) => fills.capacity() * size_of::<super::Fill>(),
        Step::Populate { ranges, .. } => size_of_val(&ranges[..]),
        _ => 0,
    };
    // The vector of steps may have room for twice as many, which nobody touched.
    (size_of_val(steps) + steps.iter().map(of_step).sum::<usize>()) as u64
}
