//! Walks what a pickle built and names every tensor by its path. Iterative, with cycles found, shared objects named
//! once per path, and the work bounded by the pickle's length.

mod children;
mod keys;
mod module;
mod names;
mod objects;
mod place;

pub(super) use module::{MODULE_PARTS, is_module};

use super::{
    Limits,
    pickle::{Arena, Value, shortened},
    rebuild::{Parts, Rebuild, Rebuilt, View, Visits, Whole},
};
use crate::{
    checkpoint::{Composite, CompositeKind, Warning},
    error::{Error, Fault, Result},
    tensor::{Backing, Dims, Tensor},
};
use children::{Children, Segment};
use keys::Keys;
use module::Module;
use names::Names;
use std::{collections::HashMap, fmt::Write as _};

/// Tensors that room is made for beforehand: one for each mention of a storage, as state dicts have it.
const MAX_ROOM: usize = 1 << 17;
/// Warnings of one file; what comes after is counted.
pub(super) const MAX_WARNINGS: usize = 100;
/// Visited values that a byte of a name costs as much as: all names take no more than a few times the pickle.
const VISITS_PER_NAME_BYTE: u64 = 4;

/// No call's position: of a tensor that no object of the pickle owns.
pub(super) const NO_CALL: u32 = u32::MAX;

/// What a pickle holds, by name.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// In the order of their paths, with names that differ.
    pub(super) tensors: Vec<Tensor>,
    pub(super) composites: Vec<Composite>,
    /// By tensor, the call that stands for it: its position in [`Arena::calls`], or what
    /// [`Rebuild::call_of_persistent`] makes of a persistent id.
    pub(super) calls: Vec<u32>,
}

/// Lists the tensors below `root`.
pub(super) fn list(
    rebuild: &Rebuild<'_>,
    root: Value,
    limits: &Limits,
    warnings: &mut Vec<Warning>,
) -> Result<Listing> {
    let arena = rebuild.arena;
    let n_expected = rebuild.refs.len().min(MAX_ROOM);
    let mut walk = Walk {
        rebuild,
        arena,
        limits,
        visits: Visits::new(arena.bytes.len()),
        marks: vec![Mark::New; arena.n_identities()],
        frames: Vec::new(),
        path: String::new(),
        names: Names::with_room(n_expected),
        found: Listing {
            tensors: Vec::with_capacity(n_expected),
            composites: Vec::new(),
            calls: Vec::with_capacity(n_expected),
        },
        last_numbers: HashMap::new(),
        keys: Keys::default(),
        warnings,
        n_silent: 0,
    };
    walk.visit(root, Place { is_named: false, is_hidden: false })?;
    while walk.step()? {}
    let (of_keys, n_silent) = std::mem::take(&mut walk.keys).warnings(&walk.found.calls);
    of_keys.into_iter().for_each(|it| walk.warn(it));
    walk.n_silent += n_silent;
    if walk.n_silent > 0 {
        walk.warnings.push(Warning::LeftOut(format!("{} more warnings", walk.n_silent)));
    }
    Ok(walk.found)
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
    place: Place,
    /// A tensor was found below, or a cycle hides what there is.
    is_fertile: bool,
    /// What the tensors that are found meanwhile make together.
    whole: Option<Box<Begun>>,
}

/// What is known of a place of the tree besides its path.
#[derive(Clone, Copy)]
struct Place {
    /// The path has at least one part.
    is_named: bool,
    /// PyTorch's `state_dict` would not list what is here.
    is_hidden: bool,
}

/// A composite whose parts are being listed.
struct Begun {
    kind: CompositeKind,
    shape: Dims,
    /// Tensors that were listed before its first part.
    n_before: u32,
}

struct Walk<'a> {
    rebuild: &'a Rebuild<'a>,
    arena: &'a Arena<'a>,
    limits: &'a Limits,
    visits: Visits,
    marks: Vec<Mark>,
    frames: Vec<Frame<'a>>,
    path: String,
    found: Listing,
    names: Names,
    /// The last number that was given to a name that is taken.
    last_numbers: HashMap<String, u64>,
    keys: Keys,
    warnings: &'a mut Vec<Warning>,
    n_silent: usize,
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
        let (path_bytes, mut place) = (frame.path_bytes, frame.place);
        if let Segment::Key(key @ (Value::Tuple(_) | Value::List(_) | Value::Call(_) | Value::Storage(_))) =
            segment
        {
            let path = self.path.get(..path_bytes).unwrap_or_default();
            self.keys.look(key, (frame.mark, path), self.rebuild, &mut self.visits)?;
        }
        place.is_hidden |= hides;
        if !matches!(
            child,
            Value::Tuple(_) | Value::List(_) | Value::Dict(_) | Value::Call(_) | Value::Storage(_)
        ) {
            return Ok(true);
        }
        self.path.truncate(path_bytes);
        if !matches!(segment, Segment::Nothing) {
            if place.is_named {
                self.path.push('.');
            }
            place.is_named = true;
            match segment {
                Segment::Key(key) => self.arena.push_key(key, &mut self.path),
                Segment::Name(name) => self.path.push_str(name),
                // Writing to a string cannot fail.
                Segment::Index(index) => drop(write!(self.path, "{index}")),
                Segment::Nothing => {}
            }
            self.visits.spend((self.path.len() - path_bytes) as u64)?;
        }
        self.visit(child, place)?;
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
        let Some(whole) = frame.whole else { return };
        let parts = whole.n_before..self.found.tensors.len() as u32;
        if !parts.is_empty() {
            let Begun { kind, shape, .. } = *whole;
            let name = match kind {
                // Its integers have its name, whichever it became.
                CompositeKind::Quantised { .. } => &self.found.tensors[parts.start as usize].name,
                _ => self.path.get(..frame.path_bytes).unwrap_or_default(),
            };
            let name = name.to_owned();
            self.found.composites.push(Composite { name, kind, shape, parts });
        } else if let (CompositeKind::Subclass { class }, false) = (whole.kind, frame.place.is_hidden) {
            let name = shortened(self.path.get(..frame.path_bytes).unwrap_or_default());
            self.warn(Warning::LeftOut(format!("tensor `{name}` of class {class}, without data")));
        }
    }

    /// Deals with the value at the path.
    fn visit(&mut self, value: Value, place: Place) -> Result<()> {
        let Some(mark) = self.arena.identity(value) else {
            if let Value::Storage(id) = value {
                match self.rebuild.persistent(id) {
                    Rebuilt::Tensor(view) => {
                        self.found(view, self.rebuild.call_of_persistent(id), place)?;
                    }
                    _ => self.warn_of_storage(),
                }
            }
            return Ok(());
        };
        match self.marks[mark] {
            Mark::Barren => return Ok(()),
            Mark::Open => {
                // What is hidden leads back all the time: a module's hooks know their module.
                if !place.is_hidden {
                    let what = format!("`{}`, which leads back to what holds it", shortened(&self.path));
                    self.warn(Warning::LeftOut(what));
                }
                self.fertilise();
                return Ok(());
            }
            Mark::New => {}
        }
        let (children, is_fertile) = match value {
            Value::Dict(dict) => (Children::Dict(dict), false),
            Value::List(list) => (Children::List(list), false),
            Value::Tuple(run) => (Children::Tuple(run), false),
            Value::Call(call) => {
                let mut parts = Parts::new();
                let rebuilt = self.rebuild.call(call, &mut self.visits, &mut parts);
                let named = |error: Error| if place.is_named { error.in_tensor(&self.path) } else { error };
                match rebuilt.map_err(named)? {
                    Rebuilt::Storage => {
                        self.warn_of_storage();
                        return Ok(());
                    }
                    Rebuilt::Tensor(view) => {
                        self.found(view, call, place)?;
                        if parts.iter().all(|&it| it == Value::None) {
                            return Ok(());
                        }
                        // Whatever its attributes are, it is a tensor wherever it is met.
                        (Children::Parts(parts), true)
                    }
                    Rebuilt::Composite(whole) => return self.composite(*whole, call, parts, mark, place),
                    Rebuilt::LeftOut(reason) => {
                        let tensor = shortened(&self.path);
                        self.warn(Warning::LeftOut(format!("tensor `{tensor}`: {reason}")));
                        (Children::Parts(parts), true)
                    }
                    Rebuilt::Other => (self.object(call, parts)?, false),
                }
            }
            _ => return Ok(()),
        };
        self.enter(children, Some(mark), place, is_fertile, None)
    }

    /// What is in an object that is no tensor.
    fn object(&mut self, call: u32, parts: Parts) -> Result<Children<'a>> {
        let name = || shortened(&self.path);
        if let Some(reason) = self.rebuild.given.left_out(call) {
            let what = format!("array `{}`: {reason}", name());
            self.warn(Warning::LeftOut(what));
        } else if let Some(reason) = objects::uninitialised(self.arena, call) {
            let what = format!("parameter `{}`: {reason}", name());
            self.warn(Warning::LeftOut(what));
        }
        let state = self.arena.calls[call as usize].state;
        // Objects may share one long dictionary, and modules one long list.
        self.visits.spend(self.arena.n_items(state))?;
        self.visits.spend(Module::n_names(self.arena, state) as u64)?;
        if let Some(module) = Module::new(self.arena, state, &parts) {
            return Ok(Children::Module(Box::new(module)));
        }
        let Some(quantised) = objects::quantised(self.rebuild, call, &self.path, &parts) else {
            return Ok(Children::Parts(parts));
        };
        let numbers = Warning::LeftOut(objects::NUMBERS.to_owned());
        if quantised.has_numbers && !self.warnings.contains(&numbers) {
            self.warn(numbers);
        }
        Ok(quantised.children)
    }

    /// Lists what a composite has under its own name, then its parts, then its attributes.
    fn composite(
        &mut self,
        whole: Whole,
        call: u32,
        attributes: Parts,
        mark: usize,
        place: Place,
    ) -> Result<()> {
        let Whole { kind, shape, own, named, free, left_out } = whole;
        let begun = Box::new(Begun { kind, shape, n_before: self.found.tensors.len() as u32 });
        if let Some(own) = own {
            self.found(own, call, place)?;
        }
        if let (Some(what), false) = (left_out, place.is_hidden) {
            self.warn(Warning::LeftOut(format!("{what} of `{}`", shortened(&self.path))));
        }
        let is_fertile = !matches!(begun.kind, CompositeKind::Subclass { .. });
        // The last that is entered is the first to be walked.
        self.enter(Children::Parts(attributes), Some(mark), place, is_fertile, None)?;
        let parts = if named.is_empty() { Children::Parts(free) } else { Children::Named(named) };
        self.enter(parts, None, place, is_fertile, Some(begun))
    }

    fn enter(
        &mut self,
        children: Children<'a>,
        mark: Option<usize>,
        place: Place,
        is_fertile: bool,
        whole: Option<Box<Begun>>,
    ) -> Result<()> {
        if self.frames.len() >= self.limits.depth {
            let found = format!("more of them at `{}`", shortened(&self.path));
            let expected = format!("at most {} containers inside each other", self.limits.depth);
            return Err(Fault::new(expected, found).over_limit("depth"));
        }
        if let Some(mark) = mark {
            self.marks[mark] = Mark::Open;
        }
        let path_bytes = self.path.len();
        self.frames.push(Frame { children, next: 0, mark, path_bytes, place, is_fertile, whole });
        Ok(())
    }

    fn warn_of_storage(&mut self) {
        let storage = shortened(&self.path);
        self.warn(Warning::LeftOut(format!("storage `{storage}`, which no tensor views")));
    }

    /// Lists the tensor at the path.
    fn found(&mut self, view: View, call: u32, place: Place) -> Result<()> {
        self.fertilise();
        if place.is_hidden {
            self.warn(Warning::LeftOut(format!(
                "tensor `{}`, which is not in the module's state",
                shortened(&self.path)
            )));
            return Ok(());
        }
        if self.found.tensors.len() >= self.limits.n_tensors {
            let expected = format!("at most {} tensors", self.limits.n_tensors);
            return Err(Fault::new(expected, "more of them").over_limit("n_tensors"));
        }
        self.visits.spend(VISITS_PER_NAME_BYTE * self.path.len() as u64)?;
        let mut name = self.path.clone();
        if self.names.contains(&self.found.tensors, &name) {
            let (listed_as, place) = (self.other_name()?, self.place());
            self.warn(Warning::SameName { name, listed_as: listed_as.clone(), place });
            name = listed_as;
        }
        if let Some(dtype) = view.cast {
            self.warn(Warning::LeftOut(format!(
                "the cast of `{name}` to {dtype}, its type when it was saved"
            )));
        }
        let backing = view.storage.map_or(Backing::Meta, Backing::Storage);
        if backing == Backing::Meta {
            self.warn(Warning::MetaTensor(name.clone()));
        }
        self.found.tensors.push(Tensor { name, layout: view.layout, backing });
        self.found.calls.push(call);
        self.names.insert_last(&self.found.tensors);
        Ok(())
    }

    /// A name for a tensor whose own is taken.
    fn other_name(&mut self) -> Result<String> {
        let mut number = self.last_numbers.get(&self.path).copied().unwrap_or(1);
        loop {
            self.visits.spend(VISITS_PER_NAME_BYTE * self.path.len() as u64)?;
            number += 1;
            let name = format!("{}~{number}", self.path);
            if !self.names.contains(&self.found.tensors, &name) {
                self.last_numbers.insert(self.path.clone(), number);
                return Ok(name);
            }
        }
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
