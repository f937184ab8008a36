//! Modules of PyTorch that were pickled whole: what their `state_dict` would list, and what it would not.

use super::{children::Segment, objects};
use crate::format::{
    pickle::{Arena, Value},
    rebuild::Parts,
};
use std::collections::HashSet;

const BUFFERS: &str = "_buffers";
/// Where a module keeps what its state dict lists.
pub(in crate::format) const MODULE_PARTS: [&str; 3] = ["_parameters", BUFFERS, "_modules"];
const TRANSIENT: &str = "_non_persistent_buffers_set";

/// The parts of a module of PyTorch. As in its `state_dict`, parameters, buffers and modules stand at its own path;
/// what is not listed there is hidden: transient buffers, other attributes but for packed weights, arguments of the class.
pub(super) struct Module<'a> {
    /// Parameters, buffers, modules.
    parts: [Option<u32>; 3],
    transient: HashSet<&'a [u8]>,
    attributes: u32,
    others: Parts,
}

/// True for a dictionary of attributes that only modules have: the class itself is never known.
pub(in crate::format) fn is_module(arena: &Arena<'_>, attributes: u32) -> bool {
    matches!(parts_of(arena, attributes), [Some(_), _, Some(_)])
}

fn parts_of(arena: &Arena<'_>, attributes: u32) -> [Option<u32>; 3] {
    MODULE_PARTS.map(|key| match arena.get(attributes, key) {
        Some(Value::Dict(dict)) => Some(dict),
        _ => None,
    })
}

impl<'a> Module<'a> {
    /// The module that an object with this state is; `None`: it is something else. `parts` are all values of the object.
    pub(super) fn new(arena: &'a Arena<'a>, state: Value, parts: &Parts) -> Option<Module<'a>> {
        let Value::Dict(attributes) = state else { return None };
        if !is_module(arena, attributes) {
            return None;
        }
        let transient = arena.get(attributes, TRANSIENT).and_then(|it| arena.sequence(it));
        let transient = transient.unwrap_or_default().iter().filter_map(|&it| match it {
            Value::Str(text) | Value::Bytes(text) => Some(arena.bytes(text)),
            _ => None,
        });
        let others = parts.iter().copied().filter(|&it| it != state).collect();
        Some(Module {
            parts: parts_of(arena, attributes),
            transient: transient.collect(),
            attributes,
            others,
        })
    }

    /// How many names must be looked at to make one.
    pub(super) fn n_names(arena: &Arena<'_>, state: Value) -> usize {
        let Value::Dict(attributes) = state else { return 0 };
        arena.get(attributes, TRANSIENT).and_then(|it| arena.sequence(it)).map_or(0, <[Value]>::len)
    }

    pub(super) fn get(&self, arena: &Arena<'_>, mut index: usize) -> Option<(Segment, Value, bool)> {
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
            let is_hidden = !objects::is_packed(arena, value);
            return Some((Segment::Key(key), if is_listed { Value::None } else { value }, is_hidden));
        }
        Some((Segment::Nothing, *self.others.get(index - attributes.len())?, true))
    }
}
