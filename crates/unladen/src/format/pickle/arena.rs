//! What a pickle builds, as data: small values stand where they are used, containers in vectors of their own,
//! strings as places in the pickle. Nothing here is ever run, and nothing needs a recursive walk to be dropped.

use super::{
    skim::Hole,
    symbol::{Meaning, Symbol},
};
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use std::{borrow::Cow, fmt::Write as _, hash::BuildHasher as _, ops::Range};

/// A place in the pickle's bytes; what stood there escaped lies behind them, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Text {
    pub(super) start: u32,
    pub(super) len: u32,
}

/// A place in [`Arena::pool`]: the items of a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u32,
    pub(crate) len: u32,
}

/// A number of 8 bytes that may lie at any multiple of 4: it keeps a [`Value`] at 12 bytes, and values are most of what
/// a pickle takes while it is read.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(Rust, packed(4))]
pub(crate) struct Wide<T: Copy>(pub(crate) T);

/// A value, or where it is. Copies of one share what it refers to, as Python's references do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value {
    None,
    Bool(bool),
    Int(Wide<i64>),
    /// An integer beyond 64 bits.
    Long(Text),
    Float(Wide<f64>),
    Str(Text),
    Bytes(Text),
    /// A string that is too long to be held: position in [`Arena::holes`].
    Blob(u32),
    /// Position in [`Arena::symbols`].
    Symbol(u32),
    Tuple(Run),
    /// Position in [`Arena::lists`]; sets are lists, too.
    List(u32),
    /// Position in [`Arena::dicts`].
    Dict(u32),
    /// Position in [`Arena::calls`].
    Call(u32),
    /// Position in [`Arena::persistent`].
    Storage(u32),
}

impl Value {
    /// What it is, in words.
    pub(crate) fn describe(self) -> String {
        match self {
            Value::Int(Wide(number)) => number.to_string(),
            Value::Bool(truth) => format!("the truth value {truth}"),
            Value::Float(Wide(number)) => format!("{number:?}"),
            Value::None => "None".to_owned(),
            Value::Long(_) => "an integer of more than 64 bits".to_owned(),
            Value::Str(_) | Value::Bytes(_) => "a string".to_owned(),
            Value::Symbol(_) => "the name of a class or function".to_owned(),
            Value::Tuple(Run { len, .. }) => format!("a tuple of {len}"),
            Value::List(_) => "a list".to_owned(),
            Value::Dict(_) => "a dictionary".to_owned(),
            Value::Call(_) => "an object".to_owned(),
            Value::Storage(_) => "a storage".to_owned(),
            Value::Blob(_) => "a long string".to_owned(),
        }
    }
}

/// A dictionary.
#[derive(Clone, Debug)]
pub(crate) struct Dict {
    pub(crate) items: Vec<(Value, Value)>,
    /// Attributes of a dictionary that has some (`_metadata` of a state dict); `None` without.
    pub(crate) state: Value,
}

/// The wish to call something, recorded and not fulfilled.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) function: Value,
    pub(crate) args: Run,
    /// Items of an object that is a list or a dictionary as well.
    pub(crate) items: Value,
    /// What was to become its attributes.
    pub(crate) state: Value,
}

/// Everything that a pickle built.
#[derive(Debug)]
pub(crate) struct Arena<'a> {
    /// The pickle.
    pub(crate) bytes: &'a [u8],
    /// Where it starts in the file.
    pub(crate) start_byte: u64,
    /// Long strings that were left in the file, by their place in `bytes`.
    pub(crate) holes: &'a [Hole],
    /// Strings that stand escaped in the pickle.
    pub(crate) decoded: Vec<u8>,
    pub(crate) symbols: Vec<Symbol<'a>>,
    pub(crate) pool: Vec<Value>,
    pub(crate) lists: Vec<Vec<Value>>,
    pub(crate) dicts: Vec<Dict>,
    pub(crate) calls: Vec<Call>,
    /// Persistent ids, in the order of their appearance.
    pub(crate) persistent: Vec<Value>,
}

/// What decides whether two keys are the same one.
#[derive(PartialEq, Eq, Hash)]
enum Key<'a> {
    Str(&'a [u8]),
    Bytes(&'a [u8]),
    Int(i64),
    None,
}

impl<'a> Arena<'a> {
    /// A string's bytes.
    pub(crate) fn bytes(&self, text: Text) -> &[u8] {
        self.texts().get(text)
    }

    /// A string's bytes where they stand in the pickle itself.
    pub(super) fn bytes_in_place(&self, text: Text) -> Option<&'a [u8]> {
        self.bytes.get(text.start as usize..)?.get(..text.len as usize)
    }

    /// The file's bytes that a string is made of, for one that stands there as it is.
    pub(crate) fn place_in_file(&self, text: Text) -> Option<Range<u64>> {
        self.bytes_in_place(text)?;
        let start = self.byte_in_file(text.start as usize);
        Some(start..start + u64::from(text.len))
    }

    /// Where a byte of the pickle stands in the file.
    pub(super) fn byte_in_file(&self, at: usize) -> u64 {
        let n_before = self.holes.partition_point(|it| it.at <= at);
        let cut_bytes = n_before.checked_sub(1).map_or(0, |last| self.holes[last].cut_bytes);
        self.start_byte + at as u64 + cut_bytes
    }

    fn texts(&self) -> Texts<'_> {
        Texts { pickle: self.bytes, decoded: &self.decoded }
    }

    /// A tuple's items.
    pub(crate) fn run(&self, run: Run) -> &[Value] {
        &self.pool[run.start as usize..][..run.len as usize]
    }

    /// The items of a tuple or a list.
    pub(crate) fn sequence(&self, value: Value) -> Option<&[Value]> {
        match value {
            Value::Tuple(run) => Some(self.run(run)),
            Value::List(list) => Some(&self.lists[list as usize]),
            _ => None,
        }
    }

    /// How many values have an identity: tuples count as many as they have items.
    pub(crate) fn n_identities(&self) -> usize {
        self.pool.len() + self.lists.len() + self.dicts.len() + self.calls.len()
    }

    /// Which container a value is, a number below [`Arena::n_identities`]; `None` for what holds nothing.
    pub(crate) fn identity(&self, value: Value) -> Option<usize> {
        let (n_pool, n_lists, n_dicts) = (self.pool.len(), self.lists.len(), self.dicts.len());
        match value {
            Value::Tuple(run) if run.len > 0 => Some(run.start as usize),
            Value::List(list) => Some(n_pool + list as usize),
            Value::Dict(dict) => Some(n_pool + n_lists + dict as usize),
            Value::Call(call) => Some(n_pool + n_lists + n_dicts + call as usize),
            _ => None,
        }
    }

    /// The value of a string key.
    pub(crate) fn get(&self, dict: u32, key: &str) -> Option<Value> {
        // Python 2 wrote its text as bytes.
        let is_key = |it: Value| matches!(it, Value::Str(text) | Value::Bytes(text) if self.bytes(text) == key.as_bytes());
        self.dicts[dict as usize].items.iter().find(|(it, _)| is_key(*it)).map(|&(_, value)| value)
    }

    /// How many items must be looked at to find a key, at most.
    pub(crate) fn n_items(&self, value: Value) -> u64 {
        match value {
            Value::Dict(dict) => self.dicts[dict as usize].items.len() as u64,
            _ => 0,
        }
    }

    /// What a callee is known for.
    pub(crate) fn meaning(&self, function: Value) -> Meaning {
        match function {
            Value::Symbol(symbol) => self.symbols[symbol as usize].meaning,
            _ => Meaning::Unknown,
        }
    }

    /// A string as it can be shown and used as a name; lone surrogates and bytes that are no UTF-8 are escaped.
    pub(crate) fn text(&self, text: Text) -> Cow<'_, str> {
        let bytes = self.bytes(text);
        match std::str::from_utf8(bytes) {
            Ok(text) => Cow::Borrowed(text),
            Err(_) => Cow::Owned(escaped(bytes)),
        }
    }

    /// Leaves one item of each key in the dictionaries: at the first one's place, with the last one's value, as
    /// Python does. Returns the keys that stood twice, at most `limit` of them.
    pub(crate) fn merge_duplicate_keys(&mut self, limit: usize) -> Vec<String> {
        let mut twice = Vec::new();
        let texts = Texts { pickle: self.bytes, decoded: &self.decoded };
        for dict in &mut self.dicts {
            merge_items(texts, &mut dict.items, &mut |key| {
                if twice.len() < limit {
                    twice.push(key);
                }
            });
        }
        let name = |key: Value| {
            let mut name = String::new();
            self.push_key(key, &mut name);
            name
        };
        twice.into_iter().map(name).map(|it| shortened(&it)).collect()
    }
}

/// The start of a name, for a message: a file may make one of millions of bytes, and hundreds of messages about it.
pub(crate) fn shortened(name: &str) -> String {
    const MAX_CHARS: usize = 500;
    match name.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", name.get(..end).unwrap_or_default()),
        None => name.to_owned(),
    }
}

/// In a dictionary with fewer items, a key is looked for one item after the other.
const MIN_HASHED: usize = 16;

fn merge_items(texts: Texts<'_>, items: &mut Vec<(Value, Value)>, found_twice: &mut dyn FnMut(Value)) {
    let key_of = |value| match value {
        Value::Str(text) => Some(Key::Str(texts.get(text))),
        Value::Bytes(text) => Some(Key::Bytes(texts.get(text))),
        Value::Int(Wide(number)) => Some(Key::Int(number)),
        Value::Bool(truth) => Some(Key::Int(i64::from(truth))),
        Value::None => Some(Key::None),
        // Rare as keys; two of one name are told apart when tensors are named.
        _ => None,
    };
    let is_hashed = items.len() >= MIN_HASHED;
    let state = RandomState::default();
    // Positions alone: the keys stand in `items`.
    let mut hashed: HashTable<u32> = HashTable::with_capacity(if is_hashed { items.len() } else { 0 });
    let mut kept = 0;
    for index in 0..items.len() {
        let (value, item) = items[index];
        let first = match key_of(value) {
            None => None,
            Some(key) if !is_hashed => {
                items[..kept].iter().position(|&(it, _)| key_of(it).as_ref() == Some(&key))
            }
            Some(key) => {
                let hash = state.hash_one(Some(&key));
                let is_key = |&it: &u32| key_of(items[it as usize].0).as_ref() == Some(&key);
                let first = hashed.find(hash, is_key).map(|&it| it as usize);
                if first.is_none() {
                    let rehash = |&it: &u32| state.hash_one(key_of(items[it as usize].0));
                    hashed.insert_unique(hash, kept as u32, rehash);
                }
                first
            }
        };
        match first {
            Some(first) => {
                items[first].1 = item;
                found_twice(value);
            }
            None => {
                items[kept] = (value, item);
                kept += 1;
            }
        }
    }
    items.truncate(kept);
}

/// Where strings are.
#[derive(Clone, Copy)]
struct Texts<'t> {
    pickle: &'t [u8],
    decoded: &'t [u8],
}

impl<'t> Texts<'t> {
    fn get(self, text: Text) -> &'t [u8] {
        let (start, len) = (text.start as usize, text.len as usize);
        match start.checked_sub(self.pickle.len()) {
            // An empty string may stand at the very end.
            Some(start) => &self.decoded[start..][..len],
            None => &self.pickle[start..][..len],
        }
    }
}

/// A part of a string's bytes.
pub(crate) enum Piece<'a> {
    Text(&'a str),
    /// A lone surrogate, which Python lets pass.
    Surrogate(u32),
    /// A byte that is no UTF-8.
    Byte(u8),
}

/// UTF-8 as far as it goes, and what stands between.
pub(crate) fn pieces(bytes: &[u8]) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (piece, used) = match std::str::from_utf8(rest) {
            Ok("") => return None,
            Ok(text) => (Piece::Text(text), text.len()),
            Err(error) if error.valid_up_to() > 0 => {
                let valid = rest.get(..error.valid_up_to()).unwrap_or_default();
                (Piece::Text(std::str::from_utf8(valid).unwrap_or_default()), valid.len())
            }
            Err(_) => match *rest {
                [0xED, second @ 0xA0..=0xBF, third @ 0x80..=0xBF, ..] => {
                    let unit = 0xD000 | u32::from(second & 0x3F) << 6 | u32::from(third & 0x3F);
                    (Piece::Surrogate(unit), 3)
                }
                [byte, ..] => (Piece::Byte(byte), 1),
                [] => return None,
            },
        };
        rest = &rest[used..];
        Some(piece)
    })
}

/// UTF-8 as far as it goes; a lone surrogate as `\udXXX`, any other byte as `\xXX`.
fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for piece in pieces(bytes) {
        // Writing to a string cannot fail.
        let _ = match piece {
            Piece::Text(valid) => {
                text.push_str(valid);
                Ok(())
            }
            Piece::Surrogate(unit) => write!(text, "\\u{unit:04x}"),
            Piece::Byte(byte) => write!(text, "\\x{byte:02x}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lone_surrogates_are_escaped_and_the_rest_is_kept() {
        assert_eq!(escaped(b"a\xed\xa0\x80b"), "a\\ud800b");
        assert_eq!(escaped(b"\xff\xc3\xa4"), "\\xff\u{e4}");
        assert_eq!(escaped(b"\xed\xa0"), "\\xed\\xa0");
    }
}
