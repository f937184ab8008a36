//! Finds the bytes of tensors that stand inside a pickle: whole legacy files in strings (`pickle.dump` of a tensor), and
//! arrays of NumPy. Where they stand in the file as they are, they become storages there; where they stand as text, storages
//! of files of their own. Nothing is copied.

use super::{
    Limits,
    given::{Given, GivenTensor},
    latin1::{self, Letters, TextFiles},
    legacy,
    persistent::text,
    pickle::{Arena, Call, Meaning, Value, Wide},
    rebuild::{StorageRef, unsigned},
    tree::MAX_WARNINGS,
    window::Window,
};
use crate::{
    checkpoint::Warning,
    dtype::DType,
    error::{Fault, Result},
    source::ReadAt,
    stamp::FileStamp,
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

/// What helps where bytes cannot be read.
const RESAVE: &str = "save it again with torch.save, or with pickle protocol 4";

/// Where the bytes of a string are.
enum Place {
    /// In the file, as they are.
    InFile(Range<u64>),
    /// In the file as text, a character for each.
    Latin1(Letters),
}

/// An array's element type, and whether its bytes stand in the other order.
pub(super) struct Elements {
    pub(super) dtype: DType,
    pub(super) swapped: bool,
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

/// Finds the tensors inside a pickle, adds their storages to `storages`, and says which call stands for which. `files` starts
/// with the pickle's; what stands in it as text comes behind.
///
/// Fails if a string that stands for a storage does not hold one, or an array is not as long as its shape says.
pub(super) fn find(
    arena: &Arena<'_>,
    inside: Inside<'_>,
    files: &mut Vec<FileStamp>,
    storages: &mut Vec<Storage>,
    limits: &Limits,
    warnings: &mut Vec<Warning>,
) -> Result<Given> {
    let Inside { source, lists_arrays } = inside;
    let mut given = Given::default();
    let mut texts = TextFiles::new(files);
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
                let (source, place) = place(arena, source, bytes).map_err(|found| {
                    Fault::new("a storage's bytes inside the pickle", found).hint(RESAVE).unsupported()
                })?;
                let start_byte = match &place {
                    Place::InFile(range) => range.start,
                    Place::Latin1(letters) => letters.start_byte(),
                };
                let storage = match by_start.get(&start_byte) {
                    Some(storage) => *storage,
                    None => {
                        let (storage, dtype) = match place {
                            Place::InFile(range) => storage_in_place(source, range, limits)?,
                            Place::Latin1(letters) => texts.storage(source, &letters, limits)?,
                        };
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
                match array(arena, source, &parts, &mut texts)? {
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

/// The storage of a whole legacy file in a string, where it stands.
fn storage_in_place(
    source: &dyn ReadAt,
    range: Range<u64>,
    limits: &Limits,
) -> Result<(Storage, Option<DType>)> {
    let end_byte = range.end;
    let inside = legacy::storage_inside(&mut Window::new(source, range), end_byte, limits)?;
    Ok((inside.storage, inside.dtype))
}

fn add(storages: &mut Vec<Storage>, storage: Storage) -> StorageId {
    storages.push(storage);
    StorageId(storages.len() as u32 - 1)
}

/// What an array is made of, as NumPy pickles it.
pub(super) struct ArrayParts {
    pub(super) shape: Value,
    pub(super) dtype: Value,
    /// Says whether its elements stand column after column.
    pub(super) order: Value,
    pub(super) bytes: Value,
}

/// (version, shape, dtype, is column-major, bytes), without the version in the oldest files.
pub(super) fn of_state(arena: &Arena<'_>, state: Value) -> Option<ArrayParts> {
    match *arena.sequence(state)? {
        [_, shape, dtype, order, bytes] | [shape, dtype, order, bytes] => {
            Some(ArrayParts { shape, dtype, order, bytes })
        }
        _ => None,
    }
}

/// (bytes, dtype, shape, order), and the order of the axes, where there is one.
pub(super) fn of_args(args: &[Value]) -> Option<ArrayParts> {
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
    texts: &mut TextFiles<'_>,
) -> Result<Result<(Layout, Storage), String>> {
    let Some(Elements { dtype, swapped }) = elements(arena, parts.dtype) else {
        return Ok(Err("its elements are no numbers of PyTorch".to_owned()));
    };
    let Some(is_fortran) = is_column_major(arena, parts.order) else {
        return Ok(Err("the order of its elements is not known".to_owned()));
    };
    let place = match place(arena, source, parts.bytes) {
        Ok((_, place)) => place,
        Err(found) => return Ok(Err(format!("it is {found}; {RESAVE}"))),
    };
    let shape = arena.sequence(parts.shape).unwrap_or_default();
    let shape = shape.iter().map(|&it| unsigned(it)).collect::<Result<Dims>>()?;
    let layout = Layout::contiguous(dtype, &shape)?;
    let len_bytes = layout.len_bytes();
    let (file, start_byte) = match place {
        Place::InFile(range) if range.end - range.start != len_bytes => {
            let expected = format!("an array of {shape:?} {dtype}, {len_bytes} bytes");
            let found = format!("{} bytes", range.end - range.start);
            return Err(Fault::new(expected, found).at(range.start).corrupt());
        }
        Place::InFile(range) => (FileId(0), range.start),
        Place::Latin1(letters) => (texts.file(&letters, len_bytes)?, 0),
    };
    let layout = if is_fortran { column_major(dtype, &shape)? } else { layout };
    Ok(Ok((layout, Storage { file, start_byte, len_bytes, swapped })))
}

/// True if elements stand column after column, by what an array says of their order; `None`: in some other order.
pub(super) fn is_column_major(arena: &Arena<'_>, order: Value) -> Option<bool> {
    match order {
        Value::Bool(is_fortran) => Some(is_fortran),
        Value::Int(Wide(number)) => Some(number != 0),
        order => match text(arena, order)? {
            b"C" => Some(false),
            b"F" => Some(true),
            _ => None,
        },
    }
}

fn column_major(dtype: DType, shape: &[u64]) -> Result<Layout> {
    let reversed: Dims = shape.iter().rev().copied().collect();
    let row_major = Layout::contiguous(dtype, &reversed)?;
    let stride: Dims = row_major.stride().iter().rev().copied().collect();
    Layout::strided(dtype, shape, &stride, 0)
}

/// What `numpy.dtype` stands for: its name, and in its state (version, byte order, ..). `None` for structures, text and
/// objects.
pub(super) fn elements(arena: &Arena<'_>, dtype: Value) -> Option<Elements> {
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

/// Where the bytes are that a value stands for, and the file in which that is; or what they are instead.
fn place<'s>(
    arena: &Arena<'_>,
    source: Option<&'s dyn ReadAt>,
    value: Value,
) -> std::result::Result<(&'s dyn ReadAt, Place), &'static str> {
    let place = bytes(arena, value).ok_or("bytes that do not stand in the file as they are")?;
    Ok((source.ok_or("bytes in a packed pickle")?, place))
}

/// Where the bytes stand that a value is made of; `None`: nowhere in a way that could be read.
fn bytes(arena: &Arena<'_>, value: Value) -> Option<Place> {
    match value {
        Value::Bytes(text) => arena.place_in_file(text).map(Place::InFile),
        Value::Blob(hole) => {
            let hole = &arena.holes[hole as usize];
            let range = hole.start_byte..hole.start_byte + hole.len_bytes;
            (!hole.is_text).then_some(Place::InFile(range))
        }
        Value::Call(call) => {
            let call = &arena.calls[call as usize];
            match (arena.meaning(call.function), arena.run(call.args)) {
                (Meaning::Encode | Meaning::ByteArray, &[letters, encoding]) => {
                    let is_latin1 = text(arena, encoding).is_some_and(latin1::is_name);
                    is_latin1.then(|| in_latin1(arena, letters))?
                }
                (Meaning::ByteArray, []) => Some(Place::InFile(0..0)),
                // Not further: it could go on for ever.
                (Meaning::ByteArray, &[inner @ (Value::Bytes(_) | Value::Blob(_))]) => bytes(arena, inner),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Where text stands that is encoded as Latin-1.
fn in_latin1(arena: &Arena<'_>, letters: Value) -> Option<Place> {
    match letters {
        Value::Str(text) => {
            let range = arena.place_in_file(text)?;
            // Nothing is nothing in every encoding.
            let is_empty = range.is_empty();
            Some(if is_empty {
                Place::InFile(range)
            } else {
                Place::Latin1(Letters::held(range, arena.bytes(text)))
            })
        }
        Value::Blob(hole) => {
            let hole = &arena.holes[hole as usize];
            let range = hole.start_byte..hole.start_byte + hole.len_bytes;
            hole.is_text.then(|| Place::Latin1(Letters::in_file(range)))
        }
        _ => None,
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
