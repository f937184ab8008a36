//! What there is to load: every tensor with data once, with the names that share it.

use super::{PlanOptions, steps::Change};
use crate::{
    checkpoint::Checkpoint,
    device::Device,
    dtype::DType,
    error::Result,
    tensor::{Backing, FileId, Layout, Piece, TensorId},
};
use std::collections::{HashMap, hash_map::Entry};

/// A tensor to load, under one name or several.
#[derive(Clone, Debug)]
pub(super) struct Item {
    /// The first of its names.
    pub(super) tensor: TensorId,
    /// The others: exactly tied, same storage and same layout, cast alike, and for the same device.
    pub(super) tied: Vec<TensorId>,
    /// Where it will lie.
    pub(super) device: Device,
    /// As it will lie in memory.
    pub(super) layout: Layout,
}

impl Item {
    /// Every name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = TensorId> {
        std::iter::once(self.tensor).chain(self.tied.iter().copied())
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.layout.len_bytes()
    }

    /// What is done to the elements of a piece of it.
    pub(super) fn change(&self, piece: &Piece<'_>) -> Change {
        Change { from: piece.layout.dtype(), to: self.layout.dtype(), resolve: piece.resolve }
    }
}

/// The items of a checkpoint, in its order. Tensors without data (PyTorch's `meta`) are none.
///
/// Fails if a cast names a tensor that cannot be cast.
pub(super) fn items(checkpoint: &Checkpoint, options: &PlanOptions) -> Result<Vec<Item>> {
    let mut items: Vec<Item> = Vec::with_capacity(checkpoint.tensors.len());
    let mut item_of: HashMap<(TensorId, DType, Device), usize> = HashMap::new();
    for ((id, tensor), first) in checkpoint.iter().zip(checkpoint.first_with_same_bytes()) {
        if tensor.backing == Backing::Meta {
            continue;
        }
        let in_file = |error: crate::error::Error| error.in_tensor(&tensor.name).in_file(&checkpoint.path);
        let dtype = options.casts.dtype_of(&tensor.name, tensor.layout.dtype()).map_err(in_file)?;
        let device = options.device_of(&tensor.name);
        // Names that are cast alike stay tied, though the first of all be cast otherwise.
        match item_of.entry((first, dtype, device)) {
            Entry::Occupied(item) => items[*item.get()].tied.push(id),
            Entry::Vacant(place) => {
                place.insert(items.len());
                let layout = Layout::contiguous(dtype, tensor.layout.shape()).map_err(in_file)?;
                items.push(Item { tensor: id, tied: Vec::new(), device, layout });
            }
        }
    }
    Ok(items)
}

/// One contiguous run of a file that holds a whole tensor.
pub(super) struct PlainRun {
    pub(super) file: FileId,
    pub(super) start_byte: u64,
    /// In the file.
    pub(super) len_bytes: u64,
    pub(super) change: Change,
}

impl PlainRun {
    /// True if the bytes can lie in memory like in the file.
    pub(super) fn is_verbatim(&self) -> bool {
        self.change.is_nothing() && self.start_byte.is_multiple_of(self.change.to.size_bytes())
    }
}

/// The run that holds a whole tensor, or `None` if its elements stand in another order or in several places.
pub(super) fn plain_run(checkpoint: &Checkpoint, item: &Item) -> Option<PlainRun> {
    let mut pieces = checkpoint.pieces(item.tensor);
    let piece = pieces.next()?;
    let is_whole = pieces.next().is_none() && piece.layout.shape() == item.layout.shape();
    (is_whole && piece.layout.is_contiguous()).then(|| {
        let (file, start_byte) = place_of(checkpoint, &piece);
        let change = item.change(&piece);
        PlainRun { file, start_byte, len_bytes: change.source_bytes(item.len_bytes()), change }
    })
}

/// Where a piece's first byte is.
pub(super) fn place_of(checkpoint: &Checkpoint, piece: &Piece<'_>) -> (FileId, u64) {
    let storage = checkpoint.storage_of(piece);
    (storage.file, storage.start_byte + piece.layout.stored_bytes().start)
}
