//! Numbers and small arrays of NumPy, as the values that they are: the epochs and losses of real checkpoints are such.
//! What does not fit together is left to be shown as it stands.

use crate::{
    dtype::DType,
    error::Result,
    format::{
        inline::{ArrayParts, Elements, elements, is_column_major, of_args, of_state},
        pickle::{Arena, Call, Meaning, Value},
        rebuild::{Visits, unsigned},
    },
    tensor::{Dims, Layout},
};
use half::f16;
use std::{
    borrow::Cow,
    fmt::{Debug, Write as _},
};

/// Values of more bytes are not shown, however much is asked for: they are data, and their text is several times as long.
const MAX_SHOWN_BYTES: u64 = 64 << 10;
/// Bytes that cost as much as a visited value.
const BYTES_PER_VISIT: u64 = 8;
/// A byte of Latin-1 takes no more of them in UTF-8.
const MAX_BYTES_PER_LETTER: u64 = 2;

/// A number or an array.
pub(super) struct Numbers<'a> {
    dtype: DType,
    /// They stand in the other byte order.
    swapped: bool,
    /// `None`: one number.
    shape: Option<Dims>,
    /// The first axis is the one whose neighbours stand side by side.
    column_major: bool,
    len_bytes: u64,
    /// `None`: they are many, and stand in the file.
    bytes: Option<Cow<'a, [u8]>>,
}

/// What a call stands for, if it is a number or an array whose elements are numbers, and all it says is that.
pub(super) fn numbers<'a>(
    arena: &'a Arena<'a>,
    call: &Call,
    visits: &mut Visits,
) -> Result<Option<Numbers<'a>>> {
    let args = arena.run(call.args);
    if call.items != Value::None {
        return Ok(None);
    }
    let array = match (arena.meaning(call.function), args) {
        (Meaning::NumpyArray, &[class, ..]) if is_named(arena, class, &[b"numpy"], b"ndarray") => {
            of_state(arena, call.state)
        }
        (Meaning::NumpyBuffer, args) if call.state == Value::None => of_args(args),
        (_, &[dtype, bytes])
            if call.state == Value::None && is_named(arena, call.function, SCALAR, b"scalar") =>
        {
            return one(arena, dtype, bytes, visits);
        }
        _ => None,
    };
    array.map_or(Ok(None), |it| many(arena, &it, visits))
}

/// Where NumPy has had the function that makes a number.
const SCALAR: &[&[u8]] = &[b"numpy._core.multiarray", b"numpy.core.multiarray"];

fn is_named(arena: &Arena<'_>, symbol: Value, modules: &[&[u8]], name: &[u8]) -> bool {
    let Value::Symbol(symbol) = symbol else { return false };
    let symbol = &arena.symbols[symbol as usize];
    modules.contains(&symbol.module) && symbol.name == name
}

fn one<'a>(
    arena: &'a Arena<'a>,
    dtype: Value,
    bytes: Value,
    visits: &mut Visits,
) -> Result<Option<Numbers<'a>>> {
    let Some(Elements { dtype, swapped }) = elements(arena, dtype) else { return Ok(None) };
    let len_bytes = dtype.size_bytes();
    let bytes = held(arena, bytes, len_bytes, visits)?;
    let numbers =
        |bytes| Numbers { dtype, swapped, shape: None, column_major: false, len_bytes, bytes: Some(bytes) };
    Ok(bytes.flatten().map(numbers))
}

fn many<'a>(arena: &'a Arena<'a>, parts: &ArrayParts, visits: &mut Visits) -> Result<Option<Numbers<'a>>> {
    let (Some(Elements { dtype, swapped }), Some(column_major), Some(sizes)) =
        (elements(arena, parts.dtype), is_column_major(arena, parts.order), arena.sequence(parts.shape))
    else {
        return Ok(None);
    };
    visits.spend(sizes.len() as u64)?;
    let Ok(shape) = sizes.iter().map(|&it| unsigned(it)).collect::<Result<Dims>>() else { return Ok(None) };
    let Ok(layout) = Layout::contiguous(dtype, &shape) else { return Ok(None) };
    let len_bytes = layout.len_bytes();
    let bytes = held(arena, parts.bytes, len_bytes, visits)?;
    Ok(bytes.map(|bytes| Numbers { dtype, swapped, shape: Some(shape), column_major, len_bytes, bytes }))
}

/// The bytes that a value stands for, if they are as many: `Some(None)` for those that were left in the file.
fn held<'a>(
    arena: &'a Arena<'a>,
    value: Value,
    len_bytes: u64,
    visits: &mut Visits,
) -> Result<Option<Option<Cow<'a, [u8]>>>> {
    let bytes = match value {
        Value::Bytes(text) => Cow::Borrowed(arena.bytes(text)),
        Value::Blob(hole) => {
            let hole = &arena.holes[hole as usize];
            return Ok((!hole.is_text && hole.len_bytes == len_bytes).then_some(None));
        }
        Value::Call(number) => {
            let call = &arena.calls[number as usize];
            match (arena.meaning(call.function), arena.run(call.args)) {
                (Meaning::Encode, &[Value::Str(letters), _]) => {
                    let letters_bytes = arena.bytes(letters).len() as u64;
                    visits.spend(letters_bytes / BYTES_PER_VISIT)?;
                    if letters_bytes > len_bytes.saturating_mul(MAX_BYTES_PER_LETTER) {
                        return Ok(None);
                    }
                    if len_bytes > MAX_SHOWN_BYTES {
                        return Ok((letters_bytes >= len_bytes).then_some(None));
                    }
                }
                // How many bytes it is cannot be told from its length.
                (Meaning::Encode, &[Value::Blob(hole), _]) => {
                    let hole = &arena.holes[hole as usize];
                    let may_be = len_bytes..=len_bytes.saturating_mul(MAX_BYTES_PER_LETTER);
                    return Ok((hole.is_text && may_be.contains(&hole.len_bytes)).then_some(None));
                }
                (Meaning::ByteArray, &[inner @ (Value::Bytes(_) | Value::Blob(_))]) => {
                    return held(arena, inner, len_bytes, visits);
                }
                _ => {}
            }
            match arena.encoded(value) {
                Some(bytes) => Cow::Owned(bytes),
                None => return Ok(None),
            }
        }
        _ => return Ok(None),
    };
    Ok((bytes.len() as u64 == len_bytes).then_some(Some(bytes)))
}

impl Numbers<'_> {
    /// `np.float32(1.5)`, `np.array int64 [2, 2]: [[1, 2], [3, 4]]`; of many, how many bytes they are.
    pub(super) fn text(&self, max_items: usize, text: &mut String) {
        let name = self.dtype.name();
        let shown = self.shown(max_items);
        // Writing to a string cannot fail.
        let _ = match (&self.shape, shown) {
            (None, _) => write!(text, "np.{name}("),
            (Some(shape), true) => write!(text, "np.array {name} {shape:?}: "),
            (Some(shape), false) => write!(text, "np.array {name} {shape:?}, {} bytes", self.len_bytes),
        };
        if shown {
            self.values(", ", text, Self::value_text);
        }
        text.push_str(if self.shape.is_none() { ")" } else { "" });
    }

    /// `{"$numpy":"float32","value":1.5}`, `{"$numpy":"int64","shape":[2],"values":[1,2]}`; of many without the values.
    pub(super) fn json(&self, max_items: usize, text: &mut String) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{{\"$numpy\":\"{}\"", self.dtype.name());
        if let Some(shape) = &self.shape {
            let sizes: Vec<String> = shape.iter().map(u64::to_string).collect();
            let _ = write!(text, ",\"shape\":[{}]", sizes.join(","));
        }
        if self.shown(max_items) {
            text.push_str(if self.shape.is_none() { ",\"value\":" } else { ",\"values\":" });
            self.values(",", text, Self::value_json);
        }
        text.push('}');
    }

    /// True if the values are at hand and few.
    fn shown(&self, max_items: usize) -> bool {
        let n_elems = self.len_bytes / self.dtype.size_bytes();
        self.bytes.is_some() && n_elems <= max_items as u64 && self.len_bytes <= MAX_SHOWN_BYTES
    }

    /// The values in the order of their indices, in brackets for each axis.
    fn values(&self, between: &str, text: &mut String, write: impl Fn(&Self, u128, &mut String)) {
        let Some(bytes) = &self.bytes else { return };
        let (shape, size_bytes) =
            (self.shape.as_deref().unwrap_or_default(), self.dtype.size_bytes() as usize);
        let n_elems = bytes.len() / size_bytes;
        if n_elems == 0 {
            text.push_str("[]");
        }
        // How many axes begin, or end, at an element.
        let n_edges = |number: usize| {
            let mut block = 1;
            shape.iter().rev().map_while(move |&len| {
                block *= len as usize;
                number.is_multiple_of(block).then_some(())
            })
        };
        for number in 0..n_elems {
            text.push_str(if number > 0 { between } else { "" });
            n_edges(number).for_each(|()| text.push('['));
            let start = self.position(number, n_elems) * size_bytes;
            let mut element = [0; 16];
            element[..size_bytes].copy_from_slice(&bytes[start..start + size_bytes]);
            if self.swapped {
                element[..size_bytes].chunks_exact_mut(self.dtype.swap_bytes()).for_each(<[u8]>::reverse);
            }
            write(self, u128::from_le_bytes(element), text);
            n_edges(number + 1).for_each(|()| text.push(']'));
        }
    }

    /// Where an element stands.
    fn position(&self, number: usize, n_elems: usize) -> usize {
        let Some(shape) = self.shape.as_ref().filter(|_| self.column_major) else { return number };
        let (mut rest, mut stride, mut position) = (number, n_elems, 0);
        for &len in shape.iter().rev() {
            let len = len as usize;
            stride /= len;
            position += rest % len * stride;
            rest /= len;
        }
        position
    }

    fn value_text(&self, bits: u128, text: &mut String) {
        // Writing to a string cannot fail.
        let _ = match self.value(bits) {
            Number::Bool(truth) => write!(text, "{}", if truth { "True" } else { "False" }),
            Number::Int(number) => write!(text, "{number}"),
            Number::Float(number) => write!(text, "{}", number.word),
            Number::Complex(real, imaginary) => {
                let sign = if imaginary.word.starts_with('-') { "" } else { "+" };
                write!(text, "{}{sign}{}j", real.word, imaginary.word)
            }
        };
    }

    fn value_json(&self, bits: u128, text: &mut String) {
        // Writing to a string cannot fail.
        let _ = match self.value(bits) {
            Number::Bool(truth) => write!(text, "{truth}"),
            Number::Int(number) => write!(text, "{number}"),
            Number::Float(number) => write!(text, "{}", number.json()),
            Number::Complex(real, imaginary) => write!(text, "[{},{}]", real.json(), imaginary.json()),
        };
    }

    /// The low bits of a number that are its own.
    fn value(&self, bits: u128) -> Number {
        let single = |bits: u128| Digits::new(f32::from_bits(bits as u32));
        let double = |bits: u128| Digits::new(f64::from_bits(bits as u64));
        match self.dtype {
            DType::Bool => Number::Bool(bits != 0),
            DType::I8 => Number::Int(i128::from(bits as i8)),
            DType::I16 => Number::Int(i128::from(bits as i16)),
            DType::I32 => Number::Int(i128::from(bits as i32)),
            DType::I64 => Number::Int(i128::from(bits as i64)),
            DType::F16 => Number::Float(Digits::new(f16::from_bits(bits as u16).to_f32())),
            DType::F32 => Number::Float(single(bits)),
            DType::F64 => Number::Float(double(bits)),
            DType::C64 => Number::Complex(single(bits), single(bits >> 32)),
            DType::C128 => Number::Complex(double(bits), double(bits >> 64)),
            // What is left of NumPy's types are numbers without a sign.
            _ => Number::Int(i128::from(bits as u64)),
        }
    }
}

enum Number {
    Bool(bool),
    Int(i128),
    Float(Digits),
    Complex(Digits, Digits),
}

/// The shortest digits that give the same number again, in its own type.
struct Digits {
    word: String,
    is_finite: bool,
}

impl Digits {
    fn new(number: impl Debug + Copy + Into<f64>) -> Digits {
        let wide: f64 = number.into();
        // Rust's word for it has capitals.
        let word = if wide.is_nan() { "nan".to_owned() } else { format!("{number:?}") };
        Digits { word, is_finite: wide.is_finite() }
    }

    fn json(&self) -> String {
        if self.is_finite { self.word.clone() } else { format!("{{\"$float\":\"{}\"}}", self.word) }
    }
}
