//! Decides what a load will do, as plain data: steps over named slots, and the peaks that they will reach.
//!
//! A strategy is a generator of steps; the engine runs any of them. Only `Reserve`, `Map` and `Release` change what is
//! held, and they are barriers, so a walk over the steps predicts the peaks exactly. No I/O here.

mod choose;
mod generate;
mod granules;
mod items;
mod model;
mod on_gpu;
mod options;
mod place;
mod size;
mod staging;
mod steps;
mod strategy;

pub use choose::paths_of;
pub use granules::GRANULE_BYTES;
pub use options::{DEFAULT_HOST_BUDGET_BYTES, Intent, Machine, PlanOptions, UNKNOWN_GPU_BYTES};
pub use staging::{PLACED_BYTES, chunk_sizes, fewer};
pub use steps::{Change, Copy, Fill, Fresh, Gather, Part, Read, Rooms, SlotId, Span, Step, Way};
pub use strategy::Strategy;

use crate::{
    checkpoint::Checkpoint,
    device::{Device, PerDevice},
    error::Result,
    io_path::IoPath,
    memory::{Held, Peaks, Space},
    tensor::{Layout, TensorId},
};
use std::collections::HashSet;

/// What a load will do.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    steps: Vec<Step>,
    n_slots: usize,
    strategy: Strategy,
    devices: Vec<Device>,
    n_threads: usize,
    io: Vec<IoPath>,
    /// Of the files that it is for.
    fingerprint: u64,
    bookkeeping_bytes: u64,
    predicted: Peaks,
    driver_bytes: PerDevice,
    weights_bytes: PerDevice,
}

impl LoadPlan {
    /// Plans a load of every tensor of `checkpoint` into memory that the load reserves.
    ///
    /// Fails with [`Error::OverBudget`](crate::Error::OverBudget) if no way of loading fits: it says what is too large and
    /// the smallest budget that works. Expanded views that no address space could hold, terabytes from a few bytes of
    /// file, fail so too.
    pub fn new(checkpoint: &Checkpoint, options: &PlanOptions, machine: &Machine) -> Result<LoadPlan> {
        choose::plan(checkpoint, options, machine)
    }

    /// Plans to fill memory that the caller owns: one slot per tensor, in the checkpoint's order.
    ///
    /// Fails like [`LoadPlan::new`].
    pub fn into_caller_memory(
        checkpoint: &Checkpoint,
        options: &PlanOptions,
        machine: &Machine,
    ) -> Result<LoadPlan> {
        choose::plan_into_caller_memory(checkpoint, options, machine)
    }

    /// The steps, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The [`fingerprint`](crate::stamp::fingerprint) of the files that the plan is for.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Slot numbers are below this.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// The way of loading that was named or chosen.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Where weights will stay, each device once.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// True if weights go to a GPU.
    pub fn is_for_gpus(&self) -> bool {
        self.devices.iter().any(|it| *it != Device::Host)
    }

    /// Threads that read and copy, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// How bytes will come from each file, by position.
    pub fn io(&self) -> &[IoPath] {
        &self.io
    }

    /// How each file comes, in words: by its path of input, or `mapped` if nothing of it is read.
    pub fn inputs(&self) -> Vec<&'static str> {
        let mut inputs: Vec<_> = self.io.iter().map(|it| it.name()).collect();
        let mut is_read = vec![false; inputs.len()];
        for read in self.steps.iter().flat_map(Step::reads) {
            let gathers = match &read.way {
                Way::Gather(gathers) => &gathers[..],
                Way::Plain | Way::Elements(_) | Way::Parts(_) | Way::Boxes(_) => &[],
            };
            for file in gathers.iter().map(|it| it.file).chain([read.file]) {
                is_read[file.0 as usize] = true;
            }
        }
        for step in &self.steps {
            if let Step::Map { file, .. } = step
                && !is_read[file.0 as usize]
            {
                inputs[file.0 as usize] = "mapped";
            }
        }
        inputs
    }

    /// What the load holds all along in names, shapes, steps and stacks.
    pub fn bookkeeping_bytes(&self) -> u64 {
        self.bookkeeping_bytes
    }

    /// The peaks that running the plan will reach.
    pub fn predicted(&self) -> Peaks {
        self.predicted
    }

    /// What running the plan will take at most of each GPU's free memory; nothing of the host's. It is
    /// [`predicted`](LoadPlan::predicted) as drivers round it up: memory of at least 1 MiB to whole granules of
    /// [`GRANULE_BYTES`], what is smaller to 512 bytes, of which many share a granule.
    pub fn predicted_driver_bytes(&self) -> PerDevice {
        self.driver_bytes
    }

    /// Memory that stays with the weights when the load is over, on all devices; none for mappings and for the caller's
    /// memory.
    pub fn weights_bytes(&self) -> u64 {
        self.weights_bytes.total_bytes()
    }

    /// The same, by device.
    pub fn weights_by_device(&self) -> PerDevice {
        self.weights_bytes
    }

    /// The most that the load holds in host memory besides the weights: what the host budget is about.
    pub fn overhead_bytes(&self) -> u64 {
        self.predicted.host_anon_bytes - self.weights_bytes.host_bytes
    }

    /// What is held before the first step.
    fn held_before(&self) -> Held {
        Held { bookkeeping_bytes: self.bookkeeping_bytes, ..Held::default() }
    }

    /// What will be held after each step.
    pub fn walk(&self) -> impl Iterator<Item = Held> {
        let mut held = self.held_before();
        let mut slots = vec![None; self.n_slots];
        self.steps.iter().map(move |step| {
            match step {
                Step::Reserve { slot, space, len_bytes, .. } => {
                    slots[slot.0 as usize] = Some((*space, *len_bytes));
                    held.add(*space, *len_bytes);
                }
                Step::Map { slot, len_bytes, .. } => {
                    slots[slot.0 as usize] = Some((Space::Mapped, *len_bytes));
                    held.mapped_bytes += len_bytes;
                }
                Step::Release(slot) => {
                    if let Some((space, len_bytes)) = slots[slot.0 as usize].take() {
                        held.subtract(space, len_bytes);
                    }
                }
                Step::Adopt { .. }
                | Step::Fill(_)
                | Step::Stream { .. }
                | Step::Upload { .. }
                | Step::Populate { .. }
                | Step::Copy(_)
                | Step::HandOver { .. } => {}
            }
            held
        })
    }

    /// Every tensor that is handed over, with its layout in memory.
    pub fn layouts(&self) -> impl Iterator<Item = (TensorId, &Layout)> {
        self.steps.iter().filter_map(|step| match step {
            Step::HandOver { tensor, layout, .. } => Some((*tensor, layout)),
            _ => None,
        })
    }

    /// Bytes of the tensors that are handed over; tied ones count once.
    pub fn brought_bytes(&self) -> u64 {
        let mut seen = HashSet::new();
        let of_step = |step: &Step| match step {
            Step::HandOver { slot, start_byte, layout, .. } => {
                let is_new =
                    seen.insert((*slot, start_byte + layout.stored_bytes().start, layout.len_bytes()));
                if is_new { layout.len_bytes() } else { 0 }
            }
            _ => 0,
        };
        self.steps.iter().map(of_step).sum()
    }

    /// Bytes that the steps read from files.
    pub fn read_bytes(&self) -> u64 {
        self.steps.iter().flat_map(Step::reads).map(|read| read.len_bytes).sum()
    }

    /// Bytes that the steps read, copy or bring in: the measure of progress.
    pub fn work_bytes(&self) -> u64 {
        let others = self.steps.iter().map(|step| match step {
            Step::Copy(copy) => copy.source.len_bytes,
            Step::Populate { ranges, .. } => ranges.iter().map(|it| it.end - it.start).sum(),
            _ => 0,
        });
        self.read_bytes() + others.sum::<u64>()
    }
}
