//! The ways of loading, each a generator of steps. The first six are the cells of Sebastian Raschka's notebook
//! "Memory-efficient Model Weight Loading"; the last is ours.

use super::{
    Machine,
    items::{Item, place_of, plain_run},
    place::{self, Place, packed, read_of},
    staging::Ring,
    steps::{Copy, Fill, Fresh, SlotId, Span, Step, Steps},
};
use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    memory::{PAGE_BYTES, Space},
    tensor::{Backing, FileId},
};
use std::{collections::BTreeMap, fmt, ops::Range, str::FromStr};

/// A way of loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// A random model on the device, the whole state dict beside it on the device, a copy of each tensor.
    Naive,
    /// A random model on the device, the whole state dict on the host, one tensor at a time to the device.
    Sequential,
    /// An empty model on the device, the whole state dict beside it on the device, a copy of each tensor.
    Meta,
    /// No model: the tensors are views of the mapped file.
    Mmap,
    /// An empty model on the device, filled from the mapped file.
    MmapCopy,
    /// An empty model on the device, filled with one tensor at a time, loaded on the host.
    PerTensor,
    /// Straight from the file to where the bytes stay.
    Stream,
}

/// Strategy, name, and what it does in a line.
const NAMES: &[(Strategy, &str, &str)] = &[
    (Strategy::Naive, "naive", "random model, whole state dict beside it, copy"),
    (Strategy::Sequential, "sequential", "random model, state dict on the host, one tensor at a time"),
    (Strategy::Meta, "meta", "empty model, whole state dict beside it, copy"),
    (Strategy::Mmap, "mmap", "views of the mapped file, read when touched"),
    (Strategy::MmapCopy, "mmap-copy", "empty model, filled from the mapped file"),
    (Strategy::PerTensor, "per-tensor", "empty model, one file per tensor"),
    (Strategy::Stream, "stream", "straight from the file to where the bytes stay"),
];

impl Strategy {
    /// Every strategy, in the notebook's order, ours last.
    pub fn all() -> impl Iterator<Item = Strategy> {
        NAMES.iter().map(|(strategy, ..)| *strategy)
    }

    fn row(self) -> &'static (Strategy, &'static str, &'static str) {
        &NAMES[self as usize]
    }

    /// The name that commands take.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// What it does, in a line.
    pub fn describe(self) -> &'static str {
        self.row().2
    }

    /// True if it maps the checkpoint's files.
    pub fn maps_files(self) -> bool {
        matches!(self, Strategy::Mmap | Strategy::MmapCopy)
    }

    /// True if the weights are the caller's own in the end: writing to them is cheap and a changed file cannot
    /// change them.
    pub fn is_private(self) -> bool {
        self != Strategy::Mmap
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Strategy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Strategy, Error> {
        NAMES.iter().find(|(_, name, _)| *name == text).map(|(strategy, ..)| *strategy).ok_or_else(|| {
            let known: Vec<_> = NAMES.iter().map(|(_, name, _)| *name).collect();
            crate::error::Fault::new(format!("a strategy ({})", known.join(", ")), format!("`{text}`"))
                .hint("`unladen load --help` lists them")
                .mismatch()
        })
    }
}

/// What the steps of a plan are made from.
pub(super) struct Generator<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) items: &'a [Item],
    pub(super) machine: &'a Machine,
    pub(super) ring: Ring,
    /// Mappings that are handed out are brought in.
    pub(super) populates: bool,
}

/// The steps of one strategy for the whole checkpoint.
pub(super) fn steps(generator: &Generator<'_>, strategy: Strategy) -> Result<Steps> {
    let mut steps = Steps::default();
    match strategy {
        Strategy::Naive => generator.model_beside_state_dict(&mut steps, true)?,
        Strategy::Sequential => generator.sequential(&mut steps)?,
        Strategy::Meta => generator.model_beside_state_dict(&mut steps, false)?,
        Strategy::Mmap => generator.mmap(&mut steps)?,
        Strategy::MmapCopy => generator.mmap_copy(&mut steps)?,
        Strategy::PerTensor => generator.per_tensor(&mut steps)?,
        Strategy::Stream => generator.stream(&mut steps)?,
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
    /// `naive` and `meta`: two of everything on the device.
    fn model_beside_state_dict(&self, steps: &mut Steps, is_random: bool) -> Result<()> {
        let model = self.model(steps, is_random);
        let (state, slots) = self.state_dict(steps, self.items, Space::Device, "state dict")?;
        for index in 0..self.items.len() {
            self.copy(steps, self.span(&state, index), self.span(&model, index));
        }
        slots.into_iter().for_each(|slot| steps.release(slot));
        hand_over(steps, self.items, &model);
        Ok(())
    }

    fn sequential(&self, steps: &mut Steps) -> Result<()> {
        let model = self.model(steps, true);
        let (state, slots) = self.state_dict(steps, self.items, Space::Host, "state dict")?;
        for (index, item) in self.items.iter().enumerate() {
            let (source, target) = (self.span(&state, index), self.span(&model, index));
            // The notebook's `.to(device)` makes a copy on the device before the parameter takes it.
            let slot = steps.reserve(Space::Device, source.len_bytes, "one tensor", Some(item.tensor));
            let on_device = Span { slot, start_byte: 0, ..source };
            self.copy(steps, source, on_device);
            self.copy(steps, on_device, target);
            steps.release(slot);
        }
        slots.into_iter().for_each(|slot| steps.release(slot));
        hand_over(steps, self.items, &model);
        Ok(())
    }

    fn per_tensor(&self, steps: &mut Steps) -> Result<()> {
        let model = self.model(steps, false);
        // The largest last, as in the notebook, whose model ends with its head: what is reserved beside it has all been
        // touched by then, so the prediction is what the system sees too.
        let mut by_size: Vec<usize> = (0..self.items.len()).collect();
        by_size.sort_by_key(|&index| self.items[index].len_bytes());
        for index in by_size {
            let item = &self.items[index];
            let slot = steps.reserve(Space::Host, item.len_bytes(), "one tensor", Some(item.tensor));
            let loaded = Span { slot, start_byte: 0, len_bytes: item.len_bytes() };
            let read = read_of(self.checkpoint, item, &self.machine.io, loaded)?;
            steps.stream(read.into_iter().collect(), self.ring, None);
            self.copy(steps, loaded, self.span(&model, index));
            steps.release(slot);
        }
        hand_over(steps, self.items, &model);
        Ok(())
    }

    fn stream(&self, steps: &mut Steps) -> Result<()> {
        let (places, _) = self.state_dict(steps, self.items, Space::Device, "state dict")?;
        hand_over(steps, self.items, &places);
        Ok(())
    }

    fn mmap_copy(&self, steps: &mut Steps) -> Result<()> {
        let model = self.model(steps, false);
        let maps = self.map_files(steps, self.items);
        let mut reads = Vec::new();
        for (index, item) in self.items.iter().enumerate().filter(|(_, item)| item.len_bytes() > 0) {
            let target = self.span(&model, index);
            // What has to be brought into order, or takes two changes, goes through a staging buffer, in pieces. What is
            // packed cannot be mapped.
            let run = plain_run(self.checkpoint, item).filter(|it| !self.checkpoint.is_packed(it.file));
            let run = run.filter(|it| it.change.from == it.change.to || it.change.resolve.is_nothing());
            let Some(run) = run else {
                reads.extend(read_of(self.checkpoint, item, &self.machine.io, target)?);
                continue;
            };
            let source = Span { slot: maps[&run.file], start_byte: run.start_byte, len_bytes: run.len_bytes };
            let change = Some(run.change).filter(|it| !it.is_nothing());
            steps.push(Step::Copy(Copy { source, target, change }));
        }
        if !reads.is_empty() {
            steps.stream(reads, self.ring, None);
        }
        maps.into_values().for_each(|slot| steps.release(slot));
        hand_over(steps, self.items, &model);
        Ok(())
    }

    fn mmap(&self, steps: &mut Steps) -> Result<()> {
        let is_view: Vec<bool> = self.items.iter().map(|item| can_be_a_view(self.checkpoint, item)).collect();
        let viewed = self.items.iter().zip(&is_view).filter(|(_, is_view)| **is_view).map(|(item, _)| item);
        let copied: Vec<Item> = self
            .items
            .iter()
            .zip(&is_view)
            .filter(|(_, is_view)| !**is_view)
            .map(|(item, _)| item.clone())
            .collect();

        // What a mapping cannot hand out gets memory of its own.
        if !copied.is_empty() {
            let owner = "tensors that a mapping cannot hand out";
            let (places, _) = self.state_dict(steps, &copied, Space::Device, owner)?;
            hand_over(steps, &copied, &places);
        }
        let maps = self.map_files(steps, viewed.clone());
        if self.populates {
            self.populate(steps, viewed.clone(), &maps);
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

    /// The model's own memory, with initial values or without.
    fn model(&self, steps: &mut Steps, is_random: bool) -> Vec<Place> {
        let slot = steps.slot();
        let (places, len_bytes) = packed(self.items, slot);
        steps.reserve_slot(slot, Space::Device, len_bytes, "model", None);
        if is_random {
            let fills = self.items.iter().enumerate();
            let fills =
                fills.map(|(index, item)| Fill { tensor: item.tensor, target: self.span(&places, index) });
            steps.push(Step::Fill(fills.collect()));
        }
        places
    }

    /// Some tensors, read from the files: where they lie, and the slots that hold them.
    fn state_dict(
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

    fn span(&self, places: &[Place], index: usize) -> Span {
        let Place { slot, start_byte } = places[index];
        Span { slot, start_byte, len_bytes: self.items[index].len_bytes() }
    }

    fn copy(&self, steps: &mut Steps, source: Span, target: Span) {
        if target.len_bytes > 0 {
            steps.push(Step::Copy(Copy { source, target, change: None }));
        }
    }
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
