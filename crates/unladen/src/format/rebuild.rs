//! Turns the calls by which PyTorch rebuilds tensors into layouts on storages, with every claim checked. What is made of
//! several tensors is put together in `composite`.

mod composite;

use super::{
    given::Given,
    pickle::{Arena, Meaning, Run, Value, Wide},
};
use crate::{
    dtype::DType,
    error::{Fault, Result},
    tensor::{Dims, Layout, Storage, StorageId},
};
pub(super) use composite::{Named, Whole};
use smallvec::SmallVec;

/// How many values a file may make us look at: no more than this, and a multiple of its pickle's length. A file whose
/// objects refer to each other many times over stands for more values than anybody can list.
const FREE_VISITS: u64 = 100_000;
const VISITS_PER_BYTE: u64 = 16;

/// Counts down the values that are looked at.
pub(super) struct Visits(u64);

impl Visits {
    pub(super) fn new(pickle_bytes: usize) -> Visits {
        Visits(FREE_VISITS + VISITS_PER_BYTE * pickle_bytes as u64)
    }

    pub(super) fn spend(&mut self, visits: u64) -> Result<()> {
        match self.0.checked_sub(visits) {
            Some(left) => {
                self.0 = left;
                Ok(())
            }
            None => {
                Err(Fault::new("objects that refer to each other a few times", "a file that multiplies them")
                    .hint("the file looks made to exhaust memory; do not trust it")
                    .unsupported())
            }
        }
    }
}

/// A storage as a persistent id names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct StorageRef {
    pub(super) id: StorageId,
    /// `None`: untyped bytes.
    pub(super) dtype: Option<DType>,
}

/// What is to be looked at besides, or instead of, a tensor.
pub(super) type Parts = SmallVec<[Value; 3]>;

/// A plain tensor.
#[derive(Debug)]
pub(super) struct View {
    pub(super) layout: Layout,
    /// `None`: it has no data.
    pub(super) storage: Option<StorageId>,
    /// The type that PyTorch would cast it to, if that is another one.
    pub(super) cast: Option<DType>,
    /// Why it cannot be listed, if it cannot.
    pub(super) left_out: Option<&'static str>,
}

/// What a call stands for.
#[derive(Debug)]
pub(super) enum Rebuilt {
    Tensor(View),
    /// What is made of several tensors.
    Composite(Box<Whole>),
    /// A storage by itself.
    Storage,
    /// A tensor that cannot be listed, and why.
    LeftOut(&'static str),
    /// Something else.
    Other,
}

/// What is behind parameters and subclasses.
enum Unwrapped {
    Tensor(View),
    /// A function that makes one of several tensors, and its arguments.
    Composite(Meaning, Run),
    /// A storage by itself.
    Storage,
    Other,
}

/// The storages that calls refer to.
pub(super) struct Rebuild<'a> {
    pub(super) arena: &'a Arena<'a>,
    pub(super) storages: &'a [Storage],
    /// By position in [`Arena::persistent`].
    pub(super) refs: &'a [StorageRef],
    /// Tensors and storages that stand elsewhere, or inside the pickle.
    pub(super) given: &'a Given,
}

impl Rebuild<'_> {
    /// What a call stands for, parameters and subclasses looked through; attributes go to `parts`, and so do the arguments
    /// if it is no tensor.
    pub(super) fn call(&self, call: u32, visits: &mut Visits, parts: &mut Parts) -> Result<Rebuilt> {
        match self.unwrap(call, visits, parts)? {
            Unwrapped::Tensor(View { left_out: Some(reason), .. }) => Ok(Rebuilt::LeftOut(reason)),
            Unwrapped::Tensor(view) => Ok(Rebuilt::Tensor(view)),
            Unwrapped::Composite(meaning, args) => {
                let whole = self.composite(meaning, self.arena.run(args), visits, parts)?;
                let left_out = whole.own.as_ref().and_then(|it| it.left_out);
                Ok(left_out.map_or_else(|| Rebuilt::Composite(Box::new(whole)), Rebuilt::LeftOut))
            }
            Unwrapped::Storage => Ok(Rebuilt::Storage),
            Unwrapped::Other => Ok(Rebuilt::Other),
        }
    }

    fn unwrap(&self, mut number: u32, visits: &mut Visits, parts: &mut Parts) -> Result<Unwrapped> {
        let call = &self.arena.calls[number as usize];
        let (mut function, mut args_run) = (call.function, call.args);
        let (mut state, mut items) = (call.state, call.items);
        let mut cast = None;
        let tensor = |view: Result<View>, cast: Option<DType>| {
            let view = view?;
            let cast = cast.filter(|it| *it != view.layout.dtype());
            Ok(Unwrapped::Tensor(View { cast, ..view }))
        };
        loop {
            visits.spend(1)?;
            if let Some(array) = self.given.arrays.get(&number) {
                return tensor(Ok(array.view()), cast);
            }
            let args = self.arena.run(args_run);
            let inner = match (self.arena.meaning(function), args) {
                (Meaning::Tensor, &[storage, offset, size, stride])
                | (Meaning::TensorV2, &[storage, offset, size, stride, _, _]) => {
                    return tensor(self.view(storage, offset, size, stride, None), cast);
                }
                (Meaning::TensorV2, &[storage, offset, size, stride, _, _, flags]) => {
                    let view = self.view(storage, offset, size, stride, None)?;
                    // Tensors may share one long dictionary.
                    visits.spend(self.arena.n_items(flags))?;
                    return tensor(view.flagged(self.arena, flags), cast);
                }
                (Meaning::TensorV3, &[storage, offset, size, stride, _, _, dtype]) => {
                    return tensor(self.view(storage, offset, size, stride, Some(dtype)), cast);
                }
                (Meaning::TensorV3, &[storage, offset, size, stride, _, _, dtype, flags]) => {
                    let view = self.view(storage, offset, size, stride, Some(dtype))?;
                    // Tensors may share one long dictionary.
                    visits.spend(self.arena.n_items(flags))?;
                    return tensor(view.flagged(self.arena, flags), cast);
                }
                (
                    meaning @ (Meaning::Quantised
                    | Meaning::Sparse
                    | Meaning::Nested
                    | Meaning::Jagged
                    | Meaning::Wrapper),
                    _,
                ) => {
                    parts.extend([items, state]);
                    if meaning == Meaning::Wrapper {
                        parts.insert(0, Value::Tuple(args_run));
                    }
                    return Ok(Unwrapped::Composite(meaning, args_run));
                }
                (Meaning::OldTensor(dtype), _) => return tensor(self.old_tensor(dtype, state), cast),
                (Meaning::Meta, &[dtype, size, stride, ..]) => {
                    let layout =
                        Layout::strided(self.dtype(dtype)?, &self.dims(size)?, &self.dims(stride)?, 0)?;
                    return tensor(Ok(View::new(layout, None)), cast);
                }
                (Meaning::LoadFromBytes, _) => return Ok(Unwrapped::Storage),
                (Meaning::FromNumpy, &[Value::Call(array), ..]) => match self.given.arrays.get(&array) {
                    Some(array) => return tensor(Ok(array.view()), cast),
                    None => {
                        let reason = self.given.left_out.get(&array).cloned();
                        let found = reason.unwrap_or_else(|| "another object".to_owned());
                        return Err(Fault::new("a tensor in an array of NumPy", found).unsupported());
                    }
                },
                (Meaning::Parameter, &[inner, _, _]) => inner,
                (Meaning::ParameterWithState, &[inner, _, _, state]) => {
                    parts.push(state);
                    inner
                }
                (Meaning::FromCpuTensor, &[inner, dtype, _, _]) => {
                    // The outermost cast is the one that counts.
                    cast = cast.or(Some(self.dtype(dtype)?));
                    inner
                }
                (Meaning::ParameterClass, args) => match (state, args) {
                    (Value::Tuple(run), _) if run.len > 0 => self.arena.run(run)[0],
                    (Value::None, &[inner, ..]) => inner,
                    _ => return Err(malformed("the state of a parameter", state)),
                },
                (Meaning::FromType, &[inner, _, Value::Tuple(inner_args), attributes]) => {
                    parts.extend([attributes, state, items]);
                    (function, args_run, state, items) = (inner, inner_args, Value::None, Value::None);
                    continue;
                }
                (meaning, _) if meaning.takes_no_state() || meaning == Meaning::FromType => {
                    return Err(
                        Fault::new("the arguments of a tensor", format!("{} others", args.len())).corrupt()
                    );
                }
                _ => {
                    // Arguments first: that is the order in which a class gets them.
                    parts.insert(0, Value::Tuple(args_run));
                    parts.extend([items, state]);
                    return Ok(Unwrapped::Other);
                }
            };
            let next = match inner {
                Value::Call(next) => next,
                Value::Storage(id) if let Some(given) = self.given.tensors.get(&id) => {
                    return tensor(Ok(given.view()), cast);
                }
                _ => return Err(malformed("a tensor", inner)),
            };
            number = next;
            let call = &self.arena.calls[next as usize];
            (function, args_run, state, items) = (call.function, call.args, call.state, call.items);
        }
    }

    /// What a persistent id stands for.
    pub(super) fn persistent(&self, id: u32) -> Rebuilt {
        self.given.tensors.get(&id).map_or(Rebuilt::Storage, |it| Rebuilt::Tensor(it.view()))
    }

    /// A number for a persistent id that no call has: they come behind the calls.
    pub(super) fn call_of_persistent(&self, id: u32) -> u32 {
        // Each takes bytes of a pickle whose places have 32 bits.
        self.arena.calls.len() as u32 + id
    }

    fn old_tensor(&self, dtype: DType, state: Value) -> Result<View> {
        match state {
            // Without a state it is an empty tensor.
            Value::None => {
                let layout = Layout::contiguous(dtype, &[0])?;
                Ok(View::new(layout, None))
            }
            Value::Tuple(run) => match *self.arena.run(run) {
                [storage, offset, size, stride] => self.view(storage, offset, size, stride, None),
                _ => Err(malformed("a storage, an offset, sizes and strides", state)),
            },
            _ => Err(malformed("a storage, an offset, sizes and strides", state)),
        }
    }

    /// A view of a storage; `dtype`: in the place of the storage's own.
    fn view(
        &self,
        storage: Value,
        offset: Value,
        size: Value,
        stride: Value,
        dtype: Option<Value>,
    ) -> Result<View> {
        let storage = match storage {
            Value::Storage(id) if !self.given.tensors.contains_key(&id) => self.refs[id as usize],
            Value::Call(call) => match self.given.storages.get(&call) {
                Some(storage) => *storage,
                None => return Err(malformed("a storage", Value::Call(call))),
            },
            _ => return Err(malformed("a storage", storage)),
        };
        let dtype = match (dtype, storage.dtype) {
            (Some(dtype), _) => self.dtype(dtype)?,
            (None, Some(dtype)) => dtype,
            (None, None) => return Err(Fault::new("a storage with a dtype", "an untyped one").corrupt()),
        };
        let layout = Layout::strided(dtype, &self.dims(size)?, &self.dims(stride)?, unsigned(offset)?)?;
        let len_bytes = self.storages[storage.id.0 as usize].len_bytes;
        if let Some(n_in_byte) = packed_in_byte(dtype) {
            return packed(&layout, n_in_byte, len_bytes, storage.id);
        }
        let end_byte = layout.stored_bytes().end;
        if end_byte > len_bytes {
            let expected = format!("a view of {len_bytes} bytes of storage");
            return Err(Fault::new(expected, format!("one that ends at byte {end_byte}")).corrupt());
        }
        Ok(View::new(layout, Some(storage.id)))
    }

    fn dtype(&self, value: Value) -> Result<DType> {
        match self.arena.meaning(value) {
            Meaning::DType(dtype) => Ok(dtype),
            _ => Err(malformed("a dtype", value)),
        }
    }

    fn dims(&self, value: Value) -> Result<Dims> {
        let Some(items) = self.arena.sequence(value) else {
            return Err(malformed("a tuple of sizes", value));
        };
        items.iter().map(|&it| unsigned(it)).collect()
    }
}

impl View {
    pub(super) fn new(layout: Layout, storage: Option<StorageId>) -> View {
        View { layout, storage, cast: None, left_out: None }
    }

    /// Applies what `conj` and `neg` in a tensor's metadata say.
    fn flagged(self, arena: &Arena<'_>, flags: Value) -> Result<View> {
        let dict = match flags {
            Value::None => return Ok(self),
            Value::Dict(dict) => dict,
            other => return Err(malformed("a tensor's metadata", other)),
        };
        let flag = |key| match arena.get(dict, key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(malformed("a flag of a tensor", other)),
        };
        let layout = self.layout.with_view(flag("conj")?, flag("neg")?);
        Ok(View { layout, ..self })
    }
}

/// A size, stride, offset or count: an integer, not negative; `True` is none.
pub(super) fn unsigned(value: Value) -> Result<u64> {
    match value {
        Value::Int(Wide(number)) => u64::try_from(number).ok(),
        _ => None,
    }
    .ok_or_else(|| malformed("an integer from 0 to 2^63", value))
}

fn malformed(expected: &str, found: Value) -> crate::Error {
    Fault::new(expected, found.describe()).corrupt()
}

/// Why a view of packed elements is left out.
const TANGLED: &str = "several elements stand in a byte, and it is a part of them or has them in another order; save \
                       its integers (`int_repr`) and its scales instead";

/// How many elements of a type stand in a byte, for the types that PyTorch counts so.
fn packed_in_byte(dtype: DType) -> Option<u64> {
    match dtype {
        DType::QU4x2 => Some(2),
        DType::QU2x4 => Some(4),
        _ => None,
    }
}

/// A tensor with several elements a byte, as the row of bytes that its storage is: how rows are padded is PyTorch's
/// own affair, so its sizes cannot be those of the bytes. A part of one, or one in another order, cannot be said so.
fn packed(layout: &Layout, n_in_byte: u64, len_bytes: u64, storage: StorageId) -> Result<View> {
    // A layout takes each element for a byte.
    let needed_bytes = layout.stored_bytes().end.div_ceil(n_in_byte);
    if needed_bytes > len_bytes {
        let expected = format!("a view of {len_bytes} bytes of storage");
        return Err(Fault::new(expected, format!("one of at least {needed_bytes}")).corrupt());
    }
    let is_whole = layout.offset_elems() == 0 && layout.is_contiguous();
    let row = Layout::contiguous(layout.dtype(), &[len_bytes])?;
    let left_out = (!is_whole).then_some(TANGLED);
    Ok(View { left_out, ..View::new(row, Some(storage)) })
}
