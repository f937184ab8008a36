//! What the opcodes build: containers, symbols and calls, and what may be changed in them later.

use super::{
    Machine, Meaning, PersistentIds, Run, Value,
    arena::{Call, Dict},
    symbol::{self, Symbol},
};
use crate::error::Result;

/// Items of all tuples, for each container or call that a pickle may make.
const POOL_PER_OBJECT: usize = 4;

/// Longer than any name of Python code.
const MAX_NAME_BYTES: usize = 4096;

impl<'a> Machine<'a> {
    /// Counts what takes memory beyond the stack.
    pub(super) fn check_objects(&self) -> Result<()> {
        let arena = &self.arena;
        let n_objects = arena.lists.len() + arena.dicts.len() + arena.calls.len() + arena.persistent.len();
        let most = self.max_objects;
        if n_objects.max(arena.symbols.len()) > most || arena.pool.len() > POOL_PER_OBJECT * most {
            return Err(self
                .fault(format!("at most {most} objects"), "more of them")
                .over_limit("n_objects"));
        }
        Ok(())
    }

    pub(super) fn tuple(&mut self, first: usize) -> Result<()> {
        let start = self.arena.pool.len() as u32;
        self.arena.pool.extend_from_slice(&self.stack[first..]);
        let run = Run { start, len: (self.stack.len() - first) as u32 };
        self.stack.truncate(first);
        self.check_objects()?;
        self.push(Value::Tuple(run))
    }

    pub(super) fn new_list(&mut self, items: Vec<Value>) -> Result<Value> {
        self.arena.lists.push(items);
        self.check_objects()?;
        Ok(Value::List(self.arena.lists.len() as u32 - 1))
    }

    pub(super) fn new_dict(&mut self, items: Vec<(Value, Value)>) -> Result<Value> {
        self.arena.dicts.push(Dict { items, state: Value::None });
        self.check_objects()?;
        Ok(Value::Dict(self.arena.dicts.len() as u32 - 1))
    }

    pub(super) fn pairs(&mut self, mark: usize) -> Result<Vec<(Value, Value)>> {
        let (pairs, odd) = self.stack[mark..].as_chunks::<2>();
        if !odd.is_empty() {
            return Err(self.fault("keys with values", "a key without").corrupt());
        }
        let pairs = pairs.iter().map(|&[key, value]| (key, value)).collect();
        self.stack.truncate(mark);
        Ok(pairs)
    }

    /// The items of what APPEND may change.
    pub(super) fn list_of(&mut self, target: Value) -> Result<&mut Vec<Value>> {
        let list = match target {
            Value::List(list) => list,
            Value::Call(call) => match self.items_of(call, |machine| machine.new_list(Vec::new()))? {
                Value::List(list) => list,
                _ => {
                    return Err(self.fault("an object that is a list", "one that is a dictionary").corrupt());
                }
            },
            other => return Err(self.fault("a list to append to", other.describe()).corrupt()),
        };
        Ok(&mut self.arena.lists[list as usize])
    }

    /// The items of what SETITEM may change.
    pub(super) fn dict_of(&mut self, target: Value) -> Result<&mut Vec<(Value, Value)>> {
        let dict = match target {
            Value::Dict(dict) => dict,
            Value::Call(call) => match self.items_of(call, |machine| machine.new_dict(Vec::new()))? {
                Value::Dict(dict) => dict,
                _ => {
                    return Err(self.fault("an object that is a dictionary", "one that is a list").corrupt());
                }
            },
            other => return Err(self.fault("a dictionary to set items of", other.describe()).corrupt()),
        };
        Ok(&mut self.arena.dicts[dict as usize].items)
    }

    /// The items of an object of unknown class, made at first use.
    pub(super) fn items_of(
        &mut self,
        call: u32,
        make: impl FnOnce(&mut Self) -> Result<Value>,
    ) -> Result<Value> {
        let Call { function, items, .. } = self.arena.calls[call as usize];
        if self.arena.meaning(function).is_tensor() {
            return Err(self.fault("a list or a dictionary", "a tensor to set items of").corrupt());
        }
        if items != Value::None {
            return Ok(items);
        }
        let items = make(self)?;
        self.arena.calls[call as usize].items = items;
        Ok(items)
    }

    pub(super) fn symbol(&mut self, module: &'a [u8], name: &'a [u8]) -> Result<()> {
        // It is hashed each time that it is named, and shown in messages.
        let len_bytes = module.len().max(name.len());
        if len_bytes > MAX_NAME_BYTES {
            let expected = format!("a name of at most {MAX_NAME_BYTES} bytes");
            return Err(self.fault(expected, format!("one of {len_bytes}")).unsupported());
        }
        let symbols = &mut self.arena.symbols;
        let number = *self.known_symbols.entry((module, name)).or_insert_with(|| {
            symbols.push(Symbol { module, name, meaning: symbol::meaning(module, name) });
            symbols.len() as u32 - 1
        });
        self.check_objects()?;
        self.push(Value::Symbol(number))
    }

    /// Pushes what a persistent id stands for.
    pub(super) fn persistent(&mut self, id: Value) -> Result<()> {
        let is_allowed = match id {
            Value::Tuple(run) => {
                if let (&[Value::Str(kind) | Value::Bytes(kind), class, ..], true) =
                    (self.arena.run(run), self.ids != PersistentIds::Storages)
                    && self.arena.bytes(kind) == b"module"
                {
                    return self.push(class);
                }
                true
            }
            Value::Str(_) | Value::Bytes(_) | Value::Int(_) => self.ids == PersistentIds::Numbers,
            _ => false,
        };
        if !is_allowed {
            return Err(self.fault("a persistent id that is a tuple", id.describe()).corrupt());
        }
        let storage = Value::Storage(self.arena.persistent.len() as u32);
        self.arena.persistent.push(id);
        self.check_objects()?;
        self.push(storage)
    }

    /// Records a call; plain containers become what they are at once.
    pub(super) fn call(&mut self, function: Value, args: Value) -> Result<Value> {
        let Value::Tuple(args) = args else {
            return Err(self.fault("a tuple of arguments", args.describe()).corrupt());
        };
        if !matches!(function, Value::Symbol(_) | Value::Call(_)) {
            return Err(self.fault("a function to call", function.describe()).corrupt());
        }
        match (self.arena.meaning(function), self.arena.run(args)) {
            (Meaning::Dict, []) => return self.new_dict(Vec::new()),
            (Meaning::Dict, &[Value::Dict(dict)]) => return Ok(Value::Dict(dict)),
            (Meaning::Dict, &[items @ (Value::List(_) | Value::Tuple(_))]) => {
                let pair = |&it: &Value| match self.arena.sequence(it) {
                    Some(&[key, value]) => Some((key, value)),
                    _ => None,
                };
                let items = self.arena.sequence(items).unwrap_or_default();
                let Some(items) = items.iter().map(pair).collect::<Option<Vec<_>>>() else {
                    return Err(self.fault("pairs of keys and values", "something else").corrupt());
                };
                return self.new_dict(items);
            }
            // `defaultdict(factory)`
            (Meaning::Dict, [Value::Symbol(_) | Value::None]) => return self.new_dict(Vec::new()),
            (Meaning::Sequence, []) => return self.new_list(Vec::new()),
            (Meaning::Sequence, &[items @ (Value::List(_) | Value::Tuple(_))]) => return Ok(items),
            (Meaning::TypeTag, &[value, _]) => return Ok(value),
            _ => {}
        }
        self.arena.calls.push(Call { function, args, items: Value::None, state: Value::None });
        self.check_objects()?;
        Ok(Value::Call(self.arena.calls.len() as u32 - 1))
    }

    pub(super) fn build(&mut self, target: Value, state: Value) -> Result<()> {
        let place = match target {
            Value::Dict(dict) => &mut self.arena.dicts[dict as usize].state,
            Value::Call(call) => {
                let function = self.arena.calls[call as usize].function;
                if self.arena.meaning(function).takes_no_state() {
                    return Err(self.fault("an object that has a state", "a tensor").corrupt());
                }
                &mut self.arena.calls[call as usize].state
            }
            other => return Err(self.fault("an object that has a state", other.describe()).corrupt()),
        };
        let before = std::mem::replace(place, state);
        if before == Value::None {
            return Ok(());
        }
        // A second state changes the first one: keep both.
        let run = Run { start: self.arena.pool.len() as u32, len: 2 };
        self.arena.pool.extend([before, state]);
        match target {
            Value::Dict(dict) => self.arena.dicts[dict as usize].state = Value::Tuple(run),
            Value::Call(call) => self.arena.calls[call as usize].state = Value::Tuple(run),
            _ => {}
        }
        Ok(())
    }
}
