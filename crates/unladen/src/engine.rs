//! Runs plans: the only room with threads. Knows no format, decides nothing.

mod copy;
mod gpus;
mod queue;
mod ring;
mod split;
mod stream;
mod touch;
mod upload;
mod worker;

pub use gpus::{OpenGpu, Staging, UsedGpus};

use crate::{
    destination::{Arena, Placed, StateDict},
    device::Device,
    error::{Error, Fault, Result},
    memory::{Held, HostBuffer, Ledger, Space},
    plan::{LoadPlan, SlotId, Step},
    progress::Progress,
    source::FileSet,
    tensor::{FileId, TensorId},
};
use gpus::{Ask, Gpus};
use std::{path::Path, sync::Arc};
use stream::Stream;
use upload::Upload;

/// Gives the values of a model that was not loaded: called with a tensor's name and its memory, by several threads.
pub type InitialValues<'a> = &'a (dyn Fn(&str, &mut [u8]) + Sync);

/// What every thread of a run may look at.
#[derive(Clone, Copy, Debug)]
pub struct Io<'r> {
    /// The checkpoint's path, for messages.
    pub path: &'r Path,
    /// Its files, by position.
    pub files: &'r FileSet,
    /// Bytes done, and the wish to stop.
    pub progress: &'r Progress,
}

/// What a run needs besides the plan.
pub struct Run<'r, 'a> {
    /// For every thread.
    pub io: Io<'r>,
    /// The tensors' names, by position.
    pub names: &'r (dyn Fn(TensorId) -> &'r str + Sync),
    /// Where reservations are counted.
    pub ledger: Arc<Ledger>,
    /// Opens a GPU.
    pub open_gpu: OpenGpu<'r>,
    /// What `Step::Fill` fills with; zeros without.
    pub initial_values: Option<InitialValues<'r>>,
    /// The caller's memory for `Step::Adopt`.
    pub adopt: &'r mut dyn FnMut(TensorId) -> Result<&'a mut [u8]>,
    /// Called after each step with its position and what is held.
    pub after_step: &'r mut dyn FnMut(usize, Held),
}

/// Runs a plan, and says what it saw of the GPUs. On failure everything that it took is given back.
pub fn run<'a>(plan: &LoadPlan, run: Run<'_, 'a>) -> Result<(StateDict<'a>, UsedGpus)> {
    let io = run.io;
    if io.files.fingerprint() != plan.fingerprint() {
        let fault = Fault::new("a plan that was made for this checkpoint", "one for other files");
        return Err(fault
            .hint("plan again: the checkpoint was opened anew since")
            .mismatch()
            .in_file(io.path));
    }
    io.files.check_unchanged()?;
    io.progress.expect(plan.work_bytes());
    let n_threads = plan.n_threads();
    // Names, shapes and steps are there already, stacks soon.
    let _bookkeeping = run.ledger.reserve(Space::Bookkeeping, plan.bookkeeping_bytes());
    let mut gpus = Gpus::new(run.open_gpu);
    let mut slots: Slots<'a> = (0..plan.n_slots()).map(|_| None).collect();
    let mut placed: Vec<(TensorId, SlotId, Placed)> = Vec::new();
    let mut mapped: Vec<FileId> = Vec::new();
    for (number, step) in plan.steps().iter().enumerate() {
        io.progress.check(io.path)?;
        match step {
            Step::Reserve { slot, space, len_bytes, .. } => {
                let reservation = run.ledger.reserve(*space, *len_bytes);
                slots[slot.0 as usize] = Some(match space {
                    Space::Device(Device::Cuda(ordinal)) => Arena::Cuda(gpus.reserve(*ordinal, reservation)?),
                    _ => Arena::Owned(HostBuffer::new(reservation, io.path)?),
                });
            }
            Step::Adopt { slot, tensor } => {
                slots[slot.0 as usize] = Some(Arena::Caller((run.adopt)(*tensor)?))
            }
            Step::Map { slot, file, len_bytes } => {
                let reservation = run.ledger.reserve(Space::Mapped, *len_bytes);
                let mapping = io.files.file(file.0 as usize)?.map(reservation)?;
                mapped.push(*file);
                slots[slot.0 as usize] = Some(Arena::Mapped(mapping));
            }
            Step::Fill(fills) => {
                let fills = fills.iter().map(|fill| (fill.target, (run.names)(fill.tensor)));
                copy::fill(fills, &mut slots, n_threads, io, run.initial_values)?;
            }
            Step::Stream { staging, chunk_bytes, fresh, reads } => {
                let (chunk_bytes, fresh, paths) = (*chunk_bytes, *fresh, plan.io());
                Stream { staging, chunk_bytes, fresh, reads, paths, n_threads }.run(&mut slots, io)?;
            }
            Step::Upload { staging, rooms, scratch, reads } => {
                let (rooms, paths) = (*rooms, plan.io());
                let upload = Upload { staging, rooms, scratch, reads, paths, n_threads };
                let why_pageable = upload.run(&mut slots, io)?;
                gpus.staged(why_pageable);
                // What the driver took for itself meanwhile and keeps (kernels that it unloads late) is seen here; what it gave
                // back with the upload is not.
                gpus.look(Ask::Always, &run.ledger)?;
            }
            Step::Populate { slot, ranges } => copy::populate(*slot, ranges, &slots, n_threads, io)?,
            Step::Copy(copy) => {
                copy::copy(copy, &mut slots, n_threads, io)?;
                gpus.look(Ask::IfMoreIsHeld, &run.ledger)?;
            }
            Step::Release(slot) => {
                gpus.look(Ask::IfMoreIsHeld, &run.ledger)?;
                slots[slot.0 as usize] = None;
            }
            Step::HandOver { tensor, slot, start_byte, layout } => {
                let at = Placed { arena: 0, start_byte: *start_byte, layout: layout.clone() };
                placed.push((*tensor, *slot, at));
            }
        }
        (run.after_step)(number, run.ledger.get().0);
    }
    // What was reserved for tensors without bytes, say, was never copied to.
    gpus.look(Ask::IfMoreIsHeld, &run.ledger)?;
    io.files.check_unchanged()?;
    // Opening a file again compares it with what it was.
    mapped.iter().try_for_each(|file| io.files.file(file.0 as usize)?.check_unchanged())?;
    Ok((hand_over(slots, placed, run.names)?, gpus.used))
}

/// Memory by slot number.
type Slots<'a> = Vec<Option<Arena<'a>>>;

/// A slot that a step names was released or never reserved: a plan that contradicts itself.
fn missing(slot: SlotId) -> Error {
    Fault::new(format!("a plan that reserves slot {} before it uses it", slot.0), "none").mismatch()
}

/// Makes the state dict, its tensors in the checkpoint's order and its arenas without the slots that are gone.
fn hand_over<'a, 'r>(
    slots: Slots<'a>,
    mut placed: Vec<(TensorId, SlotId, Placed)>,
    names: &dyn Fn(TensorId) -> &'r str,
) -> Result<StateDict<'a>> {
    let mut arena_of = vec![usize::MAX; slots.len()];
    let mut arenas = Vec::new();
    for (slot, arena) in slots.into_iter().enumerate() {
        if let Some(arena) = arena {
            arena_of[slot] = arenas.len();
            arenas.push(arena);
        }
    }
    placed.sort_by_key(|(tensor, ..)| *tensor);
    StateDict::new(
        arenas,
        placed.into_iter().map(|(tensor, slot, at)| {
            (names(tensor).to_owned(), Placed { arena: arena_of[slot.0 as usize], ..at })
        }),
    )
}
