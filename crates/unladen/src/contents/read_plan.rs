//! Decides in what memory a checkpoint is read from beginning to end: by how many threads, in buffers of which size.

use crate::{
    checkpoint::Checkpoint,
    error::{Error, Limit, Result},
    io_path::IoPath,
    memory::{PAGE_BYTES, PROCESS_BYTES, STACK_BYTES, available_bytes, staging_bytes},
    plan::{chunk_sizes, fewer},
    source::{FileSet, io_paths},
    tensor::{Backing, Tensor},
};
use std::thread::available_parallelism;

/// Elements that stand in another order are put in order this many bytes at a time, at most. Each time, most of their
/// storage is read again.
const MAX_WINDOW_BYTES: u64 = 64 << 20;

/// And at least.
const MIN_WINDOW_BYTES: u64 = 1 << 20;

/// The disk is the limit long before this many.
const MAX_THREADS: usize = 8;

/// Names that are copied, hashes, places in lists: what a tensor takes besides what opening took.
const BYTES_PER_TENSOR: u64 = 768;

/// How all tensors of a checkpoint are read, one after the other on each of a few threads, within a host budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadPlan {
    io: Vec<IoPath>,
    n_threads: usize,
    chunk_bytes: u64,
    window_bytes: u64,
    overhead_bytes: u64,
}

impl ReadPlan {
    /// Asks the system how each file is best read, and plans to read with at most `max_threads`.
    ///
    /// Fails like [`ReadPlan::for_paths`], and if the system has less memory than the leanest way to read takes.
    pub fn new(
        checkpoint: &Checkpoint,
        files: &FileSet,
        host_budget_bytes: u64,
        max_threads: usize,
    ) -> Result<ReadPlan> {
        let io = io_paths(files);
        let n_cores = available_parallelism().map_or(2, |it| it.get()).max(2);
        // While some wait for the disk, the others keep the processors busy.
        let is_direct = io.iter().any(|it| it.is_past_cache());
        let n_threads = if is_direct && strided_bytes(checkpoint) == 0 { 2 * n_cores } else { n_cores };
        let plan = |budget_bytes| {
            ReadPlan::for_paths(checkpoint, io.clone(), budget_bytes, n_threads.min(max_threads))
        };
        // What the system has to give, the control group's limit included, is a budget too.
        let free_bytes = available_bytes().unwrap_or(u64::MAX);
        if host_budget_bytes <= free_bytes {
            return plan(host_budget_bytes);
        }
        plan(free_bytes).map_err(|error| match error {
            Error::OverBudget { path, tensor, what, needed_bytes, available_bytes, .. }
                if needed_bytes <= host_budget_bytes =>
            {
                let limit = Limit::FreeMemory;
                Error::OverBudget { path, tensor, limit, what, needed_bytes, available_bytes }
            }
            error => error,
        })
    }

    /// Plans to read by these ways, with at most so many threads; asks nobody.
    ///
    /// Fails with [`Error::OverBudget`] if the leanest way to read does not fit: it names the smallest budget that works.
    pub fn for_paths(
        checkpoint: &Checkpoint,
        io: Vec<IoPath>,
        host_budget_bytes: u64,
        max_threads: usize,
    ) -> Result<ReadPlan> {
        let strided_bytes = strided_bytes(checkpoint);
        let least_window_bytes = strided_bytes.min(MIN_WINDOW_BYTES).next_multiple_of(PAGE_BYTES);
        let fixed_bytes = fixed_bytes(checkpoint);
        let is_direct = io.iter().any(|it| it.is_past_cache());
        let least_chunk_bytes = chunk_sizes(is_direct).last().unwrap_or(PAGE_BYTES);
        let with = |n_threads: usize| {
            let n_threads = n_threads as u64;
            let available_bytes =
                host_budget_bytes.checked_sub(fixed_bytes + (n_threads - 1) * STACK_BYTES)?;
            let share_bytes = available_bytes / n_threads;
            let fits = |chunk_bytes: &u64| {
                let is_modest = strided_bytes == 0
                    || *chunk_bytes == least_chunk_bytes
                    || *chunk_bytes <= share_bytes / 8;
                is_modest && staging_bytes(*chunk_bytes).saturating_add(least_window_bytes) <= share_bytes
            };
            let chunk_bytes = chunk_sizes(is_direct).find(fits)?;
            // The larger a window is, the fewer times its storage is read again: it takes what is left.
            let left_bytes = share_bytes - staging_bytes(chunk_bytes);
            let wanted_bytes = strided_bytes.min(MAX_WINDOW_BYTES).next_multiple_of(PAGE_BYTES);
            let window_bytes = wanted_bytes.min(left_bytes - left_bytes % PAGE_BYTES);
            let buffers_bytes = staging_bytes(chunk_bytes) + window_bytes;
            let overhead_bytes = fixed_bytes + (n_threads - 1) * STACK_BYTES + n_threads * buffers_bytes;
            Some((n_threads as usize, chunk_bytes, window_bytes, overhead_bytes))
        };
        let mut teams = fewer(max_threads.clamp(1, MAX_THREADS));
        let Some((n_threads, chunk_bytes, window_bytes, overhead_bytes)) = teams.find_map(with) else {
            return Err(Error::OverBudget {
                path: checkpoint.path.clone(),
                tensor: None,
                limit: Limit::HostBudget,
                what: "reading every tensor".to_owned(),
                needed_bytes: fixed_bytes + staging_bytes(least_chunk_bytes) + least_window_bytes,
                available_bytes: host_budget_bytes,
            });
        };
        Ok(ReadPlan { io, n_threads, chunk_bytes, window_bytes, overhead_bytes })
    }

    /// How bytes come from a file, by its position.
    pub fn path(&self, file: usize) -> IoPath {
        self.io.get(file).copied().unwrap_or_default()
    }

    /// Threads that read, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// What each thread reads at once.
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// What each thread puts in order at once; zero if nothing has to be.
    pub fn window_bytes(&self) -> u64 {
        self.window_bytes
    }

    /// The most that is held in host memory: buffers, stacks, and the checkpoint's tables.
    pub fn overhead_bytes(&self) -> u64 {
        self.overhead_bytes
    }
}

/// True if the tensor's bytes stand in the file as they should.
pub(super) fn is_in_order(tensor: &Tensor) -> bool {
    matches!(tensor.backing, Backing::Storage(_)) && tensor.layout.is_contiguous()
}

/// The length of the longest tensor whose elements have to be brought into order.
fn strided_bytes(checkpoint: &Checkpoint) -> u64 {
    let strided = checkpoint.tensors.iter().filter(|it| it.backing != Backing::Meta && !is_in_order(it));
    strided.map(|it| it.layout.len_bytes()).max().unwrap_or(0)
}

/// What is held whatever the buffers.
fn fixed_bytes(checkpoint: &Checkpoint) -> u64 {
    let names: u64 = checkpoint.tensors.iter().map(|it| it.name.len() as u64).sum();
    let lists = 2 * names + checkpoint.tensors.len() as u64 * BYTES_PER_TENSOR;
    PROCESS_BYTES + checkpoint.opening_peak_bytes().max(checkpoint.metadata_bytes() + lists)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::Format,
        dtype::DType,
        tensor::{Layout, StorageId},
    };

    fn checkpoint(stride: [u64; 2]) -> Checkpoint {
        let layout = Layout::strided(DType::F32, &[4096, 4096], &stride, 0).unwrap();
        Checkpoint {
            format: Format::Pth,
            path: "a.pth".into(),
            files: Vec::new(),
            storages: Vec::new(),
            extents: Vec::new(),
            tensors: vec![Tensor { name: "w".into(), layout, backing: Backing::Storage(StorageId(0)) }],
            composites: Vec::new(),
            roots: Vec::new(),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn every_budget_is_kept_or_an_error_that_names_one_that_can_be() {
        for stride in [[4096, 1], [1, 4096]] {
            for path in IoPath::all() {
                let checkpoint = checkpoint(stride);
                let plan = |budget_bytes| ReadPlan::for_paths(&checkpoint, vec![path], budget_bytes, 4);
                for shift in 0..40 {
                    let budget_bytes = 1 << shift;
                    match plan(budget_bytes) {
                        Ok(plan) => assert!(plan.overhead_bytes() <= budget_bytes, "{plan:?}"),
                        Err(Error::OverBudget { needed_bytes, .. }) => {
                            assert!(needed_bytes > budget_bytes);
                            assert!(plan(needed_bytes).is_ok() && plan(needed_bytes - 1).is_err());
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                assert!(plan(u64::MAX).is_ok_and(|it| it.n_threads() == 4));
            }
        }
    }

    #[test]
    fn what_stands_in_order_needs_no_window_and_what_does_not_gets_what_there_is() {
        let plan =
            |stride| ReadPlan::for_paths(&checkpoint(stride), vec![IoPath::Direct], 64 << 20, 2).unwrap();
        assert_eq!((plan([4096, 1]).window_bytes(), plan([4096, 1]).chunk_bytes()), (0, 4 << 20));
        assert!(plan([1, 4096]).window_bytes() > 24 << 20);
    }
}
