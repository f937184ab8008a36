//! Where tensors lie in an arena, and the chunks that bring them there.

use super::{
    items::{Item, place_of, plain_run},
    steps::{Chunk, SlotId, Span},
};
use crate::{
    checkpoint::Checkpoint,
    memory::PAGE_BYTES,
    tensor::{Block, FileId, Side, Window},
};

/// What one read brings. Several are in flight, so it is no measure of memory when bytes land in place.
const READ_BYTES: u64 = 8 << 20;

/// What a staging buffer holds.
const STAGING_BYTES: u64 = 4 << 20;

/// Bytes between two tensors of a file that are read along rather than skipped: archive headers and padding.
const MAX_GAP_BYTES: u64 = 4096;

/// What tensors are aligned to where the file does not say: a cache line, and what PyTorch aligns to.
const ALIGN_BYTES: u64 = 64;

/// Where each item starts in an arena of `len_bytes`.
pub(super) struct Arena {
    pub(super) len_bytes: u64,
    /// By position in the items.
    pub(super) start_bytes: Vec<u64>,
}

/// Items one after the other, in the checkpoint's order.
pub(super) fn packed(items: &[Item]) -> Arena {
    let mut len_bytes = 0u64;
    let start_bytes = items.iter().map(|item| {
        let start_byte = len_bytes;
        len_bytes = (len_bytes + item.len_bytes()).next_multiple_of(ALIGN_BYTES);
        start_byte
    });
    Arena { start_bytes: start_bytes.collect(), len_bytes }
}

/// An arena laid out like the files: runs of neighbouring tensors keep their distances, small gaps included, and their
/// position in a page, so that few large reads land in place. The rest (strided, sharded, overlapping, misaligned for
/// its type, byte order or view to be resolved) follows, each tensor at a place of its own.
pub(super) fn like_files(checkpoint: &Checkpoint, items: &[Item], slot: SlotId) -> (Arena, Vec<Chunk>) {
    let mut arena = Arena { len_bytes: 0, start_bytes: vec![0; items.len()] };
    let mut chunks = Vec::new();

    let mut plain = Vec::new();
    let mut apart = Vec::new();
    for (index, item) in items.iter().enumerate().filter(|(_, item)| item.len_bytes() > 0) {
        match plain_run(checkpoint, item) {
            Some(run) if run.is_verbatim && is_aligned(item, run.start_byte) => {
                plain.push((run.file, run.start_byte, run.len_bytes, index));
            }
            _ => apart.push(index),
        }
    }
    plain.sort_unstable();

    let mut run: Option<Run> = None;
    for (file, start_byte, len_bytes, index) in plain {
        match &mut run {
            // Overlapping tensors are private copies: one of them stays in the run, the others lie apart.
            Some(run) if run.file == file && start_byte < run.end_byte => apart.push(index),
            Some(run) if run.file == file && start_byte - run.end_byte <= MAX_GAP_BYTES => {
                run.end_byte = start_byte + len_bytes;
                arena.start_bytes[index] = run.arena_byte + (start_byte - run.start_byte);
            }
            _ => {
                run.take().into_iter().for_each(|it| it.close(slot, &mut arena, &mut chunks));
                let new = Run::open(file, start_byte, len_bytes, arena.len_bytes);
                arena.start_bytes[index] = new.arena_byte;
                run = Some(new);
            }
        }
    }
    run.into_iter().for_each(|it| it.close(slot, &mut arena, &mut chunks));

    for index in apart {
        let item = &items[index];
        arena.start_bytes[index] = arena.len_bytes.next_multiple_of(ALIGN_BYTES);
        arena.len_bytes = arena.start_bytes[index] + item.len_bytes();
        let target = Span { slot, start_byte: arena.start_bytes[index], len_bytes: item.len_bytes() };
        chunks.extend(chunks_of(checkpoint, item, target));
    }
    (arena, chunks)
}

fn is_aligned(item: &Item, start_byte: u64) -> bool {
    start_byte.is_multiple_of(item.layout.dtype().size_bytes())
}

/// Neighbouring bytes of a file that keep their distances in the arena.
struct Run {
    file: FileId,
    start_byte: u64,
    end_byte: u64,
    arena_byte: u64,
}

impl Run {
    fn open(file: FileId, start_byte: u64, len_bytes: u64, arena_len_bytes: u64) -> Run {
        let in_page = start_byte % PAGE_BYTES;
        let page_byte = arena_len_bytes.saturating_sub(in_page).next_multiple_of(PAGE_BYTES);
        Run { file, start_byte, end_byte: start_byte + len_bytes, arena_byte: page_byte + in_page }
    }

    fn close(self, slot: SlotId, arena: &mut Arena, chunks: &mut Vec<Chunk>) {
        let len_bytes = self.end_byte - self.start_byte;
        arena.len_bytes = self.arena_byte + len_bytes;
        let target = Span { slot, start_byte: self.arena_byte, len_bytes };
        chunks.extend(reads(self.file, self.start_byte, target, 0));
    }
}

/// Plain reads of a run, cut every `READ_BYTES` counted from `cut_from_byte` of the file.
fn reads(file: FileId, start_byte: u64, target: Span, cut_from_byte: u64) -> impl Iterator<Item = Chunk> {
    let end_byte = start_byte + target.len_bytes;
    let mut at = start_byte;
    std::iter::from_fn(move || {
        let (from, to) = (at, cut_from_byte + (at - cut_from_byte + 1).next_multiple_of(READ_BYTES));
        let to = to.min(end_byte);
        at = to;
        (from < to).then(|| Chunk {
            file,
            start_byte: from,
            len_bytes: to - from,
            target: Span {
                slot: target.slot,
                start_byte: target.start_byte + (from - start_byte),
                len_bytes: to - from,
            },
            via: None,
            resolve: None,
        })
    })
}

/// The chunks that bring one item to a place of its own.
pub(super) fn chunks_of(checkpoint: &Checkpoint, item: &Item, target: Span) -> Vec<Chunk> {
    let dtype = item.layout.dtype();
    if let Some(run) = plain_run(checkpoint, item) {
        let piece = checkpoint.pieces(item.tensor).next();
        let resolve = piece.map(|it| (dtype, it.resolve)).filter(|(_, it)| !it.is_nothing());
        // Cut from the tensor's start on, so that no element is.
        let chunks = reads(run.file, run.start_byte, target, run.start_byte);
        return chunks.map(|chunk| Chunk { resolve, ..chunk }).collect();
    }
    let window = Window::whole(item.layout.shape());
    let mut chunks = Vec::new();
    for piece in checkpoint.pieces(item.tensor) {
        let (file, _) = place_of(checkpoint, &piece);
        let storage_byte = checkpoint.storage_of(&piece).start_byte;
        let Some(block) = Block::within(piece.layout, piece.at, &window) else { continue };
        for mut part in block.split(Side::Source, STAGING_BYTES) {
            let start_byte = storage_byte + part.source_byte;
            part.source_byte = 0;
            chunks.push(Chunk {
                file,
                start_byte,
                len_bytes: part.span_bytes(Side::Source),
                target,
                via: Some(Box::new(part)),
                resolve: Some((dtype, piece.resolve)).filter(|(_, it)| !it.is_nothing()),
            });
        }
    }
    chunks
}
