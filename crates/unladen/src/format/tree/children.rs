//! How to go through the values of a container, and what each adds to the path.

use super::module::Module;
use crate::format::{
    pickle::{Arena, Run, Value},
    rebuild::{Named, Parts},
};

/// How to go through a container's values, and what each adds to the path.
pub(super) enum Children<'a> {
    Dict(u32),
    List(u32),
    Tuple(Run),
    /// Values at the path of their owner.
    Parts(Parts),
    /// Values below their owner, by names that are not of the file.
    Named(Named),
    Module(Box<Module<'a>>),
}

/// What a child adds to the path.
#[derive(Clone, Copy)]
pub(super) enum Segment {
    Key(Value),
    Name(&'static str),
    Index(usize),
    Nothing,
}

impl Children<'_> {
    /// A child, what it adds to the path, and whether it is hidden.
    pub(super) fn get(&self, arena: &Arena<'_>, index: usize) -> Option<(Segment, Value, bool)> {
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
            Children::Named(named) => {
                let &(name, value) = named.get(index)?;
                shown(Segment::Name(name), value)
            }
            Children::Module(module) => module.get(arena, index),
        }
    }
}
