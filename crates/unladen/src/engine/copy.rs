//! Moves bytes between slots, gives a model its initial values, and brings in the pages of mappings.

use super::{
    InitialValues, Io, Slots, gpus, missing,
    split::{Rest, for_each},
};
use crate::{
    cast::cast,
    destination::Arena,
    error::Result,
    memory::{Mapping, PAGE_BYTES},
    plan::{Change, Copy, SlotId, Span},
};
use std::ops::Range;

/// What one thread copies before it looks for more, and for a cancel: at most so many elements and bytes.
const COPY_BYTES: u64 = 4 << 20;

/// What one thread brings in of a mapping.
const POPULATE_BYTES: u64 = 16 << 20;

pub(super) fn copy(copy: &Copy, slots: &mut Slots<'_>, n_threads: usize, io: Io<'_>) -> Result<()> {
    let index = copy.target.slot.0 as usize;
    if matches!(slots[index], Some(Arena::Cuda(_))) {
        return gpus::copy(copy, slots, io);
    }
    // The target leaves its slot for the while, so that the source can be borrowed beside it.
    let mut target = slots[index].take().ok_or_else(|| missing(copy.target.slot))?;
    let result = copy_to(copy, slots, &mut target, n_threads, io);
    slots[index] = Some(target);
    result
}

fn copy_to(
    copy: &Copy,
    slots: &Slots<'_>,
    target: &mut Arena<'_>,
    n_threads: usize,
    io: Io<'_>,
) -> Result<()> {
    let end = |start_byte: u64, len_bytes: u64| start_byte.saturating_add(len_bytes) as usize;
    let (from, to) = (copy.source, copy.target);
    let source = slots[from.slot.0 as usize].as_ref().ok_or_else(|| missing(from.slot))?.as_slice();
    let source = source.ok_or_else(|| missing(from.slot))?;
    let source = source.get(from.start_byte as usize..end(from.start_byte, from.len_bytes));
    let source = source.ok_or_else(|| missing(from.slot))?;
    let target = target.as_mut_slice().ok_or_else(|| missing(to.slot))?;
    let target = target.get_mut(to.start_byte as usize..end(to.start_byte, to.len_bytes));
    let target = target.ok_or_else(|| missing(to.slot))?;
    let [source_cut, target_cut] = cuts(copy.change.as_ref());
    let jobs = source.chunks(source_cut).zip(target.chunks_mut(target_cut));
    let jobs = jobs.map(|(source, target)| Ok(Bytes { source, target }));
    for_each(jobs, vec![(); n_threads], io, |(), Bytes { source, target }| {
        match &copy.change {
            Some(change) if change.from != change.to => cast(change.from, change.to, source, target),
            _ => target.copy_from_slice(source),
        }
        if let Some(change) = &copy.change {
            // A plan casts what needs to be resolved too on its way through a staging buffer.
            change.resolve.apply(change.to, target);
        }
        io.progress.add(source.len() as u64);
        Ok(())
    })
}

/// How much of either side is copied at a time: as many elements.
fn cuts(change: Option<&Change>) -> [usize; 2] {
    let Some(change) = change else { return [COPY_BYTES as usize; 2] };
    let widest_bytes = change.from.size_bytes().max(change.to.size_bytes());
    let n_elems = COPY_BYTES / widest_bytes;
    [change.from, change.to].map(|it| (n_elems * it.size_bytes()) as usize)
}

struct Bytes<'a> {
    source: &'a [u8],
    target: &'a mut [u8],
}

pub(super) fn fill<'n>(
    fills: impl Iterator<Item = (Span, &'n str)> + Send,
    slots: &mut Slots<'_>,
    n_threads: usize,
    io: Io<'_>,
    initial_values: Option<InitialValues<'_>>,
) -> Result<()> {
    let mut rest = Rest::of(slots);
    let jobs = fills.map(|(span, name)| Ok(Named { target: rest.cut(span)?, name }));
    for_each(jobs, vec![(); n_threads], io, |(), Named { target, name }| {
        match initial_values {
            Some(set) => set(name, target),
            None => target.fill(0),
        }
        Ok(())
    })
}

struct Named<'a> {
    target: &'a mut [u8],
    name: &'a str,
}

/// Brings in the pages of a mapping, so that touching them costs nothing later.
pub(super) fn populate(
    slot: SlotId,
    ranges: &[Range<u64>],
    slots: &Slots<'_>,
    n_threads: usize,
    io: Io<'_>,
) -> Result<()> {
    let Some(Arena::Mapped(mapping)) = &slots[slot.0 as usize] else { return Err(missing(slot)) };
    let cuts = |range: &Range<u64>| {
        let (start, end) = (range.start, range.end);
        let first = start - start % PAGE_BYTES;
        (first..end)
            .step_by(POPULATE_BYTES as usize)
            .map(move |at| Pages { range: at.max(start)..(at + POPULATE_BYTES).min(end) })
    };
    let jobs = ranges.iter().flat_map(cuts).map(Ok);
    for_each(jobs, vec![(); n_threads], io, |(), Pages { range }| {
        let mapping: &Mapping = mapping;
        mapping.populate(range.clone())?;
        io.progress.add(range.end - range.start);
        Ok(())
    })
}

struct Pages {
    range: Range<u64>,
}
