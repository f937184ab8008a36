//! Pickle streams: opcodes in any order with operands of the right form, and whole calls as PyTorch writes them with odd
//! numbers in them.

mod opcodes;

use crate::{number, one_in, perhaps_lie};
use arbitrary::{Result, Unstructured};
use opcodes::{
    GLOBALS, OPCODES,
    Operand::{Bytes, Counted, Line, Lines, Nothing},
    WORDS,
};
use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
};

/// How the persistent ids of a container say what they mean.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// A tuple of five, which names a record of the archive.
    Zip,
    /// A tuple of six: the last one is the part of the storage that is meant.
    Legacy,
    /// The number of a tensor or a storage in another member.
    Tar,
}

/// A pickle that is being written.
pub struct Pickle {
    pub bytes: Vec<u8>,
    ids: Ids,
    /// The storages that it names, by their position in [`STORAGES`], and how many elements they have by the first name.
    pub used: BTreeMap<usize, u64>,
}

impl Pickle {
    pub fn new(ids: Ids) -> Pickle {
        Pickle { bytes: Vec::new(), ids, used: BTreeMap::new() }
    }
}

impl Deref for Pickle {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Pickle {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

/// Key, class and number of elements of the storages that there are: each has 16 bytes.
pub const STORAGES: [(&str, &str, u64); 4] =
    [("0", "FloatStorage", 4), ("1", "HalfStorage", 8), ("2", "ByteStorage", 16), ("3", "DoubleStorage", 2)];

/// What the storage at a position of [`STORAGES`] holds.
pub fn storage_bytes(index: u8) -> Vec<u8> {
    (0..16).map(|it| it * 16 + index).collect()
}

/// Offset, sizes and strides, in elements.
pub type View = (u64, Vec<u64>, Vec<u64>);

/// How many views [`view`] knows.
pub const N_VIEWS: usize = 6;

/// A view of a storage of so many elements: whole, in rows, in columns, expanded, with holes.
pub fn view(kind: usize, n_elems: u64) -> View {
    let half = n_elems / 2;
    match kind {
        0 | 1 => (0, vec![n_elems], vec![1]),
        2 => (0, vec![half, 2], vec![2, 1]),
        3 => (0, vec![half, 2], vec![1, half]),
        4 => (half, vec![3, half], vec![0, 1]),
        _ => (1, vec![half], vec![2]),
    }
}

/// A pickle for a zip archive, see [`write`].
pub fn stream(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Ok(write(u, Ids::Zip)?.bytes)
}

/// A pickle: a dictionary as PyTorch writes it, with a few entries and whatever `u` puts between its opcodes.
pub fn write(u: &mut Unstructured<'_>, ids: Ids) -> Result<Pickle> {
    let mut out = Pickle::new(ids);
    if !one_in(u, 16)? {
        out.extend([0x80, perhaps_lie(u, 2)?]);
    }
    out.push(b'}');
    put(u, &mut out)?;
    out.push(b'(');
    for index in 0..u.int_in_range(1..=12)? {
        match u.int_in_range(0..=11)? {
            11 => opcode(u, &mut out)?,
            9 | 10 => {
                text(&mut out, &format!("k{index}"));
                value(u, &mut out)?;
            }
            _ => {
                text(&mut out, &format!("w{index}"));
                tensor(u, &mut out)?;
            }
        }
    }
    out.push(b'u');
    for _ in 0..u.int_in_range(0..=2)? {
        opcode(u, &mut out)?;
    }
    if !one_in(u, 32)? {
        out.push(b'.');
    }
    Ok(out)
}

/// A tensor as one of PyTorch's functions rebuilds it.
pub fn tensor(u: &mut Unstructured<'_>, out: &mut Pickle) -> Result<()> {
    if out.ids == Ids::Tar && !one_in(u, 8)? {
        return number_of(u, out);
    }
    let is_v3 = one_in(u, 4)?;
    let is_parameter = one_in(u, 6)?;
    if is_parameter {
        global(out, ("torch._utils", "_rebuild_parameter"));
        out.push(b'(');
    }
    global(out, ("torch._utils", if is_v3 { "_rebuild_tensor_v3" } else { "_rebuild_tensor_v2" }));
    out.push(b'(');
    let n_elems = storage(u, out, is_v3)?;
    layout(u, out, n_elems)?;
    out.push(if one_in(u, 2)? { 0x88 } else { 0x89 });
    hooks(out);
    if is_v3 {
        let dtype = ["float32", "uint16", "float8_e4m3fn", "complex32", "bits8"];
        global(out, ("torch", u.choose(&dtype)?));
    }
    if one_in(u, 8)? {
        out.extend_from_slice(b"}(");
        text(out, u.choose(&["conj", "neg"])?);
        out.extend([0x88, b'u']);
    }
    out.extend_from_slice(b"tR");
    put(u, out)?;
    if is_parameter {
        out.push(0x88);
        hooks(out);
        out.extend_from_slice(b"tR");
    }
    Ok(())
}

/// A view of the storage at a position of [`STORAGES`], as PyTorch writes a tensor, without a lie.
pub fn honest_tensor(out: &mut Pickle, index: usize, (offset, sizes, strides): &View) {
    let (key, class, n_elems) = STORAGES[index];
    out.used.entry(index).or_insert(n_elems);
    global(out, ("torch._utils", "_rebuild_tensor_v2"));
    out.extend_from_slice(b"((");
    text(out, "storage");
    global(out, ("torch", class));
    text(out, key);
    text(out, "cpu");
    long(out, n_elems);
    if out.ids == Ids::Legacy {
        out.push(b'N');
    }
    out.extend_from_slice(b"tQ");
    long(out, *offset);
    for numbers in [sizes, strides] {
        out.push(b'(');
        numbers.iter().for_each(|it| long(out, *it));
        out.push(b't');
    }
    out.push(0x89);
    hooks(out);
    out.extend_from_slice(b"tR");
}

/// Offset, sizes and strides: those of a storage of so many elements, or any.
fn layout(u: &mut Unstructured<'_>, out: &mut Pickle, n_elems: u64) -> Result<()> {
    let (offset, sizes, strides) = match u.int_in_range(0..=N_VIEWS + 1)? {
        kind if kind < N_VIEWS => view(kind, n_elems),
        _ => {
            let n_dims = u.int_in_range(0..=3)?;
            let mut numbers = |n: usize| (0..n).map(|_| number(u)).collect::<Result<Vec<u64>>>();
            let (offset, sizes, strides) = (numbers(1)?, numbers(n_dims)?, numbers(n_dims)?);
            (offset[0], sizes, strides)
        }
    };
    integer(u, out, offset)?;
    for mut numbers in [sizes, strides] {
        if one_in(u, 24)? {
            numbers.resize(u.int_in_range(0..=70)?, 1);
        }
        out.push(b'(');
        for it in numbers {
            integer(u, out, it)?;
        }
        out.push(b't');
    }
    Ok(())
}

/// A persistent id; returns how many elements the storage has.
fn storage(u: &mut Unstructured<'_>, out: &mut Pickle, is_untyped: bool) -> Result<u64> {
    let index = u.int_in_range(0..=STORAGES.len() - 1)?;
    let (key, class, n_elems) = STORAGES[index];
    if out.ids == Ids::Tar {
        number_of(u, out)?;
        return Ok(n_elems);
    }
    let n_elems = if is_untyped { 16 } else { n_elems };
    out.used.entry(index).or_insert(n_elems);
    out.push(b'(');
    text(out, "storage");
    // A tuple of one storage by another class.
    let class = if one_in(u, 24)? { "ComplexFloatStorage" } else { class };
    match is_untyped {
        true => global(out, ("torch.storage", "UntypedStorage")),
        false => global(out, ("torch", class)),
    }
    text(out, if one_in(u, 24)? { "9" } else { key });
    text(out, "cpu");
    long(out, perhaps_lie(u, n_elems)?);
    if out.ids == Ids::Legacy {
        match one_in(u, 4)? {
            false => out.push(b'N'),
            true => part(u, out, n_elems)?,
        }
    }
    out.extend_from_slice(b"tQ");
    Ok(n_elems)
}

/// The part of a storage that is meant.
fn part(u: &mut Unstructured<'_>, out: &mut Pickle, n_elems: u64) -> Result<()> {
    out.push(b'(');
    text(out, u.choose(&["10", "11", "12", "13", "0"])?);
    let offset = u.int_in_range(0..=n_elems)?;
    long(out, perhaps_lie(u, offset)?);
    long(out, perhaps_lie(u, n_elems - offset)?);
    out.push(b't');
    Ok(())
}

/// The number that stands for a tensor or a storage, as a number or as text.
fn number_of(u: &mut Unstructured<'_>, out: &mut Pickle) -> Result<()> {
    let number: u8 = u.int_in_range(1..=16)?;
    match one_in(u, 4)? {
        false => out.extend([b'K', number]),
        true => text(out, &number.to_string()),
    }
    out.push(b'Q');
    Ok(())
}

/// Anything that may stand in a checkpoint beside tensors.
fn value(u: &mut Unstructured<'_>, out: &mut Pickle) -> Result<()> {
    match u.int_in_range(0..=6)? {
        0 => any_integer(u, out)?,
        1 => text(out, u.choose(WORDS)?),
        2 => out.extend_from_slice(b"]N a".trim_ascii()),
        3 => {
            global(out, *u.choose(GLOBALS)?);
            out.extend_from_slice(b")R");
        }
        4 => {
            global(out, *u.choose(GLOBALS)?);
            out.push(b'(');
            for _ in 0..u.int_in_range(0..=7)? {
                match one_in(u, 3)? {
                    true => _ = storage(u, out, false)?,
                    false => any_integer(u, out)?,
                }
            }
            out.extend_from_slice(b"tR");
            if one_in(u, 2)? {
                out.extend_from_slice(b"}b");
            }
        }
        5 => {
            // Lists in lists, one of them maybe in itself.
            let depth = u.int_in_range(0..=40)?;
            out.extend(std::iter::repeat_n(b']', depth + 1));
            out.extend(std::iter::repeat_n(b'a', depth));
        }
        _ => {
            out.extend([b'h', u.int_in_range(0..=12)?]);
        }
    }
    Ok(())
}

fn opcode(u: &mut Unstructured<'_>, out: &mut Vec<u8>) -> Result<()> {
    let (code, operand) = *u.choose(OPCODES)?;
    out.push(code);
    match operand {
        Nothing => {}
        Bytes(n) => {
            let number = number(u)?.to_le_bytes();
            out.extend_from_slice(&number[..n]);
        }
        Line => line(out, u.choose(WORDS)?),
        Lines => {
            let (module, name) = *u.choose(GLOBALS)?;
            line(out, module);
            line(out, name);
        }
        Counted(n) => {
            let word = u.choose(WORDS)?.as_bytes();
            let len = perhaps_lie(u, word.len() as u64)?.to_le_bytes();
            out.extend_from_slice(&len[..n]);
            out.extend_from_slice(word);
        }
    }
    Ok(())
}

fn put(u: &mut Unstructured<'_>, out: &mut Vec<u8>) -> Result<()> {
    if one_in(u, 2)? {
        out.extend([b'q', u.int_in_range(0..=12)?]);
    }
    Ok(())
}

fn any_integer(u: &mut Unstructured<'_>, out: &mut Vec<u8>) -> Result<()> {
    let number = number(u)?;
    integer(u, out, number)
}

fn integer(u: &mut Unstructured<'_>, out: &mut Vec<u8>, truth: u64) -> Result<()> {
    match if one_in(u, 48)? { number(u)? } else { truth } {
        small @ 0..=255 => out.extend([b'K', small as u8]),
        large => long(out, large),
    }
    Ok(())
}

pub fn long(out: &mut Vec<u8>, number: u64) {
    out.extend([0x8a, 8]);
    out.extend(number.to_le_bytes());
}

fn hooks(out: &mut Vec<u8>) {
    global(out, ("collections", "OrderedDict"));
    out.extend_from_slice(b")R");
}

pub fn global(out: &mut Vec<u8>, (module, name): (&str, &str)) {
    out.push(b'c');
    line(out, module);
    line(out, name);
}

fn line(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
    out.push(b'\n');
}

pub fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}
