//! What stands in the parts of sparse and nested tensors: do all indices point at something? Opening a checkpoint checks
//! dtypes and shapes of the parts, and reads none of them; this reads them, in order and in bounded memory.

mod bounds;

use super::check::{Finding, Kind};
use crate::{
    checkpoint::{Checkpoint, Composite, CompositeKind, SparseLayout},
    contents::{OpenFile, ReadPlan, Reader, Reads, Walk, is_in_order},
    dtype::DType,
    error::{Error, Fault, Result},
    progress::Progress,
    source::FileSet,
    tensor::{Backing, Layout, TensorId},
};
use bounds::{Compressed, coordinates, jagged, nested};
use std::collections::HashSet;

/// Views can repeat what a file stores, so that reading them all takes without end: so often all that it stores is read at
/// most, and this much besides. What is tied is read once.
const MAX_REPEATS: u64 = 16;
const MAX_REPEATED_BYTES: u64 = 256 << 20;

/// Parts that say where other parts belong.
enum Indices {
    /// Of a `sparse_coo`.
    Coordinates { indices: TensorId },
    /// Of the other sparse layouts.
    Compressed { layout: SparseLayout, pointers: TensorId, plain: TensorId, values: TensorId },
    /// Of rows in a buffer.
    Nested { buffer: TensorId, sizes: TensorId, strides: TensorId, offsets: TensorId },
    /// Of rows of one tensor.
    Jagged { values: TensorId, offsets: TensorId, lengths: Option<TensorId> },
}

/// An index that points nowhere.
struct Wrong {
    part: TensorId,
    expected: String,
    found: String,
}

impl Indices {
    /// `None` for what has no indices, and where they have no data.
    fn of(checkpoint: &Checkpoint, composite: &Composite) -> Option<Indices> {
        let part = |index: u32| {
            let id = composite.parts.start.checked_add(index).filter(|it| composite.parts.contains(it))?;
            Some((TensorId(id), last_name(&checkpoint.tensor(TensorId(id)).name)))
        };
        let id = |index: u32| part(index).map(|it| it.0);
        let indices = match composite.kind {
            CompositeKind::Sparse { layout: SparseLayout::Coo } => Indices::Coordinates { indices: id(0)? },
            CompositeKind::Sparse { layout } => {
                Indices::Compressed { layout, pointers: id(0)?, plain: id(1)?, values: id(2)? }
            }
            CompositeKind::Nested => match part(0)? {
                // Without a fourth part the offsets are a list in the pickle.
                (buffer, "buffer") => {
                    Indices::Nested { buffer, sizes: id(1)?, strides: id(2)?, offsets: id(3)? }
                }
                (values, "values") => {
                    let lengths = part(2).filter(|it| it.1 == "lengths").map(|it| it.0);
                    Indices::Jagged { values, offsets: id(1)?, lengths }
                }
                _ => return None,
            },
            _ => return None,
        };
        let can_be_read = |id: &TensorId| {
            let tensor = checkpoint.tensor(*id);
            tensor.backing != Backing::Meta && matches!(tensor.layout.dtype(), DType::I64 | DType::I32)
        };
        indices.ids().iter().all(can_be_read).then_some(indices)
    }

    /// The parts that are read, all at once.
    fn ids(&self) -> Vec<TensorId> {
        match *self {
            Indices::Coordinates { indices } => vec![indices],
            Indices::Compressed { pointers, plain, .. } => vec![pointers, plain],
            Indices::Nested { sizes, strides, offsets, .. } => vec![sizes, strides, offsets],
            Indices::Jagged { offsets, lengths, .. } => [offsets].into_iter().chain(lengths).collect(),
        }
    }

    /// The part that they are of, as far as its shape counts.
    fn values(&self) -> Option<TensorId> {
        match *self {
            Indices::Coordinates { .. } => None,
            Indices::Compressed { values, .. } | Indices::Jagged { values, .. } => Some(values),
            Indices::Nested { buffer, .. } => Some(buffer),
        }
    }

    fn layout_name(&self) -> &'static str {
        match self {
            Indices::Compressed { layout, .. } => layout.name(),
            Indices::Coordinates { .. } => SparseLayout::Coo.name(),
            Indices::Nested { .. } => "nested",
            Indices::Jagged { .. } => "jagged",
        }
    }

    /// Reads them up to the first that is wrong.
    fn check(
        &self,
        checkpoint: &Checkpoint,
        shape: &[u64],
        numbers: &mut [Numbers<'_>],
    ) -> Result<Option<Wrong>> {
        let layout = |id: TensorId| &checkpoint.tensor(id).layout;
        let wrong = |part, (expected, found)| Wrong { part, expected, found };
        Ok(match (self, numbers) {
            (Indices::Coordinates { indices }, [numbers, ..]) => {
                let n_values = layout(*indices).shape().last().copied().unwrap_or(0);
                let n_dims = layout(*indices).shape().first().copied().unwrap_or(0);
                let sizes = shape.iter().take(usize::try_from(n_dims).unwrap_or(usize::MAX));
                coordinates(sizes, n_values, numbers)?.map(|it| wrong(*indices, it))
            }
            (Indices::Compressed { layout: kind, pointers, plain, values }, [first, second, ..]) => {
                let compressed =
                    Compressed::of(*kind, layout(*pointers), layout(*plain), layout(*values), shape);
                let Some(compressed) = compressed else { return Ok(None) };
                compressed
                    .check(first, second)?
                    .map(|(is_pointer, told)| wrong(if is_pointer { *pointers } else { *plain }, told))
            }
            (Indices::Nested { buffer, sizes, offsets, .. }, [first, second, third, ..]) => {
                let n_rows = layout(*offsets).n_elems();
                let n_dims = layout(*sizes).shape().get(1).copied().unwrap_or(0);
                let n_elems = layout(*buffer).n_elems();
                nested(n_rows, n_dims, n_elems, [first, second, third])?.map(|it| wrong(*offsets, it))
            }
            (Indices::Jagged { values, offsets, lengths }, [first, rest @ ..]) => {
                let lengths = lengths.and_then(|_| rest.first_mut());
                let n_rows = layout(*offsets).n_elems().saturating_sub(1);
                jagged(n_rows, layout(*values).shape(), first, lengths)?.map(|it| wrong(*offsets, it))
            }
            _ => None,
        })
    }
}

/// The last part of a name, without the number that tells tensors of one name apart.
fn last_name(name: &str) -> &str {
    let last = name.rsplit('.').next().unwrap_or(name);
    last.split('~').next().unwrap_or(last)
}

/// What reading the indices takes. `None`: there are none.
///
/// Fails with [`Error::OverBudget`] like [`ReadPlan::beside`].
pub(super) fn plan(
    checkpoint: &Checkpoint,
    files: &FileSet,
    held_bytes: u64,
    reads: Reads,
    host_budget_bytes: u64,
) -> Result<Option<ReadPlan>> {
    let found = checkpoint.composites.iter().filter_map(|it| Indices::of(checkpoint, it));
    let (mut ids, mut n_at_once) = (Vec::new(), 0);
    for indices in found {
        let parts = indices.ids();
        n_at_once = n_at_once.max(parts.len());
        ids.extend(parts);
    }
    if ids.is_empty() {
        return Ok(None);
    }
    ReadPlan::side_by_side(&ids, n_at_once, held_bytes, reads, checkpoint, files, host_budget_bytes).map(Some)
}

/// Reads all indices, once for each tensor that they are of. A tensor of `unread` was said to be unreadable before.
pub(super) fn check(
    checkpoint: &Checkpoint,
    open: &OpenFile<'_>,
    plan: &ReadPlan,
    first: &[TensorId],
    unread: &HashSet<String>,
    progress: &Progress,
) -> Result<Vec<Finding>> {
    let mut readers: Vec<Reader<'_>> = Vec::new();
    let mut findings = Vec::new();
    let stored_bytes = checkpoint.storages.iter().fold(0u64, |sum, it| sum.saturating_add(it.len_bytes));
    let mut left_bytes = stored_bytes.saturating_mul(MAX_REPEATS).saturating_add(MAX_REPEATED_BYTES);
    let mut known = HashSet::new();
    for composite in &checkpoint.composites {
        let Some(indices) = Indices::of(checkpoint, composite) else { continue };
        let ids = indices.ids();
        let name = |id: TensorId| checkpoint.tensor(id).name.clone();
        if ids.iter().any(|id| unread.contains(&checkpoint.tensor(*id).name)) {
            continue;
        }
        let firsts: Vec<TensorId> = ids.iter().map(|id| first[id.0 as usize]).collect();
        if !known.insert((
            firsts,
            &composite.shape[..],
            indices.values().map(|it| first[it.0 as usize]),
            indices.layout_name(),
        )) {
            continue;
        }
        let costs = ids.iter().map(|id| cost_bytes(checkpoint, *id, plan));
        let cost_bytes = costs.fold(0, u64::saturating_add);
        let Some(rest_bytes) = left_bytes.checked_sub(cost_bytes) else {
            findings.push(Finding {
                kind: Kind::Parts,
                path: checkpoint.path.clone(),
                record: None,
                tensors: ids.iter().map(|it| name(*it)).collect(),
                expected: format!("indices that do not repeat what is stored more than {MAX_REPEATS} times"),
                found: format!("{cost_bytes} bytes to read, after others"),
            });
            continue;
        };
        left_bytes = rest_bytes;
        while readers.len() < ids.len() {
            readers.push(Reader::new(checkpoint, open, plan, progress)?);
        }
        let numbers: Result<Vec<Numbers<'_>>> = readers
            .iter_mut()
            .zip(&ids)
            .map(|(reader, id)| Numbers::begin(reader, checkpoint, *id))
            .collect();
        let checked = numbers.and_then(|mut it| indices.check(checkpoint, &composite.shape, &mut it));
        let (kind, tensors, expected, found) = match checked {
            Ok(None) => continue,
            Ok(Some(Wrong { part, expected, found })) => {
                let whole = composite.name.escape_debug();
                let expected =
                    format!("{expected} (`{whole}` is {} {:?})", composite.kind, &composite.shape[..]);
                (Kind::Parts, vec![name(part)], expected, found)
            }
            Err(error @ (Error::Io { .. } | Error::Corrupt(_) | Error::Unsupported(_))) => {
                let names = ids.iter().map(|it| name(*it)).collect();
                (Kind::Unreadable, names, "indices that can be read".to_owned(), error.to_string())
            }
            Err(error) => return Err(error),
        };
        let path = checkpoint.path.clone();
        findings.push(Finding { kind, path, record: None, tensors, expected, found });
    }
    Ok(findings)
}

/// What reading a tensor comes to: of what is packed, all of it each time.
fn cost_bytes(checkpoint: &Checkpoint, id: TensorId, plan: &ReadPlan) -> u64 {
    let tensor = checkpoint.tensor(id);
    let len_bytes = tensor.layout.len_bytes();
    let n_times = match is_in_order(tensor) {
        true => 1,
        false => len_bytes.div_ceil(plan.window_bytes().max(1)),
    };
    let packed = checkpoint.pieces(id).map(|it| checkpoint.storage_of(&it).file);
    let packed = packed.filter(|it| checkpoint.is_packed(*it)).map(|it| checkpoint.file(it).len_bytes);
    packed.fold(len_bytes, |sum, it| sum.saturating_add(it.saturating_mul(n_times)))
}

/// Adds the next bytes of a tensor, none after the last.
type Source<'r> = dyn FnMut(&mut Vec<u8>) -> Result<()> + 'r;

/// The numbers of a tensor, one after the other.
struct Numbers<'r> {
    source: Box<Source<'r>>,
    is_long: bool,
    /// What was read last, and how much of it was taken.
    bytes: Vec<u8>,
    n_taken: usize,
}

impl<'r> Numbers<'r> {
    fn begin<'a: 'r>(
        reader: &'r mut Reader<'a>,
        checkpoint: &Checkpoint,
        id: TensorId,
    ) -> Result<Numbers<'r>> {
        let mut walk: Walk = reader.walk(id)?;
        let source = move |bytes: &mut Vec<u8>| {
            bytes.extend_from_slice(reader.next(&mut walk)?.unwrap_or_default());
            Ok(())
        };
        let is_long = checkpoint.tensor(id).layout.dtype() == DType::I64;
        Ok(Numbers { source: Box::new(source), is_long, bytes: Vec::new(), n_taken: 0 })
    }

    /// The next one. Fails after the last.
    fn next(&mut self) -> Result<i64> {
        if self.n_taken >= self.bytes.len() {
            self.bytes.clear();
            self.n_taken = 0;
            (self.source)(&mut self.bytes)?;
        }
        let rest = self.bytes.get(self.n_taken..).unwrap_or_default();
        let number = match self.is_long {
            true => rest.first_chunk().map(|it| i64::from_le_bytes(*it)),
            false => rest.first_chunk().map(|it| i64::from(i32::from_le_bytes(*it))),
        };
        self.n_taken += if self.is_long { 8 } else { 4 };
        number.ok_or_else(|| Fault::new("an index", "the end of its tensor").corrupt())
    }

    #[cfg(test)]
    fn of(numbers: &[i64]) -> Numbers<'static> {
        let bytes = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
        Numbers { source: Box::new(|_| Ok(())), is_long: true, bytes, n_taken: 0 }
    }
}

/// Sizes of the tensor's dimensions up to the last so many, as one number.
fn n_in_front(layout: &Layout, n_last: usize) -> u64 {
    let n_dims = layout.shape().len().saturating_sub(n_last);
    layout.shape().iter().take(n_dims).fold(1, |product, it| product.saturating_mul(*it))
}
