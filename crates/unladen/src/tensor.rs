//! A tensor as data: its name, its layout and where its bytes are. No I/O.

mod block;
mod boxes;
mod gather;
mod layout;

pub use block::{Axis, Block, Parts, Side, Window};
pub use boxes::Boxes;
pub(crate) use layout::spilled_bytes;
pub use layout::{Dims, Layout, MAX_DIMS};

use crate::dtype::Resolve;
use std::ops::Range;

/// Position of a file in [`Checkpoint::files`](crate::Checkpoint).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// Position of a storage in [`Checkpoint::storages`](crate::Checkpoint).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorageId(pub u32);

/// Position of a tensor in [`Checkpoint::tensors`](crate::Checkpoint).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub u32);

/// A run of bytes of one file that tensors view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// The file that holds it.
    pub file: FileId,
    /// Where it starts in the file.
    pub start_byte: u64,
    /// Its length.
    pub len_bytes: u64,
    /// Its elements stand in the other byte order.
    pub swapped: bool,
}

/// A named tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// The full path, joined by `.`.
    pub name: String,
    /// Type, shape and strides. With [`Backing::Extents`] contiguous, the extents have layouts of their own.
    pub layout: Layout,
    /// Where the bytes are.
    pub backing: Backing,
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Nowhere: a tensor on PyTorch's `meta` device has a shape and no data.
    Meta,
    /// In one storage, seen through the tensor's layout.
    Storage(StorageId),
    /// In several boxes, positions in [`Checkpoint::extents`](crate::Checkpoint), which together cover the tensor.
    Extents(Range<u32>),
}

/// A box of a tensor that is stored apart from the others: a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Holds the box.
    pub storage: StorageId,
    /// The box's own shape, strides and offset in the storage.
    pub layout: Layout,
    /// Index of the box's first element in the tensor.
    pub at: Dims,
}

/// One extent of a tensor, or the whole of one that is not split.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Holds the bytes.
    pub storage: StorageId,
    /// How they stand there.
    pub layout: &'a Layout,
    /// Index of the first element in the tensor.
    pub at: &'a [u64],
    /// What must be done to the elements.
    pub resolve: Resolve,
}
