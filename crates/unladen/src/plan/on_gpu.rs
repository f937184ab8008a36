//! Where tensors lie on GPUs, and the reads that bring them there.
//!
//! Each tensor is aligned by itself, so nothing lies like in the file: a large tensor is copied from where it was read to,
//! small neighbours are read together and brought into place in the staging buffer, so that one copy takes them all.
//! What the file holds in another order comes in the file's order, and each copy puts lines where they belong; so does what
//! the host makes wider, box by box, where the GPU has no room for that.

use super::{
    items::{Item, place_of, plain_run},
    place::{MAX_GAP_BYTES, Place, gather, gather_piece, is_in_order},
    staging::Ring,
    steps::{Change, Gather, Part, Read, SlotId, Span, Way},
};
use crate::{
    checkpoint::Checkpoint,
    error::Result,
    tensor::{FileId, Window},
};
use std::collections::HashMap;

/// What tensors are aligned to: what the driver aligns allocations to, and what kernels may want.
pub(super) const ALIGN_BYTES: u64 = 256;

/// Tensors that are at most this long share a copy with their neighbours: for them a copy costs more than its bytes.
const SMALL_BYTES: u64 = 256 << 10;

/// Tensors on GPUs, to be read.
pub(super) struct OnGpus {
    /// By position in the items.
    pub(super) places: Vec<Place>,
    /// Bytes that each slot needs.
    pub(super) len_bytes: HashMap<SlotId, u64>,
    /// In file order.
    pub(super) reads: Vec<Read>,
}

/// Lays items out, each in the slot that is given for it, in file order. A read takes at most the ring's `chunk_bytes` of a
/// file into a staging buffer, and of what lies otherwise on the GPU it makes as many at most.
pub(super) fn lay_out(
    checkpoint: &Checkpoint,
    items: &[Item],
    slots: &[SlotId],
    ring: Ring,
) -> Result<OnGpus> {
    let mut on_gpus = OnGpus {
        places: slots.iter().map(|&slot| Place { slot, start_byte: 0 }).collect(),
        len_bytes: slots.iter().map(|&slot| (slot, 0)).collect(),
        reads: Vec::new(),
    };
    for index in in_file_order(checkpoint, items) {
        let item = &items[index];
        let end_byte = on_gpus.len_bytes.entry(slots[index]).or_default();
        let start_byte = end_byte.next_multiple_of(ALIGN_BYTES);
        *end_byte = start_byte + item.len_bytes();
        on_gpus.places[index].start_byte = start_byte;
        let target = Span { slot: slots[index], start_byte, len_bytes: item.len_bytes() };
        push(&mut on_gpus.reads, checkpoint, item, target, ring)?;
    }
    alone(&mut on_gpus.reads, ring);
    Ok(on_gpus)
}

/// The reads that bring one item to a place of its own.
pub(super) fn reads_of(checkpoint: &Checkpoint, item: &Item, target: Span, ring: Ring) -> Result<Vec<Read>> {
    let mut reads = Vec::new();
    push(&mut reads, checkpoint, item, target, ring)?;
    alone(&mut reads, ring);
    Ok(reads)
}

/// Positions of the items that have bytes, in the order in which the files hold them.
fn in_file_order(checkpoint: &Checkpoint, items: &[Item]) -> Vec<usize> {
    let mut in_order: Vec<(FileId, u64, usize)> = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate().filter(|(_, item)| item.len_bytes() > 0) {
        let first = checkpoint.pieces(item.tensor).next();
        let (file, start_byte) = first.map_or((FileId(0), 0), |piece| place_of(checkpoint, &piece));
        in_order.push((file, start_byte, index));
    }
    in_order.sort_unstable();
    in_order.into_iter().map(|(_, _, index)| index).collect()
}

/// Adds an item's reads behind the others, or makes it a part of the last one.
fn push(reads: &mut Vec<Read>, checkpoint: &Checkpoint, item: &Item, target: Span, ring: Ring) -> Result<()> {
    let Some(run) = plain_run(checkpoint, item) else {
        return push_strided(reads, checkpoint, item, target, ring);
    };
    let chunk_bytes = ring.chunk_bytes;
    let small_bytes = SMALL_BYTES.min(chunk_bytes);
    let (file, start_byte, len_bytes) = (run.file, run.start_byte, run.len_bytes);
    if len_bytes > small_bytes || target.len_bytes > small_bytes {
        if is_cast_on_host(run.change, ring) {
            return push_strided(reads, checkpoint, item, target, ring);
        }
        let way = as_is(run.change);
        let is_in_order = is_in_order(checkpoint, file, &way);
        reads.push(Read { file, start_byte, len_bytes, target, way, is_in_order });
        return Ok(());
    }
    let part = Part { source_byte: 0, len_bytes: len_bytes as u32, target_byte: 0, change: run.change };
    let end_byte = start_byte + len_bytes;
    let joins = |read: &&mut Read| {
        let read_end_byte = read.start_byte + read.len_bytes;
        read.file == file
            && read.target.slot == target.slot
            && start_byte.checked_sub(read_end_byte).is_some_and(|gap| gap <= MAX_GAP_BYTES)
            && end_byte - read.start_byte <= chunk_bytes
            && target.start_byte + target.len_bytes - read.target.start_byte <= chunk_bytes
    };
    if let Some(last) = reads.last_mut().filter(joins)
        && let Way::Parts(parts) = &mut last.way
    {
        parts.push(Part {
            source_byte: (start_byte - last.start_byte) as u32,
            target_byte: (target.start_byte - last.target.start_byte) as u32,
            ..part
        });
        last.len_bytes = end_byte - last.start_byte;
        last.target.len_bytes = target.start_byte + target.len_bytes - last.target.start_byte;
        return Ok(());
    }
    let way = Way::Parts(vec![part]);
    let is_in_order = is_in_order(checkpoint, file, &way);
    reads.push(Read { file, start_byte, len_bytes, target, way, is_in_order });
    Ok(())
}

/// Adds the reads of an item whose elements stand in another order, or in several places, or are made wider on the host: one
/// if a staging buffer holds it.
fn push_strided(
    reads: &mut Vec<Read>,
    checkpoint: &Checkpoint,
    item: &Item,
    target: Span,
    ring: Ring,
) -> Result<()> {
    let whole = Window::whole(item.layout.shape());
    if item.len_bytes() <= ring.chunk_bytes {
        reads.extend(gather(checkpoint, item, &whole, target)?);
        return Ok(());
    }
    for piece in checkpoint.pieces(item.tensor) {
        let Some(gather) = gather_piece(checkpoint, item, &piece, &whole)? else { continue };
        let Gather { file, start_byte, ref block, change } = gather;
        let len_bytes = change.source_bytes(block.len_bytes());
        // Rows of a tensor that is cut by rows lie together on both sides.
        let (way, target) = match block.axes.is_empty() && !is_cast_on_host(change, ring) {
            true => {
                let start_byte = target.start_byte + block.target_byte;
                (as_is(change), Span { start_byte, len_bytes: block.len_bytes(), ..target })
            }
            false => (Way::Boxes(Box::new(gather)), target),
        };
        let is_in_order = is_in_order(checkpoint, file, &way);
        reads.push(Read { file, start_byte, len_bytes, target, way, is_in_order });
    }
    Ok(())
}

/// The way of elements that stand together on both sides.
fn as_is(change: Change) -> Way {
    if change.is_nothing() { Way::Plain } else { Way::Elements(change) }
}

/// True if the elements become wider before they cross the bus.
fn is_cast_on_host(change: Change, ring: Ring) -> bool {
    ring.widens_on_host && change.widens()
}

/// What has no neighbours needs not be brought into place.
fn alone(reads: &mut [Read], ring: Ring) {
    for read in reads {
        if let Way::Parts(parts) = &read.way
            && let [Part { change, .. }] = parts[..]
            && !is_cast_on_host(change, ring)
        {
            read.way = as_is(change);
        }
    }
}
