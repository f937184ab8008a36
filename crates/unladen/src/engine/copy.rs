//! Moves bytes between slots, and gives a model its initial values.

use super::{InitialValues, Io, Slots, missing, split};
use crate::{
    destination::Arena,
    error::Result,
    plan::{Copy, Span},
};

/// What one thread copies before it looks for more, and for a cancel.
const COPY_BYTES: usize = 4 << 20;

pub(super) fn copy(copy: &Copy, slots: &mut Slots<'_>, n_threads: usize, io: Io<'_>) -> Result<()> {
    let index = copy.target.slot.0 as usize;
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
    let source = source.get(from.start_byte as usize..end(from.start_byte, from.len_bytes));
    let source = source.ok_or_else(|| missing(from.slot))?;
    let target = target.as_mut_slice().ok_or_else(|| missing(to.slot))?;
    let target = target.get_mut(to.start_byte as usize..end(to.start_byte, to.len_bytes));
    let target = target.ok_or_else(|| missing(to.slot))?;
    match &copy.block {
        Some(block) => {
            block.gather(source, target);
            if let Some((dtype, resolve)) = copy.resolve {
                // Only what this block wrote: a tensor may be gathered from several.
                block.for_each_target_run(|start, len| resolve.apply(dtype, &mut target[start..start + len]));
            }
            io.progress.add(copy.len_bytes());
        }
        None => {
            let jobs: Vec<_> = source.chunks(COPY_BYTES).zip(target.chunks_mut(COPY_BYTES)).collect();
            split::for_each(jobs, vec![(); n_threads], |(), (source, target)| {
                io.progress.check(io.path)?;
                target.copy_from_slice(source);
                if let Some((dtype, resolve)) = copy.resolve {
                    resolve.apply(dtype, target);
                }
                io.progress.add(target.len() as u64);
                Ok(())
            })?;
        }
    }
    Ok(())
}

pub(super) fn fill<'n>(
    fills: impl IntoIterator<Item = (Span, &'n str)>,
    slots: &mut Slots<'_>,
    n_threads: usize,
    io: Io<'_>,
    initial_values: Option<InitialValues<'_>>,
) -> Result<()> {
    let jobs = split::disjoint(slots, fills)?;
    split::for_each(jobs, vec![(); n_threads], |(), (target, name)| {
        io.progress.check(io.path)?;
        match initial_values {
            Some(set) => set(name, target),
            None => target.fill(0),
        }
        Ok(())
    })
}
