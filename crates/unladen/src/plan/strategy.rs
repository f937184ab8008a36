//! The ways of loading, each a generator of steps. The first six are the cells of Sebastian Raschka's notebook
//! "Memory-efficient Model Weight Loading"; the last is ours.

use super::{
    PlanOptions,
    items::{Item, items, place_of},
    place::{Arena, chunks_of, like_files, packed},
    steps::{Copy, Fill, SlotId, Span, Step, Steps},
};
use crate::{
    checkpoint::Checkpoint,
    error::Error,
    memory::Space,
    tensor::{Backing, Block, FileId, Window},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

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

/// The steps of one strategy for the whole checkpoint.
pub(super) fn steps(checkpoint: &Checkpoint, options: &PlanOptions) -> Steps {
    let generator = Generator {
        checkpoint,
        items: items(checkpoint),
        n_threads: options.n_threads.max(1),
        steps: Steps::default(),
    };
    match options.strategy {
        Strategy::Naive => generator.model_beside_state_dict(Space::Device, true),
        Strategy::Sequential => generator.sequential(),
        Strategy::Meta => generator.model_beside_state_dict(Space::Device, false),
        Strategy::Mmap => generator.mmap(),
        Strategy::MmapCopy => generator.mmap_copy(),
        Strategy::PerTensor => generator.per_tensor(),
        Strategy::Stream => generator.stream(),
    }
}

/// One slot per tensor with data, each the caller's.
pub(super) fn steps_into_caller_memory(checkpoint: &Checkpoint, options: &PlanOptions) -> Steps {
    let mut steps = Steps::default();
    let mut chunks = Vec::new();
    let mut handed_over = Vec::new();
    for item in items(checkpoint) {
        for tensor in item.tensors() {
            let slot = steps.slot();
            steps.push(Step::Adopt { slot, tensor });
            let target = Span { slot, start_byte: 0, len_bytes: item.len_bytes() };
            chunks.extend(chunks_of(checkpoint, &item, target));
            handed_over.push(Step::HandOver { tensor, slot, start_byte: 0, layout: item.layout.clone() });
        }
    }
    steps.stream(chunks, options.n_threads.max(1));
    handed_over.into_iter().for_each(|it| steps.push(it));
    steps
}

struct Generator<'a> {
    checkpoint: &'a Checkpoint,
    items: Vec<Item>,
    n_threads: usize,
    steps: Steps,
}

impl Generator<'_> {
    /// `naive` and `meta`: two of everything on the device.
    fn model_beside_state_dict(mut self, state_space: Space, is_random: bool) -> Steps {
        let (model, model_slot) = self.model(is_random);
        let (state, state_slot) = self.state_dict(state_space);
        for index in 0..self.items.len() {
            let source = self.span(&state, state_slot, index);
            let target = self.span(&model, model_slot, index);
            self.copy(source, target);
        }
        self.steps.release(state_slot);
        self.hand_over(&model, model_slot)
    }

    fn sequential(mut self) -> Steps {
        let (model, model_slot) = self.model(true);
        let (state, state_slot) = self.state_dict(Space::Host);
        for index in 0..self.items.len() {
            let source = self.span(&state, state_slot, index);
            let target = self.span(&model, model_slot, index);
            // The notebook's `.to(device)` makes a copy on the device before the parameter takes it.
            let slot = self.steps.reserve(Space::Device, source.len_bytes, "one tensor");
            let on_device = Span { slot, start_byte: 0, ..source };
            self.copy(source, on_device);
            self.copy(on_device, target);
            self.steps.release(slot);
        }
        self.steps.release(state_slot);
        self.hand_over(&model, model_slot)
    }

    fn per_tensor(mut self) -> Steps {
        let (model, model_slot) = self.model(false);
        // The largest last, as in the notebook, whose model ends with its head: what is reserved beside it has all been
        // touched by then, so the prediction is what the system sees too.
        let mut by_size: Vec<usize> = (0..self.items.len()).collect();
        by_size.sort_by_key(|&index| self.items[index].len_bytes());
        for index in by_size {
            let item = &self.items[index];
            let slot = self.steps.reserve(Space::Host, item.len_bytes(), "one tensor");
            let loaded = Span { slot, start_byte: 0, len_bytes: item.len_bytes() };
            self.steps.stream(chunks_of(self.checkpoint, item, loaded), self.n_threads);
            let target = self.span(&model, model_slot, index);
            self.copy(loaded, target);
            self.steps.release(slot);
        }
        self.hand_over(&model, model_slot)
    }

    fn stream(mut self) -> Steps {
        let (state, slot) = self.state_dict(Space::Device);
        self.hand_over(&state, slot)
    }

    fn mmap_copy(mut self) -> Steps {
        let (model, model_slot) = self.model(false);
        let maps = self.map_files();
        for index in 0..self.items.len() {
            let target = self.span(&model, model_slot, index);
            self.copy_from_maps(index, &maps, target);
        }
        maps.into_values().for_each(|slot| self.steps.release(slot));
        self.hand_over(&model, model_slot)
    }

    fn mmap(mut self) -> Steps {
        let maps = self.map_files();
        let (viewed, copied): (Vec<_>, Vec<_>) = std::mem::take(&mut self.items)
            .into_iter()
            .partition(|item| can_be_a_view(self.checkpoint, item));

        // What a mapping cannot hand out gets memory of its own.
        self.items = copied;
        let arena = packed(&self.items);
        let slot = (!self.items.is_empty()).then(|| {
            self.steps.reserve(Space::Device, arena.len_bytes, "tensors that a mapping cannot hand out")
        });
        if let Some(slot) = slot {
            for index in 0..self.items.len() {
                let target = self.span(&arena, slot, index);
                self.copy_from_maps(index, &maps, target);
            }
        }

        let mut viewed_files = BTreeSet::new();
        for item in &viewed {
            let Some(piece) = self.checkpoint.pieces(item.tensor).next() else { continue };
            let (file, _) = place_of(self.checkpoint, &piece);
            viewed_files.insert(file);
            for tensor in item.tensors() {
                self.steps.push(Step::HandOver {
                    tensor,
                    slot: maps[&file],
                    start_byte: self.checkpoint.storage_of(&piece).start_byte,
                    layout: piece.layout.clone(),
                });
            }
        }
        for (_, slot) in maps.into_iter().filter(|(file, _)| !viewed_files.contains(file)) {
            self.steps.release(slot);
        }
        match slot {
            Some(slot) => self.hand_over(&arena, slot),
            None => self.steps,
        }
    }

    /// The model's own memory, with initial values or without.
    fn model(&mut self, is_random: bool) -> (Arena, SlotId) {
        let arena = packed(&self.items);
        let slot = self.steps.reserve(Space::Device, arena.len_bytes, "model");
        if is_random {
            let fills = self.items.iter().enumerate();
            let fills = fills
                .map(|(index, item)| Fill { tensor: item.tensor, target: self.span(&arena, slot, index) });
            let fills = fills.collect();
            self.steps.push(Step::Fill(fills));
        }
        (arena, slot)
    }

    /// The whole state dict, read from the files.
    fn state_dict(&mut self, space: Space) -> (Arena, SlotId) {
        let slot = self.steps.slot();
        let (arena, chunks) = like_files(self.checkpoint, &self.items, slot);
        self.steps.reserve_slot(slot, space, arena.len_bytes, "state dict");
        self.steps.stream(chunks, self.n_threads);
        (arena, slot)
    }

    /// Maps every file that holds bytes of a tensor.
    fn map_files(&mut self) -> BTreeMap<FileId, SlotId> {
        let mut maps = BTreeMap::new();
        for item in self.items.iter().filter(|item| item.len_bytes() > 0) {
            for piece in self.checkpoint.pieces(item.tensor) {
                let (file, _) = place_of(self.checkpoint, &piece);
                maps.entry(file).or_insert_with(|| {
                    let slot = self.steps.slot();
                    self.steps.push(Step::Map {
                        slot,
                        file,
                        len_bytes: self.checkpoint.file(file).len_bytes,
                    });
                    slot
                });
            }
        }
        maps
    }

    fn span(&self, arena: &Arena, slot: SlotId, index: usize) -> Span {
        Span { slot, start_byte: arena.start_bytes[index], len_bytes: self.items[index].len_bytes() }
    }

    fn copy(&mut self, source: Span, target: Span) {
        if target.len_bytes > 0 {
            self.steps.push(Step::Copy(Copy { source, target, block: None, resolve: None }));
        }
    }

    fn copy_from_maps(&mut self, index: usize, maps: &BTreeMap<FileId, SlotId>, target: Span) {
        let item = &self.items[index];
        let window = Window::whole(item.layout.shape());
        for piece in self.checkpoint.pieces(item.tensor) {
            let Some(mut block) = Block::within(piece.layout, piece.at, &window) else { continue };
            let (file, _) = place_of(self.checkpoint, &piece);
            let start_byte = self.checkpoint.storage_of(&piece).start_byte + block.source_byte;
            block.source_byte = 0;
            let source = Span {
                slot: maps[&file],
                start_byte,
                len_bytes: block.span_bytes(crate::tensor::Side::Source),
            };
            let is_run = block.axes.is_empty() && block.run_bytes == target.len_bytes;
            let resolve = Some((item.layout.dtype(), piece.resolve)).filter(|(_, it)| !it.is_nothing());
            let block = (!is_run).then(|| Box::new(block));
            self.steps.push(Step::Copy(Copy { source, target, block, resolve }));
        }
    }

    fn hand_over(mut self, arena: &Arena, slot: SlotId) -> Steps {
        for (index, item) in self.items.iter().enumerate() {
            for tensor in item.tensors() {
                let (start_byte, layout) = (arena.start_bytes[index], item.layout.clone());
                self.steps.push(Step::HandOver { tensor, slot, start_byte, layout });
            }
        }
        self.steps
    }
}

/// A mapping hands out bytes as they are, where they are: nothing to resolve, in one piece, aligned for the type.
fn can_be_a_view(checkpoint: &Checkpoint, item: &Item) -> bool {
    let tensor = checkpoint.tensor(item.tensor);
    let Backing::Storage(storage) = tensor.backing else { return false };
    let storage = &checkpoint.storages[storage.0 as usize];
    tensor.layout.n_elems() > 0
        && tensor.layout.resolve(storage.swapped).is_nothing()
        && storage.start_byte.is_multiple_of(tensor.layout.dtype().size_bytes())
}
