//! The vocabulary of plans: what a load can do, and to which bytes.

use crate::{
    dtype::{DType, Resolve},
    memory::{PAGE_BYTES, Space},
    tensor::{Block, FileId, Layout, TensorId},
};

/// A named piece of memory of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// Bytes of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The slot.
    pub slot: SlotId,
    /// Where in it.
    pub start_byte: u64,
    /// How many.
    pub len_bytes: u64,
}

/// Bytes to read at once, and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The file.
    pub file: FileId,
    /// Where in the file.
    pub start_byte: u64,
    /// How many.
    pub len_bytes: u64,
    /// Where they go: exactly the bytes read or, by way of a staging buffer, the tensor that they are a part of.
    pub target: Span,
    /// How they get from a staging buffer to the target; `None`: they are read in place.
    pub via: Option<Box<Block>>,
    /// What must be done to them, as elements of a type.
    pub resolve: Option<(DType, Resolve)>,
}

/// A copy from slot to slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Where the bytes are.
    pub source: Span,
    /// Where they go.
    pub target: Span,
    /// How, if not one after the other.
    pub block: Option<Box<Block>>,
    /// What must be done to them.
    pub resolve: Option<(DType, Resolve)>,
}

impl Copy {
    /// How many bytes are written.
    pub fn len_bytes(&self) -> u64 {
        self.block.as_ref().map_or(self.target.len_bytes, |block| block.len_bytes())
    }
}

/// A tensor to be given the values of a model that was not loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The tensor whose values they are.
    pub tensor: TensorId,
    /// Where it lies.
    pub target: Span,
}

/// One thing that a load does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Takes memory.
    Reserve {
        /// Names the memory from here on.
        slot: SlotId,
        /// What it counts as.
        space: Space,
        /// How much, whole pages.
        len_bytes: u64,
        /// What for, in a word or two.
        owner: &'static str,
    },
    /// Takes the caller's memory for a tensor.
    Adopt {
        /// Names the memory from here on.
        slot: SlotId,
        /// The tensor it is for.
        tensor: TensorId,
    },
    /// Maps a whole file.
    Map {
        /// Names the mapping from here on.
        slot: SlotId,
        /// The file.
        file: FileId,
        /// Its length.
        len_bytes: u64,
    },
    /// Gives a model its initial values: what the loading then overwrites.
    Fill(Vec<Fill>),
    /// Reads chunks, several at a time. Targets are disjoint, except that consecutive chunks may share one.
    Stream {
        /// Buffers for chunks that do not land in place, one a thread.
        staging: Vec<SlotId>,
        /// The chunks.
        chunks: Vec<Chunk>,
    },
    /// Copies bytes.
    Copy(Copy),
    /// Gives memory or a mapping back.
    Release(SlotId),
    /// Says where a tensor lies in the end.
    HandOver {
        /// The tensor.
        tensor: TensorId,
        /// Its slot.
        slot: SlotId,
        /// Where its storage starts in the slot.
        start_byte: u64,
        /// How it lies there.
        layout: Layout,
    },
}

/// Steps in the making.
#[derive(Debug, Default)]
pub(super) struct Steps {
    steps: Vec<Step>,
    n_slots: u32,
    /// Slots that were released: a plan of many small steps needs few slots.
    free: Vec<SlotId>,
}

impl Steps {
    pub(super) fn push(&mut self, step: Step) {
        self.steps.push(step);
    }

    pub(super) fn slot(&mut self) -> SlotId {
        self.free.pop().unwrap_or_else(|| {
            self.n_slots += 1;
            SlotId(self.n_slots - 1)
        })
    }

    pub(super) fn release(&mut self, slot: SlotId) {
        self.push(Step::Release(slot));
        self.free.push(slot);
    }

    pub(super) fn reserve(&mut self, space: Space, len_bytes: u64, owner: &'static str) -> SlotId {
        let slot = self.slot();
        self.reserve_slot(slot, space, len_bytes, owner);
        slot
    }

    pub(super) fn reserve_slot(&mut self, slot: SlotId, space: Space, len_bytes: u64, owner: &'static str) {
        self.push(Step::Reserve { slot, space, len_bytes: len_bytes.next_multiple_of(PAGE_BYTES), owner });
    }

    /// Reads chunks, with a staging ring around them if any of them needs one.
    pub(super) fn stream(&mut self, chunks: Vec<Chunk>, n_threads: usize) {
        let staged = chunks.iter().filter(|it| it.via.is_some());
        let (n_staged, widest_bytes) =
            staged.fold((0, 0), |(n, widest), it| (n + 1, it.len_bytes.max(widest)));
        let n_buffers = n_staged.min(n_threads);
        let staging: Vec<_> =
            (0..n_buffers).map(|_| self.reserve(Space::Staging, widest_bytes, "staging")).collect();
        self.push(Step::Stream { staging: staging.clone(), chunks });
        staging.into_iter().for_each(|slot| self.release(slot));
    }

    pub(super) fn n_slots(&self) -> usize {
        self.n_slots as usize
    }

    pub(super) fn into_vec(self) -> Vec<Step> {
        self.steps
    }
}
