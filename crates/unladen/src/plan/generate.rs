//! What each strategy does: a generator of steps.

use super::{
    Machine, Strategy,
    items::{Item, place_of, plain_run},
    on_gpu,
    place::{self, Place, read_of},
    staging::Ring,
    steps::{Copy, Fresh, SlotId, Span, Step, Steps},
};
use crate::{
    checkpoint::Checkpoint,
    device::Device,
    error::Result,
    memory::{PAGE_BYTES, Space},
    tensor::{Backing, FileId, TensorId},
};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    ops::Range,
};

/// What the steps of a plan are made from.
pub(super) struct Generator<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) items: &'a [Item],
    pub(super) machine: &'a Machine,
    pub(super) ring: Ring,
    /// Mappings that are handed out are brought in.
    pub(super) populates: bool,
    /// Tensors on GPUs have memory of their own, each.
    pub(super) frees_singly: bool,
}

/// The steps of one strategy for the whole checkpoint.
pub(super) fn steps(generator: &Generator<'_>, strategy: Strategy) -> Result<Steps> {
    let mut steps = Steps::default();
    if strategy == Strategy::Stream {
        generator.stream(&mut steps)?;
        return Ok(steps);
    }
    // One device after the other: the notebook has one.
    let mut devices: Vec<Device> = generator.items.iter().map(|it| it.device).collect();
    devices.sort_unstable();
    devices.dedup();
    for device in devices {
        let items = generator.items_where(|it| it.device == device);
        match strategy {
            Strategy::Naive => generator.model_beside_state_dict(&mut steps, device, &items, true)?,
            Strategy::Sequential => generator.sequential(&mut steps, device, &items)?,
            Strategy::Meta => generator.model_beside_state_dict(&mut steps, device, &items, false)?,
            Strategy::Mmap if device == Device::Host => generator.mmap(&mut steps, &items)?,
            // What a GPU computes with cannot be a view of a file.
            Strategy::Mmap | Strategy::MmapCopy => generator.mmap_copy(&mut steps, device, &items)?,
            Strategy::PerTensor => generator.per_tensor(&mut steps, device, &items)?,
            Strategy::Stream => {}
        }
    }
    Ok(steps)
}

/// One slot per tensor with data, each the caller's.
pub(super) fn steps_into_caller_memory(generator: &Generator<'_>) -> Result<Steps> {
    let mut steps = Steps::default();
    let mut reads = Vec::new();
    let mut handed_over = Vec::new();
    for item in generator.items {
        for tensor in item.tensors() {
            let slot = steps.slot();
            steps.push(Step::Adopt { slot, tensor });
            let target = Span { slot, start_byte: 0, len_bytes: item.len_bytes() };
            reads.extend(read_of(generator.checkpoint, item, &generator.machine.io, target)?);
            handed_over.push(Step::HandOver { tensor, slot, start_byte: 0, layout: item.layout.clone() });
        }
    }
    reads.sort_by_key(|read| (read.file, read.start_byte));
    steps.stream(reads, generator.ring, None);
    handed_over.into_iter().for_each(|it| steps.push(it));
    Ok(steps)
}

impl Generator<'_> {
    /// The items that are meant; without a copy if all are.
    fn items_where(&self, is_meant: impl Fn(&Item) -> bool) -> Cow<'_, [Item]> {
        match self.items.iter().all(&is_meant) {
            true => Cow::Borrowed(self.items),
            false => Cow::Owned(self.items.iter().filter(|it| is_meant(it)).cloned().collect()),
        }
    }

    /// `naive` and `meta`: two of everything on the device.
    fn model_beside_state_dict(
        &self,
        steps: &mut Steps,
        device: Device,
        items: &[Item],
        is_random: bool,
    ) -> Result<()> {
        let model = self.model(steps, device, items, is_random);
        let (state, slots) = self.state_dict(steps, items, device, "state dict")?;
        for (index, item) in items.iter().enumerate() {
            self.copy(steps, span(item, state[index]), span(item, model[index]));
        }
        slots.into_iter().for_each(|slot| steps.release(slot));
        hand_over(steps, items, &model);
        Ok(())
    }

    fn sequential(&self, steps: &mut Steps, device: Device, items: &[Item]) -> Result<()> {
        let model = self.model(steps, device, items, true);
        let (state, slots) = self.on_host(steps, items, Space::Host, "state dict")?;
        for (index, item) in items.iter().enumerate() {
            let (source, target) = (span(item, state[index]), span(item, model[index]));
            // The notebook's `.to(device)` makes a copy on the device before the parameter takes it.
            let space = Space::Device(device);
            let slot = steps.reserve(space, source.len_bytes, "one tensor", Some(item.tensor));
            let on_device = Span { slot, start_byte: 0, ..source };
            self.copy(steps, source, on_device);
            self.copy(steps, on_device, target);
            steps.release(slot);
        }
        slots.into_iter().for_each(|slot| steps.release(slot));
        hand_over(steps, items, &model);
        Ok(())
    }

    fn per_tensor(&self, steps: &mut Steps, device: Device, items: &[Item]) -> Result<()> {
        let model = self.model(steps, device, items, false);
        // The largest last, as in the notebook, whose model ends with its head: what is reserved beside it has all been
        // touched by then, so the prediction is what the system sees too.
        let mut by_size: Vec<usize> = (0..items.len()).collect();
        by_size.sort_by_key(|&index| items[index].len_bytes());
        for index in by_size {
            let item = &items[index];
            let slot = steps.reserve(Space::Host, item.len_bytes(), "one tensor", Some(item.tensor));
            let loaded = Span { slot, start_byte: 0, len_bytes: item.len_bytes() };
            let read = read_of(self.checkpoint, item, &self.machine.io, loaded)?;
            steps.stream(read.into_iter().collect(), self.ring, None);
            self.copy(steps, loaded, span(item, model[index]));
            steps.release(slot);
        }
        hand_over(steps, items, &model);
        Ok(())
    }

    /// What stays on the host first, then everything for all GPUs in one pass over the files.
    fn stream(&self, steps: &mut Steps) -> Result<()> {
        let on_host = self.items_where(|it| it.device == Device::Host);
        let on_gpus = self.items_where(|it| it.device != Device::Host);
        if !on_host.is_empty() || on_gpus.is_empty() {
            let space = Space::Device(Device::Host);
            let (places, _) = self.on_host(steps, &on_host, space, "state dict")?;
            hand_over(steps, &on_host, &places);
        }
        let (places, _) = self.on_gpus(steps, &on_gpus, "state dict")?;
        hand_over(steps, &on_gpus, &places);
        Ok(())
    }

    fn mmap_copy(&self, steps: &mut Steps, device: Device, items: &[Item]) -> Result<()> {
        let model = self.model(steps, device, items, false);
        let maps = self.map_files(steps, items);
        let is_gpu = device != Device::Host;
        let via = is_gpu.then(|| steps.reserve(Space::Staging, self.ring.chunk_bytes, "staging", None));
        let mut reads = Vec::new();
        for (index, item) in items.iter().enumerate().filter(|(_, item)| item.len_bytes() > 0) {
            let target = span(item, model[index]);
            // What has to be brought into order, or takes two changes, goes through a staging buffer, in pieces; on the way to
            // a GPU whatever is changed. What is packed cannot be mapped.
            let run = plain_run(self.checkpoint, item).filter(|it| !self.checkpoint.is_packed(it.file));
            let run = run.filter(|it| match is_gpu {
                true => it.change.is_nothing(),
                false => it.change.from == it.change.to || it.change.resolve.is_nothing(),
            });
            let Some(run) = run else {
                match is_gpu {
                    true => reads.extend(on_gpu::reads_of(self.checkpoint, item, target, self.ring)?),
                    false => reads.extend(read_of(self.checkpoint, item, &self.machine.io, target)?),
                }
                continue;
            };
            let source = Span { slot: maps[&run.file], start_byte: run.start_byte, len_bytes: run.len_bytes };
            let change = Some(run.change).filter(|it| !it.is_nothing());
            steps.push(Step::Copy(Copy { source, target, change, via }));
        }
        via.into_iter().for_each(|slot| steps.release(slot));
        match is_gpu {
            true => steps.upload(reads, self.ring, |_| ordinal(device)),
            false if !reads.is_empty() => steps.stream(reads, self.ring, None),
            false => {}
        }
        maps.into_values().for_each(|slot| steps.release(slot));
        hand_over(steps, items, &model);
        Ok(())
    }

    fn mmap(&self, steps: &mut Steps, items: &[Item]) -> Result<()> {
        let (viewed, copied): (Vec<&Item>, Vec<&Item>) =
            items.iter().partition(|item| can_be_a_view(self.checkpoint, item));
        let copied: Vec<Item> = copied.into_iter().cloned().collect();

        // What a mapping cannot hand out gets memory of its own.
        if !copied.is_empty() {
            let owner = "tensors that a mapping cannot hand out";
            let (places, _) = self.on_host(steps, &copied, Space::Device(Device::Host), owner)?;
            hand_over(steps, &copied, &places);
        }
        let maps = self.map_files(steps, viewed.iter().copied());
        if self.populates {
            self.populate(steps, viewed.iter().copied(), &maps);
        }
        for item in viewed {
            let Some(piece) = self.checkpoint.pieces(item.tensor).next() else { continue };
            let storage = self.checkpoint.storage_of(&piece);
            for tensor in item.tensors() {
                let (slot, start_byte) = (maps[&storage.file], storage.start_byte);
                steps.push(Step::HandOver { tensor, slot, start_byte, layout: piece.layout.clone() });
            }
        }
        Ok(())
    }

    /// Brings in what is viewed, neighbours together.
    fn populate<'i>(
        &self,
        steps: &mut Steps,
        viewed: impl Iterator<Item = &'i Item>,
        maps: &BTreeMap<FileId, SlotId>,
    ) {
        let mut ranges: Vec<(FileId, Range<u64>)> = Vec::new();
        for piece in viewed.filter_map(|item| self.checkpoint.pieces(item.tensor).next()) {
            let (file, start_byte) = place_of(self.checkpoint, &piece);
            let stored = piece.layout.stored_bytes();
            ranges.push((file, start_byte..start_byte + (stored.end - stored.start)));
        }
        ranges.sort_unstable_by_key(|(file, range)| (*file, range.start));
        for (&file, &slot) in maps {
            let mut merged: Vec<Range<u64>> = Vec::new();
            for (_, range) in ranges.iter().filter(|(of, _)| *of == file) {
                match merged.last_mut().filter(|last| range.start <= last.end + PAGE_BYTES) {
                    Some(last) => last.end = last.end.max(range.end),
                    None => merged.push(range.clone()),
                }
            }
            steps.push(Step::Populate { slot, ranges: merged });
        }
    }

    /// Some tensors of one device, read from the files: where they lie, and the slots that hold them.
    fn state_dict(
        &self,
        steps: &mut Steps,
        items: &[Item],
        device: Device,
        owner: &'static str,
    ) -> Result<(Vec<Place>, Vec<SlotId>)> {
        match device {
            Device::Host => self.on_host(steps, items, Space::Device(device), owner),
            Device::Cuda(_) => self.on_gpus(steps, items, owner),
        }
    }

    /// Some tensors, read to GPUs.
    fn on_gpus(
        &self,
        steps: &mut Steps,
        items: &[Item],
        owner: &'static str,
    ) -> Result<(Vec<Place>, Vec<SlotId>)> {
        let mut slots: Vec<(SlotId, Device, Option<TensorId>)> = Vec::new();
        let mut slot_of: BTreeMap<Device, SlotId> = BTreeMap::new();
        let mut of_items = Vec::with_capacity(items.len());
        for item in items {
            let shared = slot_of.get(&item.device).copied().filter(|_| !self.frees_singly);
            let slot = shared.unwrap_or_else(|| {
                let slot = steps.slot();
                slots.push((slot, item.device, self.frees_singly.then_some(item.tensor)));
                slot_of.insert(item.device, slot);
                slot
            });
            of_items.push(slot);
        }
        let laid_out = on_gpu::lay_out(self.checkpoint, items, &of_items, self.ring)?;
        for (slot, device, tensor) in &slots {
            let len_bytes = laid_out.len_bytes.get(slot).copied().unwrap_or(0);
            steps.reserve_slot(*slot, Space::Device(*device), len_bytes, owner, *tensor);
        }
        let device_of: HashMap<SlotId, Device> =
            slots.iter().map(|(slot, device, _)| (*slot, *device)).collect();
        steps.upload(laid_out.reads, self.ring, |slot| device_of.get(&slot).copied().and_then(ordinal));
        Ok((laid_out.places, slots.into_iter().map(|(slot, ..)| slot).collect()))
    }

    /// Some tensors, read to the host.
    fn on_host(
        &self,
        steps: &mut Steps,
        items: &[Item],
        space: Space,
        owner: &'static str,
    ) -> Result<(Vec<Place>, Vec<SlotId>)> {
        let slots = [steps.slot(), steps.slot()];
        let (checkpoint, io) = (self.checkpoint, &self.machine.io);
        let state = place::state_dict(checkpoint, items, io, self.ring.chunk_bytes, slots)?;
        for (slot, len_bytes) in slots.into_iter().zip([state.pages_bytes, state.rest_bytes]) {
            steps.reserve_slot(slot, space, len_bytes, owner, None);
        }
        let fresh = Fresh { slot: slots[0], is_placed: state.can_be_placed };
        steps.stream(state.reads, self.ring, Some(fresh).filter(|_| state.pages_bytes > 0));
        Ok((state.places, slots.to_vec()))
    }

    /// Maps every file that holds bytes of a tensor as they are.
    fn map_files<'i>(
        &self,
        steps: &mut Steps,
        items: impl IntoIterator<Item = &'i Item>,
    ) -> BTreeMap<FileId, SlotId> {
        let mut maps = BTreeMap::new();
        for item in items.into_iter().filter(|item| item.len_bytes() > 0) {
            for piece in self.checkpoint.pieces(item.tensor) {
                let (file, _) = place_of(self.checkpoint, &piece);
                if self.checkpoint.is_packed(file) {
                    continue;
                }
                maps.entry(file).or_insert_with(|| {
                    let slot = steps.slot();
                    let len_bytes = self.checkpoint.file(file).len_bytes;
                    steps.push(Step::Map { slot, file, len_bytes });
                    slot
                });
            }
        }
        maps
    }

    pub(super) fn copy(&self, steps: &mut Steps, source: Span, target: Span) {
        if target.len_bytes > 0 {
            steps.push(Step::Copy(Copy { source, target, change: None, via: None }));
        }
    }
}

fn ordinal(device: Device) -> Option<u32> {
    match device {
        Device::Host => None,
        Device::Cuda(ordinal) => Some(ordinal),
    }
}

pub(super) fn span(item: &Item, Place { slot, start_byte }: Place) -> Span {
    Span { slot, start_byte, len_bytes: item.len_bytes() }
}

fn hand_over(steps: &mut Steps, items: &[Item], places: &[Place]) {
    for (item, place) in items.iter().zip(places) {
        for tensor in item.tensors() {
            let (slot, start_byte, layout) = (place.slot, place.start_byte, item.layout.clone());
            steps.push(Step::HandOver { tensor, slot, start_byte, layout });
        }
    }
}

/// A mapping hands out bytes as they are, where they are: nothing to unpack or to change, in one piece, aligned for the
/// type.
fn can_be_a_view(checkpoint: &Checkpoint, item: &Item) -> bool {
    let tensor = checkpoint.tensor(item.tensor);
    let Backing::Storage(storage) = tensor.backing else { return false };
    let storage = &checkpoint.storages[storage.0 as usize];
    tensor.layout.n_elems() > 0
        && !checkpoint.is_packed(storage.file)
        && tensor.layout.dtype() == item.layout.dtype()
        && tensor.layout.resolve(storage.swapped).is_nothing()
        && storage.start_byte.is_multiple_of(tensor.layout.dtype().size_bytes())
}
