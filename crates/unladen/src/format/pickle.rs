//! A pickle machine that builds data and nothing else: globals stay names, calls stay wishes, the memo holds references.

mod arena;
mod build;
mod keys;
mod lines;
mod memo;
mod operands;
mod skim;
mod symbol;

pub(super) use arena::{Arena, Call, Piece, Run, Text, Value, Wide, pieces, shortened};
pub(super) use skim::{Skeleton, skim, skim_object};
pub(super) use symbol::{Meaning, Symbol, modern_module};

use super::Limits;
use crate::error::{Error, Fault, Result};
use foldhash::{HashMap, HashMapExt as _};
use memo::Memo;
use skim::Hole;

/// Beyond this, positions of 32 bits would not do.
const MAX_OBJECTS: usize = 1 << 29;
/// Values that wait for what takes them, for each object that there may be: Python writes at most 1,000 items at a time, but
/// tuples whole.
const MAX_STACK_PER_OBJECT: (usize, usize) = (2, 5);
/// The newest protocol.
const MAX_PROTOCOL: u8 = 5;

/// What a container writes as persistent ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PersistentIds {
    /// None but storages, as tuples.
    Storages,
    /// Classes as well, with their source: such an id stands for the class.
    StoragesAndClasses,
    /// The same, and numbers for what stands elsewhere.
    Numbers,
}

/// A pickle that was read to its end.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub(super) arena: Arena<'a>,
    /// What it stands for.
    pub(super) root: Value,
    /// Bytes behind its end.
    pub(super) trailing_bytes: u64,
}

/// Reads a pickle; `start_byte` is its place in the file, for messages.
///
/// Fails on whatever Python would fail on, on persistent ids that are no tuples, and on opcodes that only code needs.
pub(super) fn read<'a>(bytes: &'a [u8], start_byte: u64, limits: &Limits) -> Result<Pickle<'a>> {
    read_around(bytes, &[], start_byte, PersistentIds::Storages, limits)
}

/// Reads a pickle that was taken out of its file, as [`read`] does.
pub(super) fn read_skeleton<'a>(
    skeleton: &'a Skeleton,
    ids: PersistentIds,
    limits: &Limits,
) -> Result<Pickle<'a>> {
    read_around(&skeleton.bytes, &skeleton.holes, skeleton.start_byte, ids, limits)
}

/// Fails if a pickle is longer than the caller allows, or than there are positions in one.
pub(super) fn check_len(len_bytes: u64, limits: &Limits) -> Result<()> {
    let most_bytes = limits.pickle_bytes.min(u32::MAX.into());
    if len_bytes <= most_bytes {
        return Ok(());
    }
    let expected = format!("a pickle of at most {most_bytes} bytes");
    Err(Fault::new(expected, format!("{len_bytes} bytes")).over_limit("pickle_bytes"))
}

fn read_around<'a>(
    bytes: &'a [u8],
    holes: &'a [Hole],
    start_byte: u64,
    ids: PersistentIds,
    limits: &Limits,
) -> Result<Pickle<'a>> {
    check_len(bytes.len() as u64, limits)?;
    let arena = Arena {
        bytes,
        start_byte,
        holes,
        decoded: Vec::new(),
        symbols: Vec::new(),
        pool: with_room(bytes, 7),
        lists: Vec::new(),
        dicts: with_room(bytes, 96),
        calls: with_room(bytes, 96),
        persistent: with_room(bytes, 96),
    };
    let mut machine = Machine {
        arena,
        ids,
        next_hole: 0,
        max_objects: limits.n_objects.min(MAX_OBJECTS),
        max_stack: limits.n_objects.min(MAX_OBJECTS) / MAX_STACK_PER_OBJECT.1 * MAX_STACK_PER_OBJECT.0,
        at: 0,
        opcode_at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Memo::new(with_room(bytes, 12)),
        known_symbols: HashMap::new(),
    };
    let root = machine.run()?;
    let trailing_bytes = (bytes.len() - machine.at) as u64;
    Ok(Pickle { arena: machine.arena, root, trailing_bytes })
}

/// Room for what a state dict's pickle has once in `bytes_each` bytes or somewhat more: growing would copy it all
/// several times over. Other pickles, and long ones, grow.
fn with_room<T>(pickle: &[u8], bytes_each: usize) -> Vec<T> {
    Vec::with_capacity((pickle.len() / bytes_each).min(MAX_ROOM))
}

/// Values that room is made for beforehand.
const MAX_ROOM: usize = 1 << 21;

struct Machine<'a> {
    arena: Arena<'a>,
    ids: PersistentIds,
    /// The next string that is not here but in the file.
    next_hole: usize,
    max_objects: usize,
    max_stack: usize,
    /// The next byte.
    at: usize,
    /// The opcode that is being carried out.
    opcode_at: usize,
    stack: Vec<Value>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: Memo,
    known_symbols: HashMap<(&'a [u8], &'a [u8]), u32>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Value> {
        loop {
            self.opcode_at = self.at;
            let [opcode] = self.take::<1>()?;
            match opcode {
                b'.' => return self.pop(),
                0x80 => {
                    let [protocol] = self.take::<1>()?;
                    if protocol > MAX_PROTOCOL {
                        let found = format!("protocol {protocol}");
                        return Err(self.fault("a pickle protocol of 0 to 5", found).unsupported());
                    }
                }
                // FRAME: the length is advice, but must not lie.
                0x95 => {
                    let claimed_bytes = u64::from_le_bytes(self.take()?);
                    if claimed_bytes > self.left_bytes() {
                        return Err(self.cut_short(claimed_bytes));
                    }
                }
                b'(' => self.marks.push(self.stack.len()),
                b'0' => {
                    if self.marks.last() == Some(&self.stack.len()) {
                        self.marks.pop();
                    } else {
                        self.pop()?;
                    }
                }
                b'1' => {
                    let mark = self.mark()?;
                    self.stack.truncate(mark);
                }
                b'2' => {
                    let top = self.top()?;
                    self.push(top)?;
                }
                // Values
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'J' => {
                    let number = i32::from_le_bytes(self.take()?);
                    self.push(Value::Int(Wide(number.into())))?;
                }
                b'K' => {
                    let [number] = self.take::<1>()?;
                    self.push(Value::Int(Wide(number.into())))?;
                }
                b'M' => {
                    let number = u16::from_le_bytes(self.take()?);
                    self.push(Value::Int(Wide(number.into())))?;
                }
                0x8a => {
                    let [len] = self.take::<1>()?;
                    self.long(len.into())?;
                }
                0x8b => {
                    let len = u32::from_le_bytes(self.take()?);
                    self.long(len.into())?;
                }
                b'G' => {
                    let number = f64::from_be_bytes(self.take()?);
                    self.push(Value::Float(Wide(number)))?;
                }
                b'I' | b'L' | b'F' | b'S' | b'V' => {
                    let value = self.line_of_value(opcode)?;
                    self.push(value)?;
                }
                b'X' | b'T' | b'B' => {
                    let len = u32::from_le_bytes(self.take()?);
                    self.text(opcode == b'X', len.into())?;
                }
                0x8c | b'U' | b'C' => {
                    let [len] = self.take::<1>()?;
                    self.text(opcode == 0x8c, len.into())?;
                }
                0x8d | 0x8e | 0x96 => {
                    let len = u64::from_le_bytes(self.take()?);
                    self.text(opcode == 0x8d, len)?;
                }
                // Tuples
                b')' => self.push(Value::Tuple(Run { start: 0, len: 0 }))?,
                b't' => {
                    let mark = self.mark()?;
                    self.tuple(mark)?;
                }
                0x85..=0x87 => {
                    let len = usize::from(opcode - 0x84);
                    let bottom = self.marks.last().copied().unwrap_or(0);
                    let first = self.stack.len().checked_sub(len).filter(|&it| it >= bottom);
                    let first = first.ok_or_else(|| self.underflow())?;
                    self.tuple(first)?;
                }
                // Lists and sets
                b']' | 0x8f => {
                    let list = self.new_list(Vec::new())?;
                    self.push(list)?;
                }
                b'l' | 0x91 => {
                    let mark = self.mark()?;
                    let items = self.stack[mark..].to_vec();
                    self.stack.truncate(mark);
                    let list = self.new_list(items)?;
                    self.push(list)?;
                }
                b'a' => {
                    let item = self.pop()?;
                    let target = self.top()?;
                    self.list_of(target)?.push(item);
                }
                b'e' | 0x90 => {
                    let mark = self.mark()?;
                    let items = self.stack[mark..].to_vec();
                    self.stack.truncate(mark);
                    let target = self.top()?;
                    self.list_of(target)?.extend_from_slice(&items);
                }
                // Dictionaries
                b'}' => {
                    let dict = self.new_dict(Vec::new())?;
                    self.push(dict)?;
                }
                b'd' => {
                    let mark = self.mark()?;
                    let items = self.pairs(mark)?;
                    let dict = self.new_dict(items)?;
                    self.push(dict)?;
                }
                b's' => {
                    let (item, key) = (self.pop()?, self.pop()?);
                    let target = self.top()?;
                    self.dict_of(target)?.push((key, item));
                }
                b'u' => {
                    let mark = self.mark()?;
                    let items = self.pairs(mark)?;
                    let target = self.top()?;
                    self.dict_of(target)?.extend_from_slice(&items);
                }
                // The memo
                b'q' => {
                    let [number] = self.take::<1>()?;
                    self.memo.put(number.into(), self.top()?);
                }
                b'r' => {
                    let number = u32::from_le_bytes(self.take()?);
                    self.memo.put(number, self.top()?);
                }
                0x94 => self.memo.put(self.memo.len() as u32, self.top()?),
                b'p' => {
                    let number = self.line_of_number()?;
                    self.memo.put(number, self.top()?);
                }
                b'g' => {
                    let number = self.line_of_number()?;
                    self.recall(number)?;
                }
                b'h' => {
                    let [number] = self.take::<1>()?;
                    self.recall(number.into())?;
                }
                b'j' => {
                    let number = u32::from_le_bytes(self.take()?);
                    self.recall(number)?;
                }
                // Symbols and calls
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.symbol(module, name)?;
                }
                0x93 => match (self.pop()?, self.pop()?) {
                    (Value::Str(name), Value::Str(module)) => {
                        let [module, name] = [module, name].map(|it| self.arena.bytes_in_place(it));
                        let (Some(module), Some(name)) = (module, name) else {
                            return Err(self.fault("the name of a global", "an escaped one").unsupported());
                        };
                        self.symbol(module, name)?;
                    }
                    (name, module) => {
                        let found = format!("{} and {}", module.describe(), name.describe());
                        return Err(self.fault("the name of a global", found).corrupt());
                    }
                },
                b'R' | 0x81 => {
                    let (args, function) = (self.pop()?, self.pop()?);
                    let result = self.call(function, args)?;
                    self.push(result)?;
                }
                0x92 => {
                    let (named, args, function) = (self.pop()?, self.pop()?, self.pop()?);
                    let result = self.call(function, args)?;
                    // Arguments by name are kept where a state would be.
                    if let (Value::Call(call), Value::Dict(_)) = (result, named) {
                        self.arena.calls[call as usize].state = named;
                    }
                    self.push(result)?;
                }
                // Instances of classes of Python 2: what is to be called, and with what, as above.
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let mark = self.mark()?;
                    self.tuple(mark)?;
                    let args = self.pop()?;
                    self.symbol(module, name)?;
                    let class = self.pop()?;
                    let result = self.call(class, args)?;
                    self.push(result)?;
                }
                b'o' => {
                    let mark = self.mark()?;
                    if mark >= self.stack.len() {
                        return Err(self.underflow());
                    }
                    self.tuple(mark + 1)?;
                    let (args, class) = (self.pop()?, self.pop()?);
                    let result = self.call(class, args)?;
                    self.push(result)?;
                }
                b'b' => {
                    let state = self.pop()?;
                    let target = self.top()?;
                    self.build(target, state)?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.persistent(id)?;
                }
                b'P' => {
                    let id = self.line_of_value(opcode)?;
                    self.persistent(id)?;
                }
                opcode => return Err(self.refuse(opcode)),
            }
        }
    }

    pub(super) fn fault(&self, expected: impl Into<String>, found: impl Into<String>) -> Fault {
        Fault::new(expected, found).at(self.arena.byte_in_file(self.opcode_at))
    }

    #[cold]
    fn underflow(&self) -> Error {
        self.fault("a value on the pickle's stack", "none").corrupt()
    }

    #[cold]
    fn refuse(&self, opcode: u8) -> Error {
        let what = match opcode {
            0x82..=0x84 => "an extension code (EXT)",
            0x97 => "a buffer outside the pickle (NEXT_BUFFER)",
            0x98 => "a buffer outside the pickle (READONLY_BUFFER)",
            _ => {
                return self.fault("a pickle opcode", format!("byte {opcode:#04x}")).corrupt();
            }
        };
        self.fault("opcodes that torch.save writes", what).unsupported()
    }

    #[inline]
    fn push(&mut self, value: Value) -> Result<()> {
        if self.stack.len() >= self.max_stack {
            return Err(self.overflow());
        }
        self.stack.push(value);
        Ok(())
    }

    #[cold]
    fn overflow(&self) -> Error {
        self.fault(format!("at most {} waiting values", self.max_stack), "a pickle that needs more")
            .over_limit("n_objects")
    }

    /// The top value above the last mark.
    fn top(&self) -> Result<Value> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        self.stack[bottom..].last().copied().ok_or_else(|| self.underflow())
    }

    fn pop(&mut self) -> Result<Value> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// The stack's height at the last mark, which is taken away. No value below it can have gone.
    fn mark(&mut self) -> Result<usize> {
        self.marks.pop().ok_or_else(|| self.fault("a mark on the pickle's stack", "none").corrupt())
    }

    fn recall(&mut self, number: u32) -> Result<()> {
        let Some(value) = self.memo.get(number) else {
            return Err(self.fault(format!("number {number} in the pickle's memo"), "nothing").corrupt());
        };
        self.push(value)
    }
}

#[cfg(test)]
mod tests;
