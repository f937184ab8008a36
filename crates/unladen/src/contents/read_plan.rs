//! Decides in what memory a checkpoint is read from beginning to end: by how many threads, in buffers of which size.

mod side_by_side;

use crate::{
    checkpoint::Checkpoint,
    error::{Error, Limit, Result},
    io_path::IoPath,
    memory::{PAGE_BYTES, PROCESS_BYTES, STACK_BYTES, UNPACKING_BYTES, available_bytes, staging_bytes},
    plan::{chunk_sizes, fewer, paths_of},
    source::{FileSet, io_paths},
    tensor::{Backing, Tensor, TensorId},
};
use std::thread::available_parallelism;

/// Elements that stand in another order are put in order this many bytes at a time, at most. Each time, most of their
/// storage is read again.
const MAX_WINDOW_BYTES: u64 = 64 << 20;

/// And at least.
const MIN_WINDOW_BYTES: u64 = 1 << 20;

/// A packed record is unpacked at most so many times for a tensor whose elements stand in another order, once each time:
/// the larger it is, the more memory it takes.
const MAX_UNPACKED_TIMES: u64 = 64;

/// The disk is the limit long before this many.
const MAX_THREADS: usize = 8;

/// Names that are copied, hashes, places in lists: what a tensor takes besides what opening took.
const BYTES_PER_TENSOR: u64 = 768;

/// The same where only the files are read: places in lists, and in tables of what was seen before.
const BYTES_PER_TENSOR_OF_FILES: u64 = 96;

/// What is read from beginning to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// Tensors, with every element in its place.
    Tensors,
    /// Ranges of the files, as their bytes stand there: nothing has to be brought into order.
    Files,
}

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
        ReadPlan::of(Strided::of(checkpoint), checkpoint, files, host_budget_bytes, max_threads)
    }

    fn of(
        strided: Strided,
        checkpoint: &Checkpoint,
        files: &FileSet,
        host_budget_bytes: u64,
        max_threads: usize,
    ) -> Result<ReadPlan> {
        let io = io_paths(files);
        let n_threads = n_threads(strided, &io).min(max_threads);
        let plan =
            |budget_bytes| ReadPlan::for_strided(strided, checkpoint, io.clone(), budget_bytes, n_threads);
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

    /// As [`ReadPlan::new`], where whoever reads holds some bytes more all the while, and reads `reads`.
    pub fn beside(
        held_bytes: u64,
        reads: Reads,
        checkpoint: &Checkpoint,
        files: &FileSet,
        host_budget_bytes: u64,
        max_threads: usize,
    ) -> Result<ReadPlan> {
        let lists_bytes = lists_bytes(reads, checkpoint).saturating_add(held_bytes);
        let strided = match reads {
            Reads::Tensors => Strided::of(checkpoint),
            Reads::Files => Strided::default(),
        };
        let strided = Strided { lists_bytes, ..strided };
        ReadPlan::of(strided, checkpoint, files, host_budget_bytes, max_threads)
    }

    /// Plans to read two checkpoints side by side: as many threads for the one as for the other, each with buffers for
    /// both.
    ///
    /// Fails like [`ReadPlan::new`]; the smallest budget that it names is for both.
    pub fn pair(
        pair: [(&Checkpoint, &FileSet); 2],
        host_budget_bytes: u64,
        max_threads: usize,
    ) -> Result<[ReadPlan; 2]> {
        let [one, other] = pair.map(|(checkpoint, files)| (checkpoint, io_paths(files)));
        let free_bytes = available_bytes().unwrap_or(u64::MAX);
        ReadPlan::pair_for_paths([one, other], host_budget_bytes, free_bytes, max_threads)
    }

    fn pair_for_paths(
        pair: [(&Checkpoint, Vec<IoPath>); 2],
        host_budget_bytes: u64,
        free_bytes: u64,
        max_threads: usize,
    ) -> Result<[ReadPlan; 2]> {
        let pair = pair.map(|(checkpoint, io)| (checkpoint, paths_of(checkpoint, &io)));
        let needed = [&pair[0], &pair[1]]
            .map(|(checkpoint, io)| needed_bytes(Strided::of(checkpoint), checkpoint, io));
        let needed_bytes = needed[0].saturating_add(needed[1]);
        let Some(spare_bytes) = host_budget_bytes.min(free_bytes).checked_sub(needed_bytes) else {
            let is_allowed = needed_bytes <= host_budget_bytes;
            return Err(Error::OverBudget {
                path: pair[0].0.path.clone(),
                tensor: None,
                limit: if is_allowed { Limit::FreeMemory } else { Limit::HostBudget },
                what: "reading two checkpoints side by side".to_owned(),
                needed_bytes,
                available_bytes: host_budget_bytes.min(free_bytes),
            });
        };
        let plan = |side: usize, max_threads: usize| {
            let (checkpoint, io) = &pair[side];
            let budget_bytes = needed[side].saturating_add(spare_bytes / 2);
            ReadPlan::for_paths(checkpoint, io.clone(), budget_bytes, max_threads)
        };
        let most = |side: usize| {
            let (checkpoint, io) = &pair[side];
            n_threads(Strided::of(checkpoint), io).min(max_threads)
        };
        let n_threads = plan(0, most(0))?.n_threads.min(plan(1, most(1))?.n_threads);
        Ok([plan(0, n_threads)?, plan(1, n_threads)?])
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
        ReadPlan::for_strided(Strided::of(checkpoint), checkpoint, io, host_budget_bytes, max_threads)
    }

    fn for_strided(
        strided: Strided,
        checkpoint: &Checkpoint,
        io: Vec<IoPath>,
        host_budget_bytes: u64,
        max_threads: usize,
    ) -> Result<ReadPlan> {
        let io = paths_of(checkpoint, &io);
        let strided_bytes = strided.longest_bytes;
        let fixed_bytes = fixed_bytes(strided.lists_bytes, checkpoint);
        let n_packed = checkpoint.n_packed() as u64;
        let is_direct = is_direct(&io);
        let (least_chunk_bytes, least_window_bytes) = least_buffers(strided, is_direct);
        let with = |n_threads: usize| {
            let n_threads = n_threads as u64;
            let unpacking_bytes = n_threads.min(n_packed) * UNPACKING_BYTES;
            let fixed_bytes = fixed_bytes + (n_threads - 1) * STACK_BYTES + unpacking_bytes;
            let available_bytes = host_budget_bytes.checked_sub(fixed_bytes)?;
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
            let wanted_bytes = wanted_bytes.max(least_window_bytes);
            let window_bytes = wanted_bytes.min(left_bytes - left_bytes % PAGE_BYTES);
            let buffers_bytes = staging_bytes(chunk_bytes) + window_bytes;
            let overhead_bytes = fixed_bytes + n_threads * buffers_bytes;
            Some((n_threads as usize, chunk_bytes, window_bytes, overhead_bytes))
        };
        let mut teams = fewer(max_threads.clamp(1, MAX_THREADS));
        let Some((n_threads, chunk_bytes, window_bytes, overhead_bytes)) = teams.find_map(with) else {
            return Err(Error::OverBudget {
                path: checkpoint.path.clone(),
                tensor: None,
                limit: Limit::HostBudget,
                what: "reading every tensor".to_owned(),
                needed_bytes: needed_bytes(strided, checkpoint, &io),
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

/// True if bytes come from a disk.
fn is_direct(io: &[IoPath]) -> bool {
    io.iter().any(|it| it.is_past_cache())
}

/// What has to be brought into order, and what else is held all the while.
#[derive(Clone, Copy, Default)]
struct Strided {
    /// The length of the longest tensor whose elements stand in another order.
    longest_bytes: u64,
    /// The same, of the tensors that are packed.
    longest_packed_bytes: u64,
    /// Lists besides the checkpoint's tables: they come when what opening took for a while is free again.
    lists_bytes: u64,
}

impl Strided {
    /// Of all tensors.
    fn of(checkpoint: &Checkpoint) -> Strided {
        let all = || checkpoint.iter().map(|it| it.0);
        Strided {
            longest_bytes: strided_bytes(checkpoint, all()),
            longest_packed_bytes: packed_strided_bytes(checkpoint, all()),
            lists_bytes: lists_bytes(Reads::Tensors, checkpoint),
        }
    }
}

/// Threads that keep this machine busy.
fn n_threads(strided: Strided, io: &[IoPath]) -> usize {
    let n_cores = available_parallelism().map_or(2, |it| it.get()).max(2);
    // While some wait for the disk, the others keep the processors busy.
    if is_direct(io) && strided.longest_bytes == 0 { 2 * n_cores } else { n_cores }
}

/// What one thread reads and brings into order at once, at least.
fn least_buffers(strided: Strided, is_direct: bool) -> (u64, u64) {
    let least_of_packed_bytes = strided.longest_packed_bytes.div_ceil(MAX_UNPACKED_TIMES);
    let window_bytes = MIN_WINDOW_BYTES.max(least_of_packed_bytes).min(strided.longest_bytes);
    (chunk_sizes(is_direct).last().unwrap_or(PAGE_BYTES), window_bytes.next_multiple_of(PAGE_BYTES))
}

/// What the leanest way to read takes.
fn needed_bytes(strided: Strided, checkpoint: &Checkpoint, io: &[IoPath]) -> u64 {
    let (chunk_bytes, window_bytes) = least_buffers(strided, is_direct(io));
    let unpacking_bytes = (checkpoint.n_packed() as u64).min(1) * UNPACKING_BYTES;
    fixed_bytes(strided.lists_bytes, checkpoint) + unpacking_bytes + staging_bytes(chunk_bytes) + window_bytes
}

/// True if the tensor's bytes stand in the file as they should, one after the other.
pub fn is_in_order(tensor: &Tensor) -> bool {
    matches!(tensor.backing, Backing::Storage(_)) && tensor.layout.is_contiguous()
}

/// True if its elements are brought into order: they stand in another, and are not refused for being too many.
fn is_put_in_order(tensor: &Tensor) -> bool {
    !is_in_order(tensor) && tensor.layout.check_expansion().is_ok()
}

/// The length of the longest of these tensors whose elements have to be brought into order.
fn strided_bytes(checkpoint: &Checkpoint, ids: impl Iterator<Item = TensorId>) -> u64 {
    let tensors = ids.map(|id| checkpoint.tensor(id));
    let strided = tensors.filter(|it| it.backing != Backing::Meta && is_put_in_order(it));
    strided.map(|it| it.layout.len_bytes()).max().unwrap_or(0)
}

/// As [`strided_bytes`], of the tensors that are packed.
fn packed_strided_bytes(checkpoint: &Checkpoint, ids: impl Iterator<Item = TensorId>) -> u64 {
    if checkpoint.n_packed() == 0 {
        return 0;
    }
    let is_packed =
        |id| checkpoint.pieces(id).any(|it| checkpoint.is_packed(checkpoint.storage_of(&it).file));
    let strided = ids.filter(|id| is_put_in_order(checkpoint.tensor(*id)) && is_packed(*id));
    strided.map(|id| checkpoint.tensor(id).layout.len_bytes()).max().unwrap_or(0)
}

/// What whoever reads keeps of each tensor.
fn lists_bytes(reads: Reads, checkpoint: &Checkpoint) -> u64 {
    let n_tensors = checkpoint.tensors.len() as u64;
    match reads {
        Reads::Tensors => {
            let names: u64 = checkpoint.tensors.iter().map(|it| it.name.len() as u64).sum();
            2 * names + n_tensors * BYTES_PER_TENSOR
        }
        Reads::Files => n_tensors * BYTES_PER_TENSOR_OF_FILES,
    }
}

/// What is held whatever the buffers.
fn fixed_bytes(lists_bytes: u64, checkpoint: &Checkpoint) -> u64 {
    let tables_bytes = checkpoint.metadata_bytes() + checkpoint.packed_list_bytes();
    PROCESS_BYTES + checkpoint.opening_peak_bytes().max(tables_bytes.saturating_add(lists_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::Format,
        dtype::DType,
        stamp::{Encoding, FileStamp, Packed},
        tensor::{FileId, Layout, Storage, StorageId},
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
    fn a_packed_tensor_is_gone_through_a_bounded_number_of_times() {
        let mut packed = checkpoint([1, 4096]);
        let file =
            FileStamp { path: "a.pth".into(), dev: 0, ino: 0, len_bytes: 9, mtime_ns: 0, packed: None };
        let record = Packed {
            name: "a/data/0".into(),
            encoding: Encoding::Deflate,
            start_byte: 0,
            len_bytes: 9,
            file_len_bytes: 9,
            crc32: None,
        };
        packed.files = vec![file.clone(), file.of_packed(64 << 20, record)];
        packed.storages =
            vec![Storage { file: FileId(1), start_byte: 0, len_bytes: 64 << 20, swapped: false }];
        let plan = |checkpoint: &Checkpoint, budget_bytes| {
            ReadPlan::for_paths(checkpoint, vec![IoPath::Direct; 2], budget_bytes, 2)
        };
        let needed_bytes = |checkpoint: &Checkpoint| match plan(checkpoint, 0) {
            Err(Error::OverBudget { needed_bytes, .. }) => needed_bytes,
            other => panic!("{other:?}"),
        };
        let of_64_mib = needed_bytes(&packed);
        assert_eq!(plan(&packed, of_64_mib).unwrap().window_bytes(), 1 << 20);
        assert!(plan(&packed, of_64_mib - 1).is_err());
        assert_eq!(plan(&packed, of_64_mib).unwrap().path(1), IoPath::DropBehind);
        // Four times as long, four times the window.
        packed.tensors[0].layout = Layout::strided(DType::F32, &[16384, 4096], &[1, 16384], 0).unwrap();
        assert_eq!(needed_bytes(&packed), of_64_mib + (3 << 20));
        let window_bytes = plan(&packed, needed_bytes(&packed)).unwrap().window_bytes();
        assert!(window_bytes * MAX_UNPACKED_TIMES >= 256 << 20);
        // One that is stored does with less.
        packed.storages[0].file = FileId(0);
        assert!(needed_bytes(&packed) < of_64_mib + (3 << 20));
    }

    #[test]
    fn two_checkpoints_share_a_budget_and_have_as_many_threads() {
        let (plain, strided) = (checkpoint([4096, 1]), checkpoint([1, 4096]));
        let pair = |budget_bytes, free_bytes| {
            let pair = [(&plain, vec![IoPath::Buffered]), (&strided, vec![IoPath::Direct])];
            ReadPlan::pair_for_paths(pair, budget_bytes, free_bytes, 4)
        };
        for shift in 0..40 {
            let budget_bytes = 1 << shift;
            match pair(budget_bytes, u64::MAX) {
                Ok([one, other]) => {
                    assert!(one.overhead_bytes() + other.overhead_bytes() <= budget_bytes);
                    assert_eq!(one.n_threads(), other.n_threads());
                }
                Err(Error::OverBudget { needed_bytes, limit, .. }) => {
                    assert!(needed_bytes > budget_bytes && limit == Limit::HostBudget);
                    assert!(
                        pair(needed_bytes, u64::MAX).is_ok() && pair(needed_bytes - 1, u64::MAX).is_err()
                    );
                    let error = pair(u64::MAX, needed_bytes - 1).unwrap_err();
                    assert!(matches!(error, Error::OverBudget { limit: Limit::FreeMemory, .. }), "{error}");
                }
                Err(error) => panic!("{error}"),
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
