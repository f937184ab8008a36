//! Reads files to GPUs: threads fill staging buffers, this thread hands them to the driver and waits for it.
//!
//! A buffer goes round: empty, filled with a piece of a file, on its way to a GPU, empty. Reading and copying overlap as
//! long as there are buffers in every state.

use super::{
    Io, Slots, missing,
    ring::{self, Ring},
    split::for_each,
    touch::Chooser,
    worker::{Common, Files, Read as FileRead, Staging, convert, fill, too_small},
};
use crate::{
    cuda::{self, Context, GpuCasts, InFlight, Lines, Memory, SlotCopy},
    destination::Arena,
    error::Result,
    io_path::IoPath,
    memory::{HostBuffer, PAGE_BYTES, staging_bytes},
    plan::{Change, Gather, Read, Rooms, SlotId, Span, Way},
    tensor::{Block, FileId},
};
use smallvec::SmallVec;
use std::{collections::VecDeque, ops::Range, thread};

/// Elements are cut in multiples of so many, whose bytes are whole pages whatever their size.
const CUT_ELEMS: u64 = PAGE_BYTES;

/// A `Step::Upload`.
pub(super) struct Upload<'p> {
    pub(super) staging: &'p [SlotId],
    pub(super) rooms: Rooms,
    /// By the GPU's ordinal.
    pub(super) scratch: &'p [(u32, SlotId)],
    pub(super) reads: &'p [Read],
    /// By file.
    pub(super) paths: &'p [IoPath],
    pub(super) n_threads: usize,
}

/// What of a staging buffer that was filled goes where.
struct Full {
    /// Of the buffer.
    range: Range<usize>,
    target: Span,
    finish: Finish,
}

/// What a GPU does with what it fetches.
enum Finish {
    /// It stays as it is.
    Nothing,
    /// Elements are made wider.
    Widen(Change),
    /// Runs of bytes are put where they belong: the source is the buffer's range, the target the span.
    Scatter(Block),
}

/// A GPU that something is read to.
struct Gpu<'s> {
    ordinal: u32,
    upload: cuda::Upload,
    /// Where elements are widened from.
    scratch: Option<(GpuCasts, &'s Memory)>,
    /// Buffers of them so far: they have the two halves of the scratch by turns.
    n_widened: u64,
}

/// What is on its way.
struct Flight {
    in_flight: InFlight,
    widen: Option<Widen>,
}

/// All that is on its way.
struct Flights<'s> {
    flights: VecDeque<Flight>,
    chunk_bytes: u64,
    gpus: Vec<Gpu<'s>>,
    slots: &'s Slots<'s>,
}

/// What there is to do once it has arrived.
struct Widen {
    change: Change,
    /// Position of the GPU.
    gpu: usize,
    scratch_byte: u64,
    n_elems: u64,
    target: Span,
}

impl Upload<'_> {
    /// Returns why staging was not pinned, if not all of it was: then bytes come as well, only slower.
    pub(super) fn run(&self, slots: &mut Slots<'_>, io: Io<'_>) -> Result<Option<String>> {
        let contexts = self.contexts(slots)?;
        let mut buffers = Vec::with_capacity(self.staging.len());
        for &slot in self.staging {
            match slots[slot.0 as usize].take().ok_or_else(|| missing(slot))? {
                Arena::Owned(buffer) => buffers.push(buffer),
                _ => return Err(missing(slot)),
            }
        }
        let (empty, why_pageable) = self.run_with(buffers, &contexts, slots, io)?;
        for (&slot, buffer) in self.staging.iter().zip(empty) {
            slots[slot.0 as usize] = Some(Arena::Owned(buffer.into_buffer()?));
        }
        Ok(why_pageable)
    }

    /// Of every GPU that something is read to, once.
    fn contexts(&self, slots: &Slots<'_>) -> Result<Vec<Context>> {
        let mut contexts: Vec<Context> = Vec::new();
        for read in self.reads {
            let context = memory(slots, read.target.slot)?.context();
            if contexts.iter().all(|it| it.ordinal() != context.ordinal()) {
                contexts.push(context.clone());
            }
        }
        Ok(contexts)
    }

    fn run_with(
        &self,
        buffers: Vec<HostBuffer>,
        contexts: &[Context],
        slots: &Slots<'_>,
        io: Io<'_>,
    ) -> Result<(Vec<cuda::Slot>, Option<String>)> {
        let ring: Ring<cuda::Slot, Full> = Ring::with_room(buffers.len());
        // To pin buffers takes longer than to fill them, and compiling kernels takes its time, too: threads read meanwhile,
        // into the buffers that are pinned.
        let mut why_pageable = None;
        let prepare = || {
            for buffer in buffers {
                if ring.is_stopped() {
                    break;
                }
                let slot = cuda::Slot::new(buffer, contexts)?;
                why_pageable = why_pageable.take().or_else(|| slot.why_pageable().map(str::to_owned));
                ring.give_empty(slot);
            }
            let gpus = contexts.iter().map(|it| self.gpu(it, slots)).collect::<Result<Vec<_>>>()?;
            let flights = VecDeque::with_capacity(self.staging.len());
            Ok(Flights { flights, chunk_bytes: self.rooms.chunk_bytes, gpus, slots })
        };
        let (filled, emptied) = thread::scope(|scope| {
            let filling = thread::Builder::new().stack_size(crate::memory::STACK_BYTES as usize);
            let filling = filling.spawn_scoped(scope, || ring.fill_all(|| self.fill_all(&ring, io)));
            match filling {
                Ok(filling) => {
                    let emptied = ring.empty_all(prepare);
                    let filled = filling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    (filled, emptied)
                }
                // Without it nobody fills: this thread is the driver's.
                Err(source) => (Err(crate::Error::io(io.path, "start a thread", source)), Ok(())),
            }
        });
        filled?;
        emptied?;
        Ok((ring.into_empty(), why_pageable))
    }

    fn gpu<'s>(&self, context: &Context, slots: &'s Slots<'_>) -> Result<Gpu<'s>> {
        let ordinal = context.ordinal();
        let scratch = self.scratch.iter().find(|(of, _)| *of == ordinal);
        let scratch = scratch.map(|(_, slot)| Ok((GpuCasts::load(context)?, memory(slots, *slot)?)));
        let (upload, scratch) = (cuda::Upload::new(context)?, scratch.transpose()?);
        Ok(Gpu { ordinal, upload, scratch, n_widened: 0 })
    }

    /// Fills buffers with every piece of every read, on several threads.
    fn fill_all(&self, ring: &Ring<cuda::Slot, Full>, io: Io<'_>) -> Result<()> {
        let chooser = Chooser::default();
        let chunk_bytes = self.rooms.chunk_bytes;
        let common = Common { paths: self.paths, chunk_bytes, chooser: &chooser, io };
        let jobs = Cutter { upload: self, reads: self.reads, current: None };
        let fillers = (0..self.n_threads.max(1)).map(|_| Files::default()).collect();
        // Nothing is taken any more once something failed.
        let jobs = jobs.map_while(|job| (!ring.is_stopped()).then_some(Ok(job)));
        for_each(jobs, fillers, io, |files, job| {
            for cut in job {
                let mut left = Some(cut);
                while let Some(cut) = left.take() {
                    let is_filled = ring.fill(|slot| {
                        io.progress.check(io.path)?;
                        let (piece, rest) = self.cut(cut);
                        left = rest.filter(|_| piece.is_in_order);
                        self.stage(files, &piece, slot, &common)
                    });
                    if !is_filled? {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    /// Brings a piece into a buffer, as it shall lie on the GPU.
    fn stage(
        &self,
        files: &mut Files,
        piece: &Piece<'_>,
        slot: &mut cuda::Slot,
        common: &Common<'_>,
    ) -> Result<Full> {
        let Piece { file, start_byte, len_bytes, target, way, number, .. } = *piece;
        let source_room = staging_bytes(self.rooms.chunk_bytes) as usize;
        let cast_room = self.rooms.cast_bytes as usize;
        let buffer = slot.as_mut_slice();
        let (source, rest) = buffer.split_at_mut_checked(source_room).ok_or_else(too_small)?;
        let (cast, room) = rest.split_at_mut_checked(cast_room).ok_or_else(too_small)?;
        let read = FileRead {
            file: files.open(file, start_byte, common)?,
            path: common.path(file),
            start_byte,
            len_bytes,
        };
        let from_source = {
            let lead_bytes = read.lead_bytes() as usize;
            lead_bytes..lead_bytes + len_bytes as usize
        };
        let from_room = {
            let start = source_room + cast_room;
            start..start + target.len_bytes as usize
        };
        let laid_out = room.get_mut(..target.len_bytes as usize).ok_or_else(too_small);
        let range = match way {
            Way::Plain => {
                fill(source, &read)?;
                from_source
            }
            Way::Elements(change) => {
                let bytes = fill(source, &read)?;
                change.resolve.apply(change.from, bytes);
                match change.from == change.to || change.widens() {
                    true => from_source,
                    false => {
                        convert(change, bytes, laid_out?);
                        from_room
                    }
                }
            }
            Way::Parts(parts) => {
                let room = laid_out?;
                // Between the tensors too, lest what was here before goes to the GPU.
                room.fill(0);
                Staging { source, cast }.parts(&read, parts, room)?;
                from_room
            }
            Way::Gather(gathers) => {
                Staging { source, cast }.gathers(files, gathers, laid_out?, common)?;
                return Ok(Full { range: from_room, target, finish: Finish::Nothing });
            }
            Way::Boxes(gather) => {
                let boxes = gather.boxes(self.rooms.chunk_bytes);
                let (block, scatter) = boxes.get(number).ok_or_else(too_small)?.by_way_of_a_buffer();
                let range = from_room.start..from_room.start + block.len_bytes() as usize;
                let room = room.get_mut(..range.len()).ok_or_else(too_small)?;
                let gather = Gather { block, ..**gather };
                Staging { source, cast }.gathers(files, &[gather], room, common)?;
                return Ok(Full { range, target, finish: Finish::Scatter(scatter) });
            }
        };
        common.io.progress.add(len_bytes);
        read.file.check_unchanged()?;
        let finish = match way {
            Way::Elements(change) if change.widens() => Finish::Widen(*change),
            _ => Finish::Nothing,
        };
        Ok(Full { range, target, finish })
    }

    /// The next piece of a read, and what is left of it.
    fn cut<'p>(&self, cut: Cut<'p>) -> (Piece<'p>, Option<Cut<'p>>) {
        let Cut { read, number, done_bytes, target } = cut;
        let Read { file, ref way, is_in_order, .. } = *read;
        if let Way::Boxes(gather) = way {
            let boxes = gather.boxes(self.rooms.chunk_bytes);
            let piece =
                Piece { file, start_byte: gather.start_byte, len_bytes: 0, target, way, number, is_in_order };
            let next = Cut { number: number + 1, ..cut };
            return (piece, (next.number < boxes.count()).then_some(next));
        }
        let left_bytes = read.len_bytes - done_bytes;
        let start_byte = read.start_byte + done_bytes;
        let chunk_bytes = self.rooms.chunk_bytes.max(1);
        let (len_bytes, target_bytes) = match &read.way {
            Way::Plain => {
                // Behind the first piece, each begins a page of the file.
                let to_boundary = (start_byte + 1).next_multiple_of(chunk_bytes) - start_byte;
                (to_boundary, to_boundary)
            }
            Way::Elements(change) => {
                let n_elems = (chunk_bytes / change.from.size_bytes()).max(1);
                let n_elems = if n_elems > CUT_ELEMS { n_elems / CUT_ELEMS * CUT_ELEMS } else { n_elems };
                (n_elems * change.from.size_bytes(), n_elems * change.to.size_bytes())
            }
            Way::Parts(_) | Way::Gather(_) | Way::Boxes(_) => (left_bytes, target.len_bytes),
        };
        let is_all = len_bytes >= left_bytes;
        let (len_bytes, target_bytes) = if is_all {
            (left_bytes, target.len_bytes)
        } else {
            (len_bytes, target_bytes.min(target.len_bytes))
        };
        let mine = Span { len_bytes: target_bytes, ..target };
        let rest = (!is_all).then(|| {
            let start_byte = target.start_byte + target_bytes;
            let target = Span { start_byte, len_bytes: target.len_bytes - target_bytes, ..target };
            Cut { number: number + 1, done_bytes: done_bytes + len_bytes, target, ..cut }
        });
        (Piece { file, start_byte, len_bytes, target: mine, way, number, is_in_order }, rest)
    }
}

fn memory<'s>(slots: &'s Slots<'_>, slot: SlotId) -> Result<&'s Memory> {
    match slots.get(slot.0 as usize).and_then(Option::as_ref) {
        Some(Arena::Cuda(memory)) => Ok(memory),
        _ => Err(missing(slot)),
    }
}

/// The copies of a block from a slot to a GPU. The axis with the most steps is a copy's lines; the others are walked.
fn copies_of<'m>(block: &Block, target: &'m Memory) -> Vec<SlotCopy<'m>> {
    let mut outer = block.axes.clone();
    let longest = (0..outer.len()).max_by_key(|&it| outer[it].len);
    let lines = longest.map(|it| outer.remove(it)).map_or(Lines::ONE, |axis| Lines {
        count: axis.len,
        slot_step_bytes: axis.source_step_bytes,
        target_step_bytes: axis.target_step_bytes,
    });
    let whole = SlotCopy {
        slot_byte: block.source_byte,
        len_bytes: block.run_bytes,
        target,
        target_byte: block.target_byte,
        lines,
    };
    outer.iter().fold(vec![whole], |copies, axis| {
        let along = |copy: &SlotCopy<'m>, step: u64| SlotCopy {
            slot_byte: copy.slot_byte + step * axis.source_step_bytes,
            target_byte: copy.target_byte + step * axis.target_step_bytes,
            ..*copy
        };
        copies.iter().flat_map(|copy| (0..axis.len).map(|step| along(copy, step))).collect()
    })
}

impl ring::Flights<cuda::Slot, Full> for Flights<'_> {
    fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    fn is_first_done(&self) -> Result<bool> {
        self.flights.front().map_or(Ok(false), |it| it.in_flight.is_done())
    }

    fn hand_over(&mut self, slot: cuda::Slot, full: Full, ring: &Ring<cuda::Slot, Full>) -> Result<()> {
        // While both halves of the scratch are in use, the first must become free again.
        let n_widened = |flights: &VecDeque<Flight>| flights.iter().filter(|it| it.widen.is_some()).count();
        while matches!(full.finish, Finish::Widen(_)) && n_widened(&self.flights) >= 2 {
            self.land(ring)?;
        }
        let flight = self.submit(slot, full)?;
        self.flights.push_back(flight);
        Ok(())
    }

    /// Has it widened as well, if it is to be.
    fn land(&mut self, ring: &Ring<cuda::Slot, Full>) -> Result<()> {
        let Some(Flight { in_flight, widen }) = self.flights.pop_front() else { return Ok(()) };
        ring.give_empty(in_flight.wait()?);
        let Some(Widen { change, gpu, scratch_byte, n_elems, target }) = widen else { return Ok(()) };
        let (casts, scratch) = self.gpus[gpu].scratch.as_ref().ok_or_else(|| missing(target.slot))?;
        let to = (memory(self.slots, target.slot)?, target.start_byte);
        casts.cast([change.from, change.to], (scratch, scratch_byte), to, n_elems)
    }
}

impl Flights<'_> {
    fn submit(&mut self, slot: cuda::Slot, full: Full) -> Result<Flight> {
        let Full { range, target, finish } = full;
        let to = memory(self.slots, target.slot)?;
        let gpu = self.gpus.iter().position(|it| it.ordinal == to.ordinal());
        let number = gpu.ok_or_else(|| missing(target.slot))?;
        let Gpu { upload, scratch, n_widened, .. } = &mut self.gpus[number];
        let len_bytes = range.len() as u64;
        let slot_byte = range.start as u64;
        let copy =
            |target, target_byte| SlotCopy { slot_byte, len_bytes, target, target_byte, lines: Lines::ONE };
        let change = match finish {
            Finish::Nothing => {
                let in_flight = upload.submit(slot, &[copy(to, target.start_byte)])?;
                return Ok(Flight { in_flight, widen: None });
            }
            Finish::Scatter(mut block) => {
                block.source_byte += slot_byte;
                block.target_byte += target.start_byte;
                let in_flight = upload.submit(slot, &copies_of(&block, to))?;
                return Ok(Flight { in_flight, widen: None });
            }
            Finish::Widen(change) => change,
        };
        let (_, scratch) = scratch.as_ref().ok_or_else(|| missing(target.slot))?;
        let scratch_byte = *n_widened % 2 * self.chunk_bytes;
        *n_widened += 1;
        let n_elems = len_bytes / change.from.size_bytes();
        let widen = Widen { change, gpu: number, scratch_byte, n_elems, target };
        Ok(Flight { in_flight: upload.submit(slot, &[copy(scratch, scratch_byte)])?, widen: Some(widen) })
    }
}

/// What a thread brings into one buffer.
struct Piece<'p> {
    file: FileId,
    /// Of the file.
    start_byte: u64,
    len_bytes: u64,
    /// Where it goes; of a box, where all of them go.
    target: Span,
    way: &'p Way,
    /// How many pieces of the read come before it.
    number: u64,
    is_in_order: bool,
}

/// A read of which the first pieces are taken: how many, how many bytes, and what is left of its target.
#[derive(Clone, Copy)]
struct Cut<'p> {
    read: &'p Read,
    number: u64,
    done_bytes: u64,
    target: Span,
}

/// Cuts reads into pieces while they are taken: one at a time, or all reads of a packed record, of which nothing can be had
/// but one piece after the other.
struct Cutter<'p> {
    upload: &'p Upload<'p>,
    reads: &'p [Read],
    /// A read that is not taken to its end.
    current: Option<Cut<'p>>,
}

impl<'p> Iterator for Cutter<'p> {
    type Item = SmallVec<[Cut<'p>; 1]>;

    fn next(&mut self) -> Option<Self::Item> {
        let cut = match self.current.take() {
            Some(cut) => cut,
            None => self.begin()?,
        };
        if !cut.read.is_in_order {
            self.current = self.upload.cut(cut).1;
            return Some(SmallVec::from_buf([cut]));
        }
        let mut cuts = SmallVec::from_buf([cut]);
        while self.reads.first().is_some_and(|next| cut.read.goes_with(next)) {
            cuts.extend(self.begin());
        }
        Some(cuts)
    }
}

impl<'p> Cutter<'p> {
    fn begin(&mut self) -> Option<Cut<'p>> {
        let (read, rest) = self.reads.split_first()?;
        self.reads = rest;
        Some(Cut { read, number: 0, done_bytes: 0, target: read.target })
    }
}
