//! Memory of GPUs for plans, copies to and on them, and what the driver says of it.

use super::{Io, Slots, missing};
use crate::{
    cuda::{Context, Memory},
    destination::Arena,
    device::{Device, PerDevice},
    error::{Fault, Result},
    memory::{Ledger, Reservation},
    plan::Copy,
};
use std::collections::BTreeMap;

/// Opens a GPU by its ordinal: whoever opened it before the load keeps it open.
pub type OpenGpu<'r> = &'r dyn Fn(u32) -> Result<Context>;

/// What a run saw of the GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsedGpus {
    /// By how much the driver's free memory shrank at most, the driver's own rounding and whatever others took meanwhile
    /// included.
    pub driver_peak_bytes: PerDevice,
    /// What the host's staging was; `None`: there was none.
    pub staging: Option<Staging>,
}

/// Memory of the host that copies to a GPU come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Staging {
    /// The driver copied from it by itself.
    Pinned,
    /// The driver would not pin it, or not all of it. What comes from there comes as well, only slower.
    Pageable {
        /// In the driver's words.
        why: String,
    },
}

impl Staging {
    /// Why it was not pinned, if it was not.
    pub fn why_pageable(&self) -> Option<&str> {
        match self {
            Staging::Pinned => None,
            Staging::Pageable { why } => Some(why),
        }
    }
}

/// What is copied from the host at a time: a cancel waits for no more.
const COPY_BYTES: usize = 16 << 20;

pub(super) struct Gpus<'r> {
    open: OpenGpu<'r>,
    /// By ordinal.
    opened: BTreeMap<u32, Opened>,
    pub(super) used: UsedGpus,
}

struct Opened {
    context: Context,
    /// What was free before the first reservation.
    free_bytes_at_first: u64,
    /// The most that was held, by the ledger, whenever the driver was asked what is free.
    asked_at_bytes: u64,
}

/// When the driver is asked what is free. It takes its time to answer, so thousands of reservations in a row are one
/// question: the last of them tells what all took.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// In any case: it may have taken memory of its own, for kernels, say.
    Always,
    /// Where more is held than whenever it was asked before.
    IfMoreIsHeld,
}

impl<'r> Gpus<'r> {
    pub(super) fn new(open: OpenGpu<'r>) -> Gpus<'r> {
        let used = UsedGpus { driver_peak_bytes: PerDevice::default(), staging: None };
        Gpus { open, opened: BTreeMap::new(), used }
    }

    /// Remembers an upload's staging. What was not pinned once stays so.
    pub(super) fn staged(&mut self, why_pageable: Option<String>) {
        if !matches!(self.used.staging, Some(Staging::Pageable { .. })) {
            self.used.staging = Some(why_pageable.map_or(Staging::Pinned, |why| Staging::Pageable { why }));
        }
    }

    /// Takes memory of a GPU.
    pub(super) fn reserve(&mut self, ordinal: u32, reservation: Reservation) -> Result<Memory> {
        if let Some(gpu) = self.opened.get(&ordinal) {
            return Memory::new(&gpu.context, reservation);
        }
        let context = (self.open)(ordinal)?;
        let free_bytes_at_first = context.free_bytes()?;
        let memory = Memory::new(&context, reservation)?;
        self.opened.insert(ordinal, Opened { context, free_bytes_at_first, asked_at_bytes: 0 });
        Ok(memory)
    }

    /// Raises the driver's figure to what it says now. To be called while what it shall count is still held.
    pub(super) fn look(&mut self, ask: Ask, ledger: &Ledger) -> Result<()> {
        if self.opened.is_empty() {
            return Ok(());
        }
        let held = ledger.get().0.device_bytes;
        for (&ordinal, gpu) in &mut self.opened {
            let device = Device::Cuda(ordinal);
            let held_bytes = held.get(device);
            if ask == Ask::IfMoreIsHeld && held_bytes <= gpu.asked_at_bytes {
                continue;
            }
            gpu.asked_at_bytes = gpu.asked_at_bytes.max(held_bytes);
            let taken_bytes = gpu.free_bytes_at_first.saturating_sub(gpu.context.free_bytes()?);
            if let Some(peak_bytes) = self.used.driver_peak_bytes.get_mut(device) {
                *peak_bytes = taken_bytes.max(*peak_bytes);
            }
        }
        Ok(())
    }
}

/// Copies to a GPU, from the host or from a GPU. What a mapped file holds goes by way of a staging buffer.
pub(super) fn copy(copy: &Copy, slots: &mut Slots<'_>, io: Io<'_>) -> Result<()> {
    let staging = copy.via.map(|slot| slots[slot.0 as usize].take().ok_or_else(|| missing(slot)));
    let mut staging = staging.transpose()?;
    let result = copy_with(copy, slots, staging.as_mut(), io);
    if let (Some(slot), Some(staging)) = (copy.via, staging) {
        slots[slot.0 as usize] = Some(staging);
    }
    result
}

fn copy_with(copy: &Copy, slots: &Slots<'_>, staging: Option<&mut Arena<'_>>, io: Io<'_>) -> Result<()> {
    let (from, to) = (copy.source, copy.target);
    let arena = |slot: crate::plan::SlotId| slots[slot.0 as usize].as_ref().ok_or_else(|| missing(slot));
    let (source, target) = (arena(from.slot)?, arena(to.slot)?);
    let Arena::Cuda(target) = target else { return Err(missing(to.slot)) };
    if copy.change.is_some() {
        return Err(
            Fault::new("a plan that changes elements before they are copied to a GPU", "a change").mismatch()
        );
    }
    if let Arena::Cuda(source) = source {
        target.copy_from(to.start_byte, source, from.start_byte, from.len_bytes)?;
        io.progress.add(from.len_bytes);
        return Ok(());
    }
    let range = from.start_byte as usize..from.start_byte.saturating_add(from.len_bytes) as usize;
    let source = source.as_slice().and_then(|it| it.get(range)).ok_or_else(|| missing(from.slot))?;
    let mut staging = staging.and_then(Arena::as_mut_slice);
    let piece_bytes = staging.as_ref().map_or(COPY_BYTES, |it| it.len()).max(1);
    for (piece, start) in source.chunks(piece_bytes).zip((0..).step_by(piece_bytes)) {
        io.progress.check(io.path)?;
        let bytes = match &mut staging {
            Some(staging) => {
                let staged = &mut staging[..piece.len()];
                staged.copy_from_slice(piece);
                staged
            }
            None => piece,
        };
        target.write(to.start_byte + start as u64, bytes)?;
        io.progress.add(piece.len() as u64);
    }
    Ok(())
}
