//! Finds the place of a tree that a path leads to, by the names that tensors have: keys and indices, joined by dots. Keys
//! may have dots of their own.

use super::node::{Child, Head, Label, Node, Reader};
use crate::{
    checkpoint::Root,
    error::{Error, Fault, Result},
    format::{
        OpenOptions,
        pickle::{Value, shortened},
        tree::MODULE_PARTS,
    },
};
use foldhash::{HashSet, HashSetExt as _};

/// Keys that a message lists.
const MAX_KEYS: usize = 20;
/// Bytes of names that cost as much as a visited value.
const NAME_BYTES_PER_VISIT: usize = 8;

/// What a path leads to.
pub(super) enum Place {
    At(Child),
    /// Some items of a dictionary: the path is the start of their keys, up to a dot.
    Among(Vec<(Value, Value)>),
}

/// The path that is asked for, if one is.
pub(super) fn path_of(options: &OpenOptions) -> Option<&str> {
    match &options.root {
        Some(Root::At(path)) => Some(path.strip_suffix('.').unwrap_or(path)),
        Some(Root::Auto) | None => None,
    }
}

/// Looks for the path below `top`; `Err` inside: nothing stands there.
pub(super) fn find(
    reader: &mut Reader<'_>,
    top: Child,
    path: &str,
) -> Result<std::result::Result<Place, Error>> {
    let mut missing = Missing::default();
    let mut among = Vec::new();
    // Cycles lead to the same value with the same rest of the path.
    let mut seen = HashSet::new();
    let mut waiting = vec![(top, 0)];
    while let Some((child, at)) = waiting.pop() {
        if reader.identity(child).is_some_and(|it| !seen.insert((it, at))) {
            continue;
        }
        missing.reach(at);
        let rest = path.get(at..).unwrap_or_default();
        let node = reader.node(child)?;
        let first = waiting.len();
        for index in 0..node.len() {
            let Some((label, child)) = node.get(index) else { break };
            let (name, is_passed) = name_of(reader, &node, index, &label);
            reader.spend(1 + name.len() / NAME_BYTES_PER_VISIT)?;
            if is_passed {
                waiting.push((child, at));
            }
            if name.is_empty() && is_passed {
                continue;
            }
            missing.key(at, &name);
            if rest == name {
                return Ok(Ok(Place::At(child)));
            }
            if below(rest, &name).is_some() {
                waiting.push((child, at + name.len() + 1));
            } else if let (Label::Key(key), Child::Value(value), Some(_)) = (label, child, below(&name, rest))
            {
                among.push((key, value));
            }
        }
        if !among.is_empty() {
            return Ok(Ok(Place::Among(among)));
        }
        // The last is the first to be looked at.
        waiting[first..].reverse();
    }
    Ok(Err(missing.error(path)))
}

/// What a part of a value is called, and whether its own parts stand at the value's path, too.
fn name_of(reader: &Reader<'_>, node: &Node<'_>, index: usize, label: &Label) -> (String, bool) {
    match label {
        Label::Nothing => (index.to_string(), false),
        Label::Key(key) => {
            let mut name = String::new();
            reader.arena.push_key(*key, &mut name);
            let is_passed = MODULE_PARTS.contains(&name.as_str());
            (name, is_passed)
        }
        Label::Field(field) => match node {
            // The parts of a tensor have names.
            Node::Fields(Head::Tensor(_), _) if field.name != "attributes" => (field.name.to_owned(), false),
            _ => (String::new(), true),
        },
    }
}

/// What comes after a path in a name below it.
fn below<'a>(name: &'a str, path: &str) -> Option<&'a str> {
    if path.is_empty() { None } else { name.strip_prefix(path)?.strip_prefix('.') }
}

/// That nothing stands at a path among names.
pub(super) fn missing_among<'a>(path: &str, names: impl Iterator<Item = &'a str> + Clone) -> Error {
    let mut known = path;
    // The longest start of the path that is one of names.
    while !known.is_empty() && !names.clone().any(|it| below(it, known).is_some()) {
        known = known.rsplit_once('.').map_or("", |(start, _)| start);
    }
    let mut missing = Missing::default();
    let at = if known.is_empty() { 0 } else { known.len() + 1 };
    missing.reach(at);
    let rests = names.filter_map(|it| if known.is_empty() { Some(it) } else { below(it, known) });
    let mut seen = HashSet::new();
    let keys = rests.map(|it| it.split('.').next().unwrap_or_default()).filter(|it| seen.insert(*it));
    keys.for_each(|it| missing.key(at, it));
    missing.error(path)
}

/// What stands at the deepest level to which a path leads.
#[derive(Default)]
struct Missing {
    /// How much of the path leads there.
    at: usize,
    keys: Vec<String>,
    n_more: usize,
}

impl Missing {
    fn reach(&mut self, at: usize) {
        if at > self.at {
            *self = Missing { at, ..Missing::default() };
        }
    }

    fn key(&mut self, at: usize, name: &str) {
        if at == self.at && self.keys.len() < MAX_KEYS {
            self.keys.push(format!("`{}`", shortened(name).escape_debug()));
        } else if at == self.at {
            self.n_more += 1;
        }
    }

    fn error(self, path: &str) -> Error {
        let place = match path.get(..self.at.saturating_sub(1)) {
            None | Some("") => "at the top".to_owned(),
            Some(known) => format!("below `{}`", known.escape_debug()),
        };
        let keys = if self.keys.is_empty() { "nothing".to_owned() } else { self.keys.join(", ") };
        let more = if self.n_more > 0 { format!(" and {} more", self.n_more) } else { String::new() };
        Fault::new(format!("something at `{}`", path.escape_debug()), format!("{keys}{more} {place}"))
            .hint("look at the whole tree with `unladen inspect --tree`")
            .mismatch()
    }
}
