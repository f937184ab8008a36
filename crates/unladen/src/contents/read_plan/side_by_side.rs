//! Decides in what memory a few tensors are read side by side, by one thread: as little as does.

use super::{
    ReadPlan, Reads, Strided, fixed_bytes, is_direct, least_buffers, lists_bytes, packed_strided_bytes,
    strided_bytes,
};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Limit, Result},
    memory::{UNPACKING_BYTES, available_bytes, staging_bytes},
    plan::paths_of,
    source::{FileSet, io_paths},
    tensor::TensorId,
};

impl ReadPlan {
    /// Plans to read some tensors, up to `n_at_once` at a time on one thread: each by a [`Reader`](super::super::Reader)
    /// of this plan whose last bytes are kept once more. Whoever reads holds some bytes more all the while, and the lists
    /// of a plan that reads `reads`.
    ///
    /// Fails with [`Error::OverBudget`] if that does not fit: it names the smallest budget that works.
    pub fn side_by_side(
        ids: &[TensorId],
        n_at_once: usize,
        held_bytes: u64,
        reads: Reads,
        checkpoint: &Checkpoint,
        files: &FileSet,
        host_budget_bytes: u64,
    ) -> Result<ReadPlan> {
        let io = paths_of(checkpoint, &io_paths(files));
        let strided = Strided {
            longest_bytes: strided_bytes(checkpoint, ids.iter().copied()),
            longest_packed_bytes: packed_strided_bytes(checkpoint, ids.iter().copied()),
            lists_bytes: lists_bytes(reads, checkpoint).saturating_add(held_bytes),
        };
        let (chunk_bytes, window_bytes) = least_buffers(strided, is_direct(&io));
        let buffers_bytes = staging_bytes(chunk_bytes) + window_bytes + chunk_bytes.max(window_bytes);
        let n_at_once = n_at_once as u64;
        let unpacking_bytes = n_at_once.min(checkpoint.n_packed() as u64) * UNPACKING_BYTES;
        let needed_bytes =
            fixed_bytes(strided.lists_bytes, checkpoint) + unpacking_bytes + n_at_once * buffers_bytes;
        let free_bytes = available_bytes().unwrap_or(u64::MAX);
        if needed_bytes > host_budget_bytes.min(free_bytes) {
            let is_allowed = needed_bytes <= host_budget_bytes;
            return Err(Error::OverBudget {
                path: checkpoint.path.clone(),
                tensor: None,
                limit: if is_allowed { Limit::FreeMemory } else { Limit::HostBudget },
                what: "reading indices side by side".to_owned(),
                needed_bytes,
                available_bytes: host_budget_bytes.min(free_bytes),
            });
        }
        Ok(ReadPlan { io, n_threads: 1, chunk_bytes, window_bytes, overhead_bytes: needed_bytes })
    }
}
