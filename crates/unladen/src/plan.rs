//! Decides what a load will do, as plain data: steps over named slots, and the peaks that they will reach.
//!
//! A strategy is a generator of steps; the engine runs any of them. Only `Reserve`, `Map` and `Release` change what is
//! held, and they are barriers, so a walk over the steps predicts the peaks exactly. No I/O here.

mod items;
mod place;
mod steps;
mod strategy;

pub use steps::{Chunk, Copy, Fill, SlotId, Span, Step};
pub use strategy::Strategy;

use crate::{
    checkpoint::Checkpoint,
    device::Device,
    error::{Error, Result},
    memory::{Held, Peaks, Space},
};

/// What the caller decides about a load.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    /// The way of loading.
    pub strategy: Strategy,
    /// Where the weights will stay.
    pub device: Device,
    /// Threads that read and copy; each has a staging buffer where bytes cannot land in place.
    pub n_threads: usize,
}

impl PlanOptions {
    /// A strategy with what this machine suggests for the rest.
    pub fn new(strategy: Strategy) -> PlanOptions {
        // More threads than this do not make one file come faster.
        let n_threads = std::thread::available_parallelism().map_or(2, |it| it.get().min(8));
        PlanOptions { strategy, device: Device::Host, n_threads }
    }
}

/// More than any machine addresses, and far enough below 2⁶⁴ that no sum of a plan overflows.
const MAX_PLAN_BYTES: u64 = 1 << 56;

/// What a load will do.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    steps: Vec<Step>,
    n_slots: usize,
    options: PlanOptions,
    predicted: Peaks,
}

impl LoadPlan {
    /// Plans a load of every tensor of `checkpoint` into memory that the load reserves.
    ///
    /// Fails with [`Error::OverBudget`] if no address space could ever hold the tensors: expanded views claim
    /// terabytes with a few bytes of file.
    pub fn new(checkpoint: &Checkpoint, options: PlanOptions) -> Result<LoadPlan> {
        check_size(checkpoint)?;
        Ok(LoadPlan::of(strategy::steps(checkpoint, &options), options))
    }

    /// Plans to fill memory that the caller owns: one slot per tensor, in the checkpoint's order.
    ///
    /// Fails like [`LoadPlan::new`].
    pub fn into_caller_memory(checkpoint: &Checkpoint, options: PlanOptions) -> Result<LoadPlan> {
        check_size(checkpoint)?;
        Ok(LoadPlan::of(strategy::steps_into_caller_memory(checkpoint, &options), options))
    }

    fn of(steps: steps::Steps, options: PlanOptions) -> LoadPlan {
        let mut plan = LoadPlan {
            n_slots: steps.n_slots(),
            steps: steps.into_vec(),
            options,
            predicted: Peaks::default(),
        };
        plan.predicted = plan.walk().fold(Peaks::default(), |mut peaks, held| {
            peaks.raise(held, plan.options.device == Device::Host);
            peaks
        });
        plan
    }

    /// The steps, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Slot numbers are below this.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// What the plan was made for.
    pub fn options(&self) -> &PlanOptions {
        &self.options
    }

    /// The peaks that running the plan will reach.
    pub fn predicted(&self) -> Peaks {
        self.predicted
    }

    /// What will be held after each step.
    pub fn walk(&self) -> impl Iterator<Item = Held> {
        let mut held = Held::default();
        let mut slots = vec![None; self.n_slots];
        self.steps.iter().map(move |step| {
            match step {
                Step::Reserve { slot, space, len_bytes, .. } => {
                    slots[slot.0 as usize] = Some((*space, *len_bytes));
                    *held.of(*space) += len_bytes;
                }
                Step::Map { slot, len_bytes, .. } => {
                    slots[slot.0 as usize] = Some((Space::Mapped, *len_bytes));
                    held.mapped_bytes += len_bytes;
                }
                Step::Release(slot) => {
                    if let Some((space, len_bytes)) = slots[slot.0 as usize].take() {
                        *held.of(space) -= len_bytes;
                    }
                }
                Step::Adopt { .. }
                | Step::Fill(_)
                | Step::Stream { .. }
                | Step::Copy(_)
                | Step::HandOver { .. } => {}
            }
            held
        })
    }

    /// Bytes that the steps read from files.
    pub fn read_bytes(&self) -> u64 {
        let chunks = self.steps.iter().filter_map(|step| match step {
            Step::Stream { chunks, .. } => Some(chunks),
            _ => None,
        });
        chunks.flatten().map(|chunk| chunk.len_bytes).sum()
    }

    /// Bytes that the steps read or copy: the measure of progress.
    pub fn work_bytes(&self) -> u64 {
        let copied = self.steps.iter().map(|step| match step {
            Step::Copy(copy) => copy.len_bytes(),
            _ => 0,
        });
        self.read_bytes() + copied.sum::<u64>()
    }
}

fn check_size(checkpoint: &Checkpoint) -> Result<()> {
    let needed_bytes = checkpoint.len_bytes();
    if needed_bytes <= MAX_PLAN_BYTES {
        return Ok(());
    }
    let (path, what) = (checkpoint.path.clone(), "the checkpoint".to_owned());
    Err(Error::OverBudget { path, what, needed_bytes, available_bytes: MAX_PLAN_BYTES })
}
