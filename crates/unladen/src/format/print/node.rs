//! What stands at a place of the tree: a leaf, a container, or an object with a title and fields.

use super::numpy::{self, Numbers};
use crate::{
    error::Result,
    format::{
        pickle::{Arena, Run, Text, Value},
        rebuild::{Parts, Rebuild, Rebuilt, Visits},
        tree::Listing,
    },
    tensor::{Dims, Layout},
};

/// What may stand inside something.
#[derive(Clone, Copy)]
pub(super) enum Child {
    Value(Value),
    /// Arguments of a call.
    Args(Run),
    /// The items of a dictionary without its attributes.
    Items(u32),
    /// The items that [`Reader::new`] was given.
    Among,
}

impl Child {
    /// True for what may have something inside.
    pub(super) fn is_container(self) -> bool {
        match self {
            Child::Value(value) => matches!(
                value,
                Value::Tuple(_) | Value::List(_) | Value::Dict(_) | Value::Call(_) | Value::Storage(_)
            ),
            Child::Args(_) | Child::Items(_) | Child::Among => true,
        }
    }
}

pub(super) enum Node<'a> {
    Leaf(Leaf<'a>),
    List(&'a [Value]),
    Tuple(&'a [Value]),
    Args(&'a [Value]),
    Dict {
        items: &'a [(Value, Value)],
        /// All keys are strings that cannot be taken for something else in JSON.
        is_object: bool,
    },
    Fields(Head<'a>, Vec<Field>),
}

/// A value with nothing inside.
pub(super) enum Leaf<'a> {
    Value(Value),
    /// Bytes as Python writes them in the older protocols: each a letter of a text.
    Latin1(Text),
    /// What stands in an array of NumPy, or a number of it.
    Numbers(Box<Numbers<'a>>),
}

/// What fields belong to.
pub(super) enum Head<'a> {
    /// A dictionary that has attributes.
    Items,
    /// An object of unknown class, by name.
    Object(String),
    /// A tensor, or one that is made of several.
    Tensor(Box<Title<'a>>),
}

/// What is said of a tensor.
pub(super) struct Title<'a> {
    pub(super) is_whole: bool,
    /// Its dtype, or what it is.
    pub(super) what: String,
    pub(super) shape: Dims,
    /// Under which names it is listed.
    pub(super) names: Vec<&'a str>,
}

impl<'a> Title<'a> {
    /// Of a plain tensor.
    pub(super) fn of(layout: &Layout, names: Vec<&'a str>) -> Title<'a> {
        let (what, shape) = (layout.dtype().to_string(), layout.shape().into());
        Title { is_whole: false, what, shape, names }
    }
}

/// A part of an object.
#[derive(Clone, Copy)]
pub(super) struct Field {
    pub(super) name: &'static str,
    /// What stands before it in text, where it has no line of its own.
    pub(super) glue: &'static str,
    pub(super) child: Child,
}

/// What says which of several values one is.
pub(super) enum Label {
    Nothing,
    Key(Value),
    Field(Field),
}

impl Node<'_> {
    /// How many values are inside.
    pub(super) fn len(&self) -> usize {
        match self {
            Node::Leaf(_) => 0,
            Node::List(items) | Node::Tuple(items) | Node::Args(items) => items.len(),
            Node::Dict { items, .. } => items.len(),
            Node::Fields(_, fields) => fields.len(),
        }
    }

    pub(super) fn get(&self, index: usize) -> Option<(Label, Child)> {
        match self {
            Node::Leaf(_) => None,
            Node::List(items) | Node::Tuple(items) | Node::Args(items) => {
                items.get(index).map(|&it| (Label::Nothing, Child::Value(it)))
            }
            Node::Dict { items, .. } => {
                items.get(index).map(|&(key, it)| (Label::Key(key), Child::Value(it)))
            }
            Node::Fields(_, fields) => fields.get(index).map(|&it| (Label::Field(it), it.child)),
        }
    }

    /// True if its parts follow each other without brackets around them, as text.
    pub(super) fn is_glued(&self) -> bool {
        matches!(self, Node::Fields(Head::Items | Head::Object(_), _))
    }
}

/// Tells what values stand for.
pub(super) struct Reader<'a> {
    pub(super) arena: &'a Arena<'a>,
    rebuild: &'a Rebuild<'a>,
    listing: &'a Listing,
    among: &'a [(Value, Value)],
    /// Calls with the positions of the tensors that they are, sorted.
    places: Vec<(u32, u32)>,
    visits: Visits,
}

impl<'a> Reader<'a> {
    /// `among`: what [`Child::Among`] is.
    pub(super) fn new(
        rebuild: &'a Rebuild<'a>,
        listing: &'a Listing,
        among: &'a [(Value, Value)],
    ) -> Reader<'a> {
        let mut places: Vec<(u32, u32)> = listing.calls.iter().copied().zip(0..).collect();
        places.sort_unstable();
        let visits = Visits::new(rebuild.arena.bytes.len());
        Reader { arena: rebuild.arena, rebuild, listing, among, places, visits }
    }

    pub(super) fn spend(&mut self, n_visits: usize) -> Result<()> {
        self.visits.spend(n_visits as u64)
    }

    /// What makes a container one and the same wherever it is met.
    pub(super) fn identity(&self, child: Child) -> Option<usize> {
        match child {
            Child::Value(value) => self.arena.identity(value),
            Child::Args(_) | Child::Items(_) | Child::Among => None,
        }
    }

    pub(super) fn node(&mut self, child: Child) -> Result<Node<'a>> {
        let arena = self.arena;
        let value = match child {
            Child::Value(value) => value,
            Child::Args(run) => return Ok(Node::Args(arena.run(run))),
            Child::Items(dict) => return Ok(dict_node(arena, &arena.dicts[dict as usize].items)),
            Child::Among => return Ok(dict_node(arena, self.among)),
        };
        Ok(match value {
            Value::List(list) => Node::List(&arena.lists[list as usize]),
            Value::Tuple(run) => Node::Tuple(arena.run(run)),
            Value::Dict(dict) => match arena.dicts[dict as usize].state {
                Value::None => dict_node(arena, &arena.dicts[dict as usize].items),
                state => Node::Fields(
                    Head::Items,
                    vec![
                        field("$value", "", Child::Items(dict)),
                        field("$attributes", " with ", Child::Value(state)),
                    ],
                ),
            },
            Value::Storage(id) => match self.rebuild.persistent(id) {
                Rebuilt::Tensor(view) => {
                    let names = self.names(self.rebuild.call_of_persistent(id));
                    Node::Fields(Head::Tensor(Box::new(Title::of(&view.layout, names))), Vec::new())
                }
                _ => {
                    let fields = vec![field("id", " ", Child::Value(arena.persistent[id as usize]))];
                    Node::Fields(Head::Object("storage".to_owned()), fields)
                }
            },
            Value::Call(call) => self.call(call)?,
            leaf => Node::Leaf(Leaf::Value(leaf)),
        })
    }

    fn call(&mut self, call: u32) -> Result<Node<'a>> {
        let mut parts = Parts::new();
        let (is_whole, what, shape, named) = match self.rebuild.call(call, &mut self.visits, &mut parts) {
            Ok(Rebuilt::Tensor(view)) => {
                let layout = view.layout;
                (false, layout.dtype().to_string(), Dims::from_slice(layout.shape()), None)
            }
            Ok(Rebuilt::Composite(whole)) => {
                parts.extend(whole.free);
                (true, whole.kind.to_string(), whole.shape, Some(whole.named))
            }
            // Where it is no tensor after all, what the file says is shown as it is.
            Ok(Rebuilt::Other | Rebuilt::Storage | Rebuilt::LeftOut(_)) | Err(_) => {
                return self.object(call);
            }
        };
        let named = named.into_iter().flatten().map(|(name, value)| field(name, "", Child::Value(value)));
        let attributes = parts.into_iter().filter(|it| !matches!(it, Value::None));
        let attributes = attributes.map(|it| field("attributes", "", Child::Value(it)));
        let fields = named.chain(attributes).collect();
        let title = Title { is_whole, what, shape, names: self.names(call) };
        Ok(Node::Fields(Head::Tensor(Box::new(title)), fields))
    }

    fn object(&mut self, position: u32) -> Result<Node<'a>> {
        let call = &self.arena.calls[position as usize];
        if let Some(numbers) = numpy::numbers(self.arena, call, &mut self.visits)? {
            return Ok(Node::Leaf(Leaf::Numbers(Box::new(numbers))));
        }
        let name = match call.function {
            Value::Symbol(symbol) => {
                let symbol = &self.arena.symbols[symbol as usize];
                if let (b"_codecs", b"encode", &[Value::Str(letters), Value::Str(_)]) =
                    (symbol.module, symbol.name, self.arena.run(call.args))
                {
                    return Ok(Node::Leaf(Leaf::Latin1(letters)));
                }
                symbol.to_string()
            }
            _ => String::new(),
        };
        let mut fields = Vec::new();
        if !matches!(call.function, Value::Symbol(_)) {
            fields.push(field("function", "", Child::Value(call.function)));
        }
        fields.push(field("args", "", Child::Args(call.args)));
        for (name, value) in [("items", call.items), ("state", call.state)] {
            if value != Value::None {
                fields.push(field(name, " ", Child::Value(value)));
            }
        }
        Ok(Node::Fields(Head::Object(name), fields))
    }

    /// Under which names a call is listed as a tensor.
    fn names(&self, call: u32) -> Vec<&'a str> {
        let first = self.places.partition_point(|it| it.0 < call);
        let of_call = self.places[first..].iter().take_while(|it| it.0 == call);
        of_call.map(|it| self.listing.tensors[it.1 as usize].name.as_str()).collect()
    }
}

fn field(name: &'static str, glue: &'static str, child: Child) -> Field {
    Field { name, glue, child }
}

fn dict_node<'a>(arena: &Arena<'_>, items: &'a [(Value, Value)]) -> Node<'a> {
    let is_plain = |key: &Value| matches!(key, Value::Str(text) if !arena.bytes(*text).starts_with(b"$"));
    Node::Dict { items, is_object: items.iter().all(|(key, _)| is_plain(key)) }
}
