//! Walks what a pickle built and names every tensor by its path. Iterative, with cycles found, shared objects named
//! once per path, and the work bounded by the pickle's length.

use super::{
    Limits,
    pickle::{Arena, Run, Value},
    rebuild::{Parts, Rebuild, Rebuilt, Visits, packed_in_byte},
};
use crate::{
    checkpoint::Warning,
    error::{Error, Fault, Result},
    tensor::{Backing, Layout, Tensor},
};
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use std::{collections::HashSet, fmt::Write as _, hash::BuildHasher as _};

/// Tensors that room is made for beforehand: one for each mention of a storage, as state dicts have it.
const MAX_ROOM: usize = 1 << 17;
/// Warnings of one file; what comes after is counted.
pub(super) const MAX_WARNINGS: usize = 100;
/// Bytes of a name that cost as much as a visited value.
const NAME_BYTES_PER_VISIT: usize = 4;

/// The tensors below `root`, in the order of their paths, with names that differ.
pub(super) fn tensors(
    rebuild: &Rebuild<'_>,
    root: Value,
    limits: &Limits,
    warnings: &mut Vec<Warning>,
) -> Result<Vec<Tensor>> {
    let arena = rebuild.arena;
    let n_marks = arena.pool.len() + arena.lists.len() + arena.dicts.len() + arena.calls.len();
    let n_expected = rebuild.refs.len().min(MAX_ROOM);
    let mut walk = Walk {
        rebuild,
        arena,
        limits,
        visits: Visits::new(arena.bytes.len()),
        marks: vec![Mark::New; n_marks],
        frames: Vec::new(),
        path: String::new(),
        names: Names { state: RandomState::default(), positions: HashTable::with_capacity(n_expected) },
        tensors: Vec::with_capacity(n_expected),
        warnings,
        n_silent: 0,
    };
    walk.visit(root, false, false)?;
    while walk.step()? {}
    if walk.n_silent > 0 {
        walk.warnings.push(Warning::LeftOut(format!("{} more warnings", walk.n_silent)));
    }
    Ok(walk.tensors)
}

/// What is known of a container.
#[derive(Clone, Copy, PartialEq)]
enum Mark {
    New,
    /// It is being walked: to meet it again is a cycle.
    Open,
    /// There is no tensor below.
    Barren,
}

/// A container that is being walked.
struct Frame<'a> {
    children: Children<'a>,
    next: usize,
    /// Position in [`Walk::marks`]; `None` for what has no identity.
    mark: Option<usize>,
    /// The part of the path that leads here.
    path_bytes: usize,
    /// The path has at least one part.
    is_named: bool,
    /// PyTorch's `state_dict` would not list what is below.
    is_hidden: bool,
    /// A tensor was found below, or a cycle hides what there is.
    is_fertile: bool,
}

/// How to go through a container's values, and what each adds to the path.
enum Children<'a> {
    Dict(u32),
    List(u32),
    Tuple(Run),
    /// Values at the path of their owner.
    Parts(Parts),
    Module(Box<Module<'a>>),
}

/// The parts of a module of PyTorch. As in its `state_dict`, parameters, buffers and modules stand at its own path;
/// what is not listed there is hidden: transient buffers, other attributes, arguments of the class.
struct Module<'a> {
    /// Parameters, buffers, modules.
    parts: [Option<u32>; 3],
    transient: HashSet<&'a [u8]>,
    attributes: u32,
    others: Parts,
}

/// What a child adds to the path.
#[derive(Clone, Copy)]
enum Segment {
    Key(Value),
    Index(usize),
    Nothing,
}

const BUFFERS: &str = "_buffers";
const MODULE_PARTS: [&str; 3] = ["_parameters", BUFFERS, "_modules"];
const TRANSIENT: &str = "_non_persistent_buffers_set";

struct Walk<'a> {
    rebuild: &'a Rebuild<'a>,
    arena: &'a Arena<'a>,
    limits: &'a Limits,
    visits: Visits,
    marks: Vec<Mark>,
    frames: Vec<Frame<'a>>,
    path: String,
    tensors: Vec<Tensor>,
    names: Names,
    warnings: &'a mut Vec<Warning>,
    n_silent: usize,
}

/// Which tensor has which name: positions alone, the names stand with the tensors.
struct Names {
    state: RandomState,
    positions: HashTable<u32>,
}

impl Names {
    fn contains(&self, tensors: &[Tensor], name: &str) -> bool {
        let is_name = |&it: &u32| tensors[it as usize].name == name;
        self.positions.find(self.state.hash_one(name), is_name).is_some()
    }

    /// Adds the name of the last tensor, which no other has.
    fn insert_last(&mut self, tensors: &[Tensor]) {
        let hash = |it: &u32| self.state.hash_one(tensors[*it as usize].name.as_str());
        if let Some(last) = tensors.len().checked_sub(1).map(|it| it as u32) {
            self.positions.insert_unique(hash(&last), last, hash);
        }
    }
}

impl<'a> Walk<'a> {
    /// Goes to the next child of the innermost container, or out of it. False at the end.
    fn step(&mut self) -> Result<bool> {
        let Some(frame) = self.frames.last_mut() else { return Ok(false) };
        self.visits.spend(1)?;
        let index = frame.next;
        frame.next += 1;
        let Some((segment, child, hides)) = frame.children.get(self.arena, index) else {
            self.leave();
            return Ok(true);
        };
        let (path_bytes, is_hidden, mut is_named) =
            (frame.path_bytes, frame.is_hidden || hides, frame.is_named);
        if !matches!(
            child,
            Value::Tuple(_) | Value::List(_) | Value::Dict(_) | Value::Call(_) | Value::Storage(_)
        ) {
            return Ok(true);
        }
        self.path.truncate(path_bytes);
        if !matches!(segment, Segment::Nothing) {
            if is_named {
                self.path.push('.');
            }
            is_named = true;
            match segment {
                Segment::Key(key) => self.arena.push_key(key, &mut self.path),
                // Writing to a string cannot fail.
                Segment::Index(index) => drop(write!(self.path, "{index}")),
                Segment::Nothing => {}
            }
            self.visits.spend(((self.path.len() - path_bytes) / NAME_BYTES_PER_VISIT) as u64)?;
        }
        self.visit(child, is_named, is_hidden)?;
        Ok(true)
    }

    fn leave(&mut self) {
        let Some(frame) = self.frames.pop() else { return };
        if let Some(mark) = frame.mark {
            self.marks[mark] = if frame.is_fertile { Mark::New } else { Mark::Barren };
        }
        if let Some(parent) = self.frames.last_mut() {
            parent.is_fertile |= frame.is_fertile;
        }
    }

    /// Deals with the value at the path.
    fn visit(&mut self, value: Value, is_named: bool, is_hidden: bool) -> Result<()> {
        let Some(mark) = self.mark_of(value) else {
            if let Value::Storage(id) = value {
                let rebuilt = self.rebuild.persistent(id)?;
                self.tensor_or_storage(rebuilt, is_hidden)?;
            }
            return Ok(());
        };
        match self.marks[mark] {
            Mark::Barren => return Ok(()),
            Mark::Open => {
                self.warn(Warning::LeftOut(format!("`{}`, which leads back to what holds it", self.path)));
                self.fertilise();
                return Ok(());
            }
            Mark::New => {}
        }
        // A tensor that stands in two places is found in both, whatever its attributes hold.
        let mut is_fertile = false;
        let children = match value {
            Value::Dict(dict) => Children::Dict(dict),
            Value::List(list) => Children::List(list),
            Value::Tuple(run) => Children::Tuple(run),
            Value::Call(call) => {
                let mut parts = Parts::new();
                let rebuilt = self.rebuild.call(call, &mut self.visits, &mut parts);
                let named = |error: Error| if is_named { error.in_tensor(&self.path) } else { error };
                match rebuilt.map_err(named)? {
                    rebuilt @ (Rebuilt::Tensor { .. } | Rebuilt::Storage) => {
                        self.tensor_or_storage(rebuilt, is_hidden)?;
                        is_fertile = true;
                        if parts.iter().all(|&it| it == Value::None) {
                            return Ok(());
                        }
                        Children::Parts(parts)
                    }
                    Rebuilt::Other => {
                        if let Some(reason) = self.rebuild.given.left_out(call) {
                            self.warn(Warning::LeftOut(format!("array `{}`: {reason}", self.path)));
                        }
                        match self.module(call, &parts)? {
                            Some(module) => Children::Module(Box::new(module)),
                            None => Children::Parts(parts),
                        }
                    }
                }
            }
            _ => return Ok(()),
        };
        if self.frames.len() >= self.limits.depth {
            let found = format!("more of them at `{}`", shortened(&self.path));
            return Err(Fault::new(
                format!("at most {} containers inside each other", self.limits.depth),
                found,
            )
            .unsupported());
        }
        self.marks[mark] = Mark::Open;
        let path_bytes = self.path.len();
        self.frames.push(Frame {
            children,
            next: 0,
            mark: Some(mark),
            path_bytes,
            is_named,
            is_hidden,
            is_fertile,
        });
        Ok(())
    }

    /// Lists a tensor, tells of a storage.
    fn tensor_or_storage(&mut self, rebuilt: Rebuilt, is_hidden: bool) -> Result<()> {
        match rebuilt {
            Rebuilt::Tensor { layout, storage, is_quantised } => {
                let backing = storage.map_or(Backing::Meta, Backing::Storage);
                self.found(layout, backing, is_quantised, is_hidden)
            }
            Rebuilt::Storage => {
                self.warn(Warning::LeftOut(format!("storage `{}`, which no tensor views", self.path)));
                Ok(())
            }
            Rebuilt::Other => Ok(()),
        }
    }

    /// A container's identity; `None` for what holds nothing.
    fn mark_of(&self, value: Value) -> Option<usize> {
        let (n_pool, n_lists, n_dicts) =
            (self.arena.pool.len(), self.arena.lists.len(), self.arena.dicts.len());
        match value {
            Value::Tuple(run) if run.len > 0 => Some(run.start as usize),
            Value::List(list) => Some(n_pool + list as usize),
            Value::Dict(dict) => Some(n_pool + n_lists + dict as usize),
            Value::Call(call) => Some(n_pool + n_lists + n_dicts + call as usize),
            _ => None,
        }
    }

    /// A module of PyTorch, told by its attributes: the class itself is never known.
    fn module(&mut self, call: u32, parts: &Parts) -> Result<Option<Module<'a>>> {
        let arena = self.arena;
        let state = arena.calls[call as usize].state;
        let Value::Dict(attributes) = state else { return Ok(None) };
        let parts_of_module = MODULE_PARTS.map(|key| match arena.get(attributes, key) {
            Some(Value::Dict(dict)) => Some(dict),
            _ => None,
        });
        let [Some(_), _, Some(_)] = parts_of_module else { return Ok(None) };
        let transient =
            arena.get(attributes, TRANSIENT).and_then(|it| arena.sequence(it)).unwrap_or_default();
        // Modules may share one long list.
        self.visits.spend(transient.len() as u64)?;
        let transient = transient.iter().filter_map(|&it| match it {
            Value::Str(text) | Value::Bytes(text) => Some(arena.bytes(text)),
            _ => None,
        });
        let others = parts.iter().copied().filter(|&it| it != state).collect();
        Ok(Some(Module { parts: parts_of_module, transient: transient.collect(), attributes, others }))
    }

    /// Lists the tensor at the path.
    fn found(&mut self, layout: Layout, backing: Backing, is_quantised: bool, is_hidden: bool) -> Result<()> {
        self.fertilise();
        if is_hidden {
            self.warn(Warning::LeftOut(format!(
                "tensor `{}`, which is not in the module's state",
                self.path
            )));
            return Ok(());
        }
        if self.tensors.len() >= self.limits.n_tensors {
            let expected = format!("at most {} tensors", self.limits.n_tensors);
            return Err(Fault::new(expected, "more of them").unsupported());
        }
        self.visits.spend((self.path.len() / NAME_BYTES_PER_VISIT) as u64)?;
        let mut name = self.path.clone();
        if self.names.contains(&self.tensors, &name) {
            let (listed_as, place) = (self.other_name()?, self.place());
            self.warn(Warning::SameName { name, listed_as: listed_as.clone(), place });
            name = listed_as;
        }
        if is_quantised {
            let what = match packed_in_byte(layout.dtype()) {
                Some(_) => "scales, zero points and shape (its packed bytes are listed)",
                None => "scales and zero points",
            };
            self.warn(Warning::LeftOut(format!("{what} of `{name}`")));
        }
        if backing == Backing::Meta {
            self.warn(Warning::MetaTensor(name.clone()));
        }
        self.tensors.push(Tensor { name, layout, backing });
        self.names.insert_last(&self.tensors);
        Ok(())
    }

    /// A name for a tensor whose own is taken.
    fn other_name(&mut self) -> Result<String> {
        let mut number = 2u64;
        loop {
            self.visits.spend(1)?;
            let name = format!("{}~{number}", self.path);
            if !self.names.contains(&self.tensors, &name) {
                return Ok(name);
            }
            number += 1;
        }
    }

    /// The path as Python writes it: `['a'][0]`, where a key's type can be seen.
    fn place(&self) -> String {
        let mut place = String::new();
        for frame in &self.frames {
            let segment = frame.children.get(self.arena, frame.next - 1).map(|(segment, ..)| segment);
            match segment {
                Some(Segment::Key(key @ (Value::Str(_) | Value::Bytes(_)))) => {
                    place.push_str("['");
                    self.arena.push_key(key, &mut place);
                    place.push_str("']");
                }
                Some(Segment::Key(key)) => {
                    place.push('[');
                    self.arena.push_key(key, &mut place);
                    place.push(']');
                }
                // Writing to a string cannot fail.
                Some(Segment::Index(index)) => drop(write!(place, "[{index}]")),
                Some(Segment::Nothing) | None => {}
            }
        }
        place
    }

    /// Notes that the innermost container must be walked again wherever it is met.
    fn fertilise(&mut self) {
        if let Some(frame) = self.frames.last_mut() {
            frame.is_fertile = true;
        }
    }

    fn warn(&mut self, warning: Warning) {
        if self.warnings.len() < MAX_WARNINGS {
            self.warnings.push(warning);
        } else {
            self.n_silent += 1;
        }
    }
}

impl Children<'_> {
    /// A child, what it adds to the path, and whether it is hidden.
    fn get(&self, arena: &Arena<'_>, index: usize) -> Option<(Segment, Value, bool)> {
        let shown = |segment, value| Some((segment, value, false));
        match self {
            Children::Dict(dict) => {
                let dict = &arena.dicts[*dict as usize];
                match dict.items.get(index) {
                    Some(&(key, value)) => shown(Segment::Key(key), value),
                    // Behind the items come the attributes of a dictionary that has some.
                    None if index == dict.items.len() => shown(Segment::Nothing, dict.state),
                    None => None,
                }
            }
            Children::List(list) => shown(Segment::Index(index), *arena.lists[*list as usize].get(index)?),
            Children::Tuple(run) => shown(Segment::Index(index), *arena.run(*run).get(index)?),
            Children::Parts(parts) => shown(Segment::Nothing, *parts.get(index)?),
            Children::Module(module) => module.get(arena, index),
        }
    }
}

impl Module<'_> {
    fn get(&self, arena: &Arena<'_>, mut index: usize) -> Option<(Segment, Value, bool)> {
        for (part, dict) in self.parts.iter().enumerate() {
            let items = dict.map_or(&[][..], |it| &arena.dicts[it as usize].items);
            if let Some(&(key, value)) = items.get(index) {
                let is_transient = MODULE_PARTS[part] == BUFFERS
                    && matches!(key, Value::Str(text) | Value::Bytes(text) if self.transient.contains(arena.bytes(text)));
                return Some((Segment::Key(key), value, is_transient));
            }
            index -= items.len();
        }
        let attributes = &arena.dicts[self.attributes as usize].items;
        if let Some(&(key, value)) = attributes.get(index) {
            let is_listed = matches!(value, Value::Dict(dict) if self.parts.contains(&Some(dict)));
            return Some((Segment::Key(key), if is_listed { Value::None } else { value }, true));
        }
        Some((Segment::Nothing, *self.others.get(index - attributes.len())?, true))
    }
}

/// The start of a path, for a message.
fn shortened(path: &str) -> String {
    path.chars().take(80).collect()
}
