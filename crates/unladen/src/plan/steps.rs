//! The vocabulary of plans: what a load can do, and to which bytes.

use super::{
    granules::STEP_BYTES,
    staging::{PLACED_BYTES, Ring, Room, UploadRoom, room, upload_room},
};
use crate::{
    device::Device,
    dtype::{DType, Resolve},
    memory::{PAGE_BYTES, Space},
    tensor::{Block, Boxes, FileId, Layout, TensorId},
};
use std::{collections::BTreeSet, ops::Range};

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

/// What must be done to elements on their way from the file to where they stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Their type in the file.
    pub from: DType,
    /// Their type in memory.
    pub to: DType,
    /// Byte order, conjugate and negative views; done before the cast.
    pub resolve: Resolve,
}

impl Change {
    /// True if the bytes stay as they are.
    pub fn is_nothing(&self) -> bool {
        self.from == self.to && self.resolve.is_nothing()
    }

    /// True if they take more bytes in memory than in the file: a GPU then makes them wider behind the bus.
    pub fn widens(&self) -> bool {
        self.to.size_bytes() > self.from.size_bytes()
    }

    /// Bytes that so many bytes of whole elements take in memory.
    pub fn target_bytes(&self, source_bytes: u64) -> u64 {
        source_bytes / self.from.size_bytes() * self.to.size_bytes()
    }

    /// Bytes that so many bytes of whole elements take in the file.
    pub fn source_bytes(&self, target_bytes: u64) -> u64 {
        target_bytes / self.to.size_bytes() * self.from.size_bytes()
    }
}

/// Bytes of a file, where they go, and how. The engine cuts it into chunks while it runs, so that a plan is as long as
/// its list of tensors, whatever their size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// The file.
    pub file: FileId,
    /// Where in the file.
    pub start_byte: u64,
    /// How many.
    pub len_bytes: u64,
    /// Where they go.
    pub target: Span,
    /// How.
    pub way: Way,
    /// The file is a packed record, which is unpacked from beginning to end: one thread takes this read and those of the
    /// same file that follow it, and brings them one after the other.
    pub is_in_order: bool,
}

impl Read {
    /// True if whoever takes this read takes the next one too.
    pub fn goes_with(&self, next: &Read) -> bool {
        self.is_in_order && next.is_in_order && self.file == next.file
    }
}

/// How the bytes of a [`Read`] get to their target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// As they are. The target may be longer, up to a page: room for direct reads of whole pages.
    Plain,
    /// Element by element, by way of a staging buffer. The target may be longer, up to a page.
    Elements(Change),
    /// Several small tensors in one read that fits a staging buffer.
    Parts(Vec<Part>),
    /// Strided elements, or boxes of a tensor from several places, by way of a staging buffer.
    Gather(Vec<Gather>),
    /// Strided elements from one place to a GPU, more of them than a staging buffer holds: box by box, in the order of the
    /// file, so that each byte is read once and by then lies in lines of the target, which is the whole tensor's.
    Boxes(Box<Gather>),
}

/// A box of elements that have to be brought into order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gather {
    /// The file.
    pub file: FileId,
    /// Where in the file the block's source starts.
    pub start_byte: u64,
    /// From where to where, in bytes of the type in memory on both sides.
    pub block: Block,
    /// What is done to the elements before.
    pub change: Change,
}

impl Gather {
    /// The boxes that it is cut into, where a buffer takes so many bytes of a file and has room for as many as they become.
    pub fn boxes(&self, chunk_bytes: u64) -> Boxes<'_> {
        let (from_bytes, to_bytes) = (self.change.from.size_bytes(), self.change.to.size_bytes());
        self.block.boxes(chunk_bytes / from_bytes.max(to_bytes) * to_bytes)
    }
}

/// A small tensor inside a [`Way::Parts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it starts in the read.
    pub source_byte: u32,
    /// Its length in the file.
    pub len_bytes: u32,
    /// Where it starts in the target.
    pub target_byte: u32,
    /// What is done to it.
    pub change: Change,
}

/// A copy from slot to slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Where the bytes are.
    pub source: Span,
    /// Where they go.
    pub target: Span,
    /// What must be done to the elements; nothing on the way to a GPU.
    pub change: Option<Change>,
    /// A staging buffer that the bytes go by way of: a mapped file is not handed to the driver of a GPU.
    pub via: Option<SlotId>,
}

/// A tensor to be given the values of a model that was not loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The tensor whose values they are.
    pub tensor: TensorId,
    /// Where it lies.
    pub target: Span,
}

/// Memory that nobody has touched yet: to bring its pages is most of the work of filling it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fresh {
    /// The memory.
    pub slot: SlotId,
    /// Its pages can be put in place instead of being touched, and there is staging for it.
    pub is_placed: bool,
}

/// The parts of a staging buffer for a GPU, each as long as its largest use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rooms {
    /// The most of a file that a buffer takes at a time. The room for it begins the buffer, and has pages to spare.
    pub chunk_bytes: u64,
    /// For elements that were cast before they are brought into order.
    pub cast_bytes: u64,
    /// For bytes as they will lie on the GPU, where they do not lie so in the file.
    pub target_bytes: u64,
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
        /// How much: whole pages, of a GPU whole steps of 512 bytes.
        len_bytes: u64,
        /// What for, in a word or two.
        owner: &'static str,
        /// The tensor that it is for, if it is for one.
        tensor: Option<TensorId>,
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
    /// Reads, on several threads. For each slot the targets ascend and are disjoint.
    Stream {
        /// Buffers for what does not land in place, one a thread.
        staging: Vec<SlotId>,
        /// The most of a file that one of them takes at a time.
        chunk_bytes: u64,
        /// A slot that nobody has touched yet.
        fresh: Option<Fresh>,
        /// What is read, in file order.
        reads: Vec<Read>,
    },
    /// Reads, on several threads, into staging buffers, from where a GPU's driver fetches the bytes while others are read.
    Upload {
        /// The buffers, pinned while they are used: more than there are threads, for what is being fetched.
        staging: Vec<SlotId>,
        /// How each is cut.
        rooms: Rooms,
        /// For each GPU that has elements to widen, with its ordinal: memory there for two buffers of them as they stand in
        /// the file.
        scratch: Vec<(u32, SlotId)>,
        /// What is read, in file order. Targets are on GPUs.
        reads: Vec<Read>,
    },
    /// Brings the pages of a mapping in, so that touching them costs nothing later.
    Populate {
        /// The mapping.
        slot: SlotId,
        /// Which bytes, ascending.
        ranges: Vec<Range<u64>>,
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

impl Step {
    /// What it reads from files.
    pub fn reads(&self) -> &[Read] {
        match self {
            Step::Stream { reads, .. } | Step::Upload { reads, .. } => reads,
            _ => &[],
        }
    }
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

    pub(super) fn reserve(
        &mut self,
        space: Space,
        len_bytes: u64,
        owner: &'static str,
        tensor: Option<TensorId>,
    ) -> SlotId {
        let slot = self.slot();
        self.reserve_slot(slot, space, len_bytes, owner, tensor);
        slot
    }

    pub(super) fn reserve_slot(
        &mut self,
        slot: SlotId,
        space: Space,
        len_bytes: u64,
        owner: &'static str,
        tensor: Option<TensorId>,
    ) {
        // Pages are what the host gives; a tensor on a GPU that is to be freed singly may be much shorter.
        let step_bytes = match space {
            Space::Device(Device::Cuda(_)) => STEP_BYTES,
            _ => PAGE_BYTES,
        };
        let len_bytes = len_bytes.next_multiple_of(step_bytes);
        self.push(Step::Reserve { slot, space, len_bytes, owner, tensor });
    }

    /// Reads, with staging around them if any of it needs some. Pages of what is fresh are put in place if both it and the
    /// ring allow that.
    pub(super) fn stream(&mut self, reads: Vec<Read>, ring: Ring, fresh: Option<Fresh>) {
        // Put in place is whatever fills the processor's cache: a leaner ring has no buffer for it.
        let may_place = ring.places_pages && ring.chunk_bytes >= PLACED_BYTES;
        let fresh = fresh.map(|it| Fresh { is_placed: it.is_placed && may_place, ..it });
        let is_placed = fresh.is_some_and(|it| it.is_placed);
        let Room { chunk_bytes, buffer_bytes, n_buffers } = room(&reads, ring, is_placed);
        let staging: Vec<_> =
            (0..n_buffers).map(|_| self.reserve(Space::Staging, buffer_bytes, "staging", None)).collect();
        self.push(Step::Stream { staging: staging.clone(), chunk_bytes, fresh, reads });
        staging.into_iter().for_each(|slot| self.release(slot));
    }

    /// Reads for GPUs, with staging around them. `gpu_of`: the ordinal of the GPU that a slot is on.
    pub(super) fn upload(&mut self, reads: Vec<Read>, ring: Ring, gpu_of: impl Fn(SlotId) -> Option<u32>) {
        if reads.is_empty() {
            return;
        }
        let UploadRoom { rooms, buffer_bytes, n_buffers } = upload_room(&reads, ring);
        let widen = reads.iter().filter(|it| matches!(it.way, Way::Elements(change) if change.widens()));
        let gpus: BTreeSet<u32> = widen.filter_map(|it| gpu_of(it.target.slot)).collect();
        let scratch = gpus.into_iter().map(|ordinal| {
            let space = Space::Device(Device::Cuda(ordinal));
            (ordinal, self.reserve(space, 2 * rooms.chunk_bytes, "elements to be widened", None))
        });
        let scratch: Vec<(u32, SlotId)> = scratch.collect();
        let staging: Vec<_> =
            (0..n_buffers).map(|_| self.reserve(Space::Staging, buffer_bytes, "staging", None)).collect();
        self.push(Step::Upload { staging: staging.clone(), rooms, scratch: scratch.clone(), reads });
        staging
            .into_iter()
            .chain(scratch.into_iter().map(|(_, slot)| slot))
            .for_each(|slot| self.release(slot));
    }

    pub(super) fn n_slots(&self) -> usize {
        self.n_slots as usize
    }

    pub(super) fn into_vec(self) -> Vec<Step> {
        self.steps
    }
}
