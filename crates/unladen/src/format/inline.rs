//! Finds the bytes of tensors that stand inside a pickle: whole legacy files in strings (`pickle.dump` of a tensor), and
//! arrays of NumPy. Where they stand in the file as they are, they become storages there; nothing is copied.

use super::{
    Limits,
    given::{Given, GivenTensor},
    legacy,
    persistent::text,
    pickle::{Arena, Call, Meaning, Value, Wide},
    rebuild::{StorageRef, unsigned},
    tree::MAX_WARNINGS,
};
use crate::{
    checkpoint::Warning,
    dtype::DType,
    error::{Fault, Result},
    source::ReadAt,
    tensor::{Dims, FileId, Layout, Storage, StorageId},
};
use foldhash::{HashMap, HashMapExt as _, HashSet};
use std::ops::Range;

/// NumPy's names of element types.
const NUMPY_DTYPES: &[(&str, DType)] = &[
    ("f8", DType::F64),
    ("f4", DType::F32),
    ("f2", DType::F16),
    ("i8", DType::I64),
    ("i4", DType::I32),
    ("i2", DType::I16),
    ("i1", DType::I8),
    ("u8", DType::U64),
    ("u4", DType::U32),
    ("u2", DType::U16),
    ("u1", DType::U8),
    ("b1", DType::Bool),
    ("c16", DType::C128),
    ("c8", DType::C64),
];

/// Why bytes are not where they could be read.
const LATIN_1: &str = "bytes written as Latin-1 text (pickle protocol 0 to 2)";
const RESAVE: &str = "save it again with torch.save, or with pickle protocol 4";

/// Where the bytes of a string are.
enum Bytes {
    /// In the file, as they are.
    InFile(Range<u64>),
    /// In the file as text, a character for each.
    Latin1,
    /// Nowhere in the file as they are.
    Nowhere,
}

/// An array's element type, and whether its bytes stand in the other order.
struct Elements {
    dtype: DType,
    swapped: bool,
}

/// What is to be found inside a pickle.
#[derive(Clone, Copy)]
pub(super) struct Inside<'s> {
    /// The file in which the pickle stands as it is; `None` if it does not, so that nothing in it can be read in place.
    pub(super) source: Option<&'s dyn ReadAt>,
    /// Arrays are what the pickle is about. Beside tensors of PyTorch they are something else: states of random numbers,
    /// losses.
    pub(super) lists_arrays: bool,
}

impl<'s> Inside<'s> {
    /// Tensors of PyTorch alone.
    pub(super) fn of(source: Option<&'s dyn ReadAt>) -> Inside<'s> {
        Inside { source, lists_arrays: false }
    }
}

/// Finds the tensors inside a pickle, adds their storages to `storages`, and says which call stands for which.
///
/// Fails if a string that stands for a storage does not hold one, or an array is not as long as its shape says.
pub(super) fn find(
    arena: &Arena<'_>,
    inside: Inside<'_>,
    storages: &mut Vec<Storage>,
    limits: &Limits,
    warnings: &mut Vec<Warning>,
) -> Result<Given> {
    let Inside { source, lists_arrays } = inside;
    let mut given = Given::default();
    let of_tensor = |call: &Call| match *arena.run(call.args) {
        [Value::Call(array), ..] if arena.meaning(call.function) == Meaning::FromNumpy => Some(array),
        _ => None,
    };
    let tensors: HashSet<u32> = arena.calls.iter().filter_map(of_tensor).collect();
    // Several calls may share a string; it is read once.
    let mut by_start: HashMap<u64, StorageRef> = HashMap::new();
    for (number, call) in arena.calls.iter().enumerate() {
        let number = number as u32;
        let args = arena.run(call.args);
        match arena.meaning(call.function) {
            Meaning::LoadFromBytes => {
                let &[bytes] = args else { continue };
                let range = in_file(arena, source, bytes)?;
                let (Some(source), start_byte) = (source, range.start) else { continue };
                let storage = match by_start.get(&start_byte) {
                    Some(storage) => *storage,
                    None => {
                        let (storage, dtype) = legacy::storage_inside(source, range, limits)?;
                        let storage = StorageRef { id: add(storages, storage), dtype };
                        by_start.insert(start_byte, storage);
                        storage
                    }
                };
                given.storages.insert(number, storage);
            }
            meaning @ (Meaning::NumpyArray | Meaning::NumpyBuffer) => {
                let parts =
                    if meaning == Meaning::NumpyArray { of_state(arena, call.state) } else { of_args(args) };
                let Some(parts) = parts else { continue };
                if !lists_arrays && !tensors.contains(&number) {
                    given.left_out.insert(number, "an array of NumPy, no tensor".to_owned());
                    continue;
                }
                match array(arena, source, &parts)? {
                    Ok((layout, storage)) => {
                        let storage = Some(add(storages, storage));
                        given.arrays.insert(number, GivenTensor { layout, storage });
                    }
                    Err(reason) => drop(given.left_out.insert(number, reason)),
                }
            }
            _ => {}
        }
    }
    warn_of_casts(arena, &given, warnings);
    Ok(given)
}

fn add(storages: &mut Vec<Storage>, storage: Storage) -> StorageId {
    storages.push(storage);
    StorageId(storages.len() as u32 - 1)
}

/// What an array is made of, as NumPy pickles it.
struct ArrayParts {
    shape: Value,
    dtype: Value,
    /// Says whether its elements stand column after column.
    order: Value,
    bytes: Value,
}

/// (version, shape, dtype, is column-major, bytes), without the version in the oldest files.
fn of_state(arena: &Arena<'_>, state: Value) -> Option<ArrayParts> {
    match *arena.sequence(state)? {
        [_, shape, dtype, order, bytes] | [shape, dtype, order, bytes] => {
            Some(ArrayParts { shape, dtype, order, bytes })
        }
        _ => None,
    }
}

/// (bytes, dtype, shape, order), and the order of the axes, where there is one.
fn of_args(args: &[Value]) -> Option<ArrayParts> {
    match *args {
        [bytes, dtype, shape, order] | [bytes, dtype, shape, order, Value::None] => {
            Some(ArrayParts { shape, dtype, order, bytes })
        }
        _ => None,
    }
}

/// An array's layout and storage, or why it is not read.
fn array(
    arena: &Arena<'_>,
    source: Option<&dyn ReadAt>,
    parts: &ArrayParts,
) -> Result<Result<(Layout, Storage), String>> {
    let Some(Elements { dtype, swapped }) = elements(arena, parts.dtype) else {
        return Ok(Err("its elements are no numbers of PyTorch".to_owned()));
    };
    let is_fortran = match parts.order {
        Value::Bool(is_fortran) => is_fortran,
        Value::Int(Wide(number)) => number != 0,
        order => match text(arena, order) {
            Some(b"C") => false,
            Some(b"F") => true,
            _ => return Ok(Err("the order of its elements is not known".to_owned())),
        },
    };
    let range = match (bytes(arena, parts.bytes), source) {
        (Bytes::InFile(range), Some(_)) => range,
        (Bytes::InFile(_), None) => return Ok(Err("its bytes are packed".to_owned())),
        (Bytes::Latin1, _) => return Ok(Err(format!("{LATIN_1}; {RESAVE}"))),
        (Bytes::Nowhere, _) => return Ok(Err("its bytes do not stand in the file as they are".to_owned())),
    };
    let shape = arena.sequence(parts.shape).unwrap_or_default();
    let shape = shape.iter().map(|&it| unsigned(it)).collect::<Result<Dims>>()?;
    let layout = Layout::contiguous(dtype, &shape)?;
    let len_bytes = range.end - range.start;
    if layout.len_bytes() != len_bytes {
        let expected = format!("an array of {shape:?} {dtype}, {} bytes", layout.len_bytes());
        return Err(Fault::new(expected, format!("{len_bytes} bytes")).at(range.start).corrupt());
    }
    let layout = if is_fortran { column_major(dtype, &shape)? } else { layout };
    Ok(Ok((layout, Storage { file: FileId(0), start_byte: range.start, len_bytes, swapped })))
}

fn column_major(dtype: DType, shape: &[u64]) -> Result<Layout> {
    let reversed: Dims = shape.iter().rev().copied().collect();
    let row_major = Layout::contiguous(dtype, &reversed)?;
    let stride: Dims = row_major.stride().iter().rev().copied().collect();
    Layout::strided(dtype, shape, &stride, 0)
}

/// What `numpy.dtype` stands for: its name, and in its state (version, byte order, ..). `None` for structures, text and
/// objects.
fn elements(arena: &Arena<'_>, dtype: Value) -> Option<Elements> {
    let Value::Call(call) = dtype else { return None };
    let call = &arena.calls[call as usize];
    let name = *arena.run(call.args).first()?;
    if arena.meaning(call.function) != Meaning::NumpyDType {
        return None;
    }
    let name = std::str::from_utf8(text(arena, name)?).ok()?;
    let (_, dtype) = *NUMPY_DTYPES.iter().find(|(known, _)| *known == name)?;
    let swapped = match (call.state, arena.sequence(call.state)) {
        (Value::None, _) => false,
        (_, Some(&[_, order, ..])) => match text(arena, order)? {
            b"<" | b"|" | b"=" => false,
            b">" => true,
            _ => return None,
        },
        _ => return None,
    };
    Some(Elements { dtype, swapped })
}

/// The place of a string that must be read in place.
fn in_file(arena: &Arena<'_>, source: Option<&dyn ReadAt>, value: Value) -> Result<Range<u64>> {
    let found = match (bytes(arena, value), source) {
        (Bytes::InFile(range), Some(_)) => return Ok(range),
        (Bytes::InFile(_), None) => "bytes in a packed pickle",
        (Bytes::Latin1, _) => LATIN_1,
        (Bytes::Nowhere, _) => "none that stand in the file as they are",
    };
    Err(Fault::new("a storage's bytes inside the pickle", found).hint(RESAVE).unsupported())
}

/// Where the bytes are that a value stands for.
fn bytes(arena: &Arena<'_>, value: Value) -> Bytes {
    match value {
        Value::Bytes(text) => arena.place_in_file(text).map_or(Bytes::Nowhere, Bytes::InFile),
        Value::Blob(hole) => {
            let hole = &arena.holes[hole as usize];
            let range = hole.start_byte..hole.start_byte + hole.len_bytes;
            if hole.is_text { Bytes::Latin1 } else { Bytes::InFile(range) }
        }
        Value::Call(call) => {
            let call = &arena.calls[call as usize];
            match (arena.meaning(call.function), arena.run(call.args)) {
                (
                    Meaning::Encode | Meaning::ByteArray,
                    &[Value::Str(_) | Value::Blob(_), Value::Str(_) | Value::Bytes(_)],
                ) => Bytes::Latin1,
                (Meaning::ByteArray, []) => Bytes::InFile(0..0),
                // Not further: it could go on for ever.
                (Meaning::ByteArray, &[inner @ (Value::Bytes(_) | Value::Blob(_))]) => bytes(arena, inner),
                _ => Bytes::Nowhere,
            }
        }
        _ => Bytes::Nowhere,
    }
}

/// Tensors that were written as arrays of another type (bfloat16 has none in NumPy) are listed as they stand.
fn warn_of_casts(arena: &Arena<'_>, given: &Given, warnings: &mut Vec<Warning>) {
    for call in arena.calls.iter().filter(|it| arena.meaning(it.function) == Meaning::FromNumpy) {
        let &[Value::Call(array), dtype, ..] = arena.run(call.args) else { continue };
        if let (Some(array), Meaning::DType(dtype)) = (given.arrays.get(&array), arena.meaning(dtype))
            && array.layout.dtype() != dtype
            && warnings.len() < MAX_WARNINGS
        {
            let stored = array.layout.dtype();
            let what = format!("the cast of a tensor to {dtype}: it is listed as it is stored, {stored}");
            warnings.push(Warning::LeftOut(what));
        }
    }
}
