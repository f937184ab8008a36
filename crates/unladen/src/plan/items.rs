//! What there is to load: every tensor with data once, with the names that share it.

use crate::{
    checkpoint::Checkpoint,
    tensor::{Backing, FileId, Layout, Piece, TensorId},
};

/// A tensor to load, under one name or several.
#[derive(Debug)]
pub(super) struct Item {
    /// The first of its names.
    pub(super) tensor: TensorId,
    /// The others: exactly tied, same storage and same layout.
    pub(super) tied: Vec<TensorId>,
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
}

/// The items of a checkpoint, in its order. Tensors without data (PyTorch's `meta`) are none.
pub(super) fn items(checkpoint: &Checkpoint) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::with_capacity(checkpoint.tensors.len());
    let mut item_of = vec![0; checkpoint.tensors.len()];
    for ((id, tensor), first) in checkpoint.iter().zip(checkpoint.first_with_same_bytes()) {
        match tensor.backing {
            Backing::Meta => {}
            _ if first != id => items[item_of[first.0 as usize]].tied.push(id),
            Backing::Extents(_) | Backing::Storage(_) => {
                item_of[id.0 as usize] = items.len();
                items.push(Item { tensor: id, tied: Vec::new(), layout: tensor.layout.loaded() });
            }
        }
    }
    items
}

/// One contiguous run of a file that is a whole tensor, or `None` if it takes more than reading to get it.
pub(super) fn plain_run(checkpoint: &Checkpoint, item: &Item) -> Option<PlainRun> {
    let mut pieces = checkpoint.pieces(item.tensor);
    let piece = pieces.next()?;
    let is_whole = pieces.next().is_none() && piece.layout.shape() == item.layout.shape();
    (is_whole && piece.layout.is_contiguous()).then(|| {
        let (file, start_byte) = place_of(checkpoint, &piece);
        PlainRun { file, start_byte, len_bytes: item.len_bytes(), is_verbatim: piece.resolve.is_nothing() }
    })
}

/// See [`plain_run`].
pub(super) struct PlainRun {
    pub(super) file: FileId,
    pub(super) start_byte: u64,
    pub(super) len_bytes: u64,
    /// Nothing to be done to the bytes.
    pub(super) is_verbatim: bool,
}

/// Where a piece's first byte is.
pub(super) fn place_of(checkpoint: &Checkpoint, piece: &Piece<'_>) -> (FileId, u64) {
    let storage = checkpoint.storage_of(piece);
    (storage.file, storage.start_byte + piece.layout.stored_bytes().start)
}
