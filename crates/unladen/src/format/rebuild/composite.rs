//! Sparse, nested and quantised tensors and subclasses around others: their parts as plain tensors, checked against the
//! sizes of the whole. What stands in the parts, indices say, is data and not read here: `verify` looks at it.

use super::{Parts, Rebuild, Unwrapped, View, Visits, malformed, unsigned};
use crate::{
    checkpoint::{CompositeKind, SparseLayout},
    dtype::DType,
    error::{Fault, Result},
    format::pickle::{Meaning, Value, Wide},
    tensor::{Dims, Layout, MAX_DIMS},
};
use smallvec::SmallVec;

/// Parts by name.
pub(crate) type Named = SmallVec<[(&'static str, Value); 4]>;

/// A tensor that is made of others.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) kind: CompositeKind,
    pub(crate) shape: Dims,
    /// What is listed under its own name: the integers of a quantised tensor.
    pub(crate) own: Option<View>,
    /// What is listed below its name.
    pub(crate) named: Named,
    /// Holds the data of a subclass: whatever tensors are in it, at their own paths.
    pub(crate) free: Parts,
    /// What cannot be listed as a tensor.
    pub(crate) left_out: Option<&'static str>,
}

impl Whole {
    fn new(kind: CompositeKind, shape: Dims, named: Named) -> Whole {
        Whole { kind, shape, own: None, named, free: Parts::new(), left_out: None }
    }
}

impl Rebuild<'_> {
    /// Puts the arguments of a function together; `parts` are the attributes, of which a subclass takes its data.
    pub(super) fn composite(
        &self,
        meaning: Meaning,
        args: &[Value],
        visits: &mut Visits,
        parts: &mut Parts,
    ) -> Result<Whole> {
        match (meaning, args) {
            (Meaning::Sparse, &[layout, data]) => self.sparse(layout, data, visits),
            (Meaning::Nested, &[buffer, sizes, strides, offsets]) => {
                self.nested([buffer, sizes, strides, offsets], visits)
            }
            (Meaning::Jagged, &[Value::Dict(parts_by_name)]) => self.jagged(parts_by_name, visits, parts),
            (Meaning::Quantised, &[storage, offset, size, stride, quantiser, ..]) => {
                let view = self.view(storage, offset, size, stride, None)?;
                self.quantised(view, self.dims(size)?, quantiser, visits)
            }
            (Meaning::Wrapper, &[class, _, size, ..]) => {
                let class = match class {
                    Value::Symbol(symbol) => self.arena.symbols[symbol as usize].to_string(),
                    other => return Err(malformed("the class of a tensor", other)),
                };
                let mut whole =
                    Whole::new(CompositeKind::Subclass { class }, self.sizes(size)?, Named::new());
                whole.free = std::mem::take(parts);
                Ok(whole)
            }
            _ => Err(Fault::new("the arguments of a tensor", format!("{} others", args.len())).corrupt()),
        }
    }

    fn sparse(&self, layout: Value, data: Value, visits: &mut Visits) -> Result<Whole> {
        let layout = self.sparse_layout(layout)?;
        let data = self.arena.sequence(data).unwrap_or_default();
        let names = layout.parts();
        // PyTorch says since 2.0 whether the values of a `sparse_coo` stand in order.
        let is_known =
            data.len() == names.len() + 1 || (layout == SparseLayout::Coo && data.len() == names.len() + 2);
        if !is_known {
            let expected = format!("{} and sizes of a {}", names.join(", "), layout.name());
            return Err(Fault::new(expected, format!("{} values", data.len())).corrupt());
        }
        let shape = self.sizes(data[names.len()])?;
        let mut layouts = SmallVec::<[Layout; 3]>::new();
        for &part in &data[..names.len()] {
            layouts.push(self.plain(part, visits)?.layout);
        }
        let fits = match (layout, &layouts[..]) {
            (SparseLayout::Coo, [indices, values]) => fits_coo(indices, values, &shape),
            (_, [compressed, plain, values]) => fits_compressed(layout, compressed, plain, values, &shape),
            _ => false,
        };
        if !fits {
            let part = |(name, it): (&&str, &Layout)| format!("{name} {} {:?}", it.dtype(), it.shape());
            let found: Vec<String> = names.iter().zip(&layouts).map(part).collect();
            let expected = format!("parts of a {} of shape {:?}", layout.name(), &shape[..]);
            return Err(Fault::new(expected, found.join(", ")).corrupt());
        }
        let named = names.iter().copied().zip(data.iter().copied()).collect();
        Ok(Whole::new(CompositeKind::Sparse { layout }, shape, named))
    }

    /// What `torch.serialization._get_layout('torch.sparse_coo')` stands for.
    fn sparse_layout(&self, value: Value) -> Result<SparseLayout> {
        let name = match value {
            Value::Call(call) => {
                let call = &self.arena.calls[call as usize];
                match (self.arena.meaning(call.function), self.arena.run(call.args)) {
                    (Meaning::GetLayout, &[Value::Str(name)]) => self.arena.text(name),
                    _ => return Err(malformed("a layout", value)),
                }
            }
            _ => return Err(malformed("a layout", value)),
        };
        name.strip_prefix("torch.").and_then(SparseLayout::from_name).ok_or_else(|| {
            let found = format!("`{}`", name.escape_debug());
            Fault::new("sparse_coo, sparse_csr, sparse_csc, sparse_bsr or sparse_bsc", found).unsupported()
        })
    }

    fn nested(&self, [buffer, sizes, strides, offsets]: [Value; 4], visits: &mut Visits) -> Result<Whole> {
        let buffer_layout = self.plain(buffer, visits)?.layout;
        let [sizes_layout, strides_layout] =
            [self.plain(sizes, visits)?.layout, self.plain(strides, visits)?.layout];
        let mut named = Named::from_slice(&[("buffer", buffer), ("sizes", sizes), ("strides", strides)]);
        // The first releases wrote a list of numbers.
        let (n_offsets, is_list) = match self.arena.sequence(offsets) {
            Some(items) => {
                items.iter().try_for_each(|&it| unsigned(it).map(drop))?;
                (items.len() as u64, true)
            }
            None => {
                let layout = self.plain(offsets, visits)?.layout;
                named.push(("offsets", offsets));
                let is_row = layout.shape().len() == 1 && layout.dtype() == DType::I64;
                (if is_row { layout.n_elems() } else { u64::MAX }, false)
            }
        };
        let n_rows = match *sizes_layout.shape() {
            [n_rows, _] => n_rows,
            // No tensor at all: PyTorch has sizes without a dimension then.
            [] => 0,
            _ if sizes_layout.n_elems() == 0 => 0,
            _ => u64::MAX,
        };
        let are_numbers = [&sizes_layout, &strides_layout].iter().all(|it| it.dtype() == DType::I64);
        let fits = buffer_layout.shape().len() == 1
            // Of no tensor, PyTorch's are of its default type.
            && (are_numbers || n_rows == 0)
            && sizes_layout.shape() == strides_layout.shape()
            && n_rows == n_offsets;
        if !fits {
            let shapes =
                [&buffer_layout, &sizes_layout, &strides_layout].map(|it| format!("{:?}", it.shape()));
            let found = format!("a buffer, sizes and strides of shapes {}", shapes.join(", "));
            let expected = format!("a row of elements, and sizes and strides of {n_offsets} tensors");
            return Err(Fault::new(expected, found).corrupt());
        }
        let mut whole = Whole::new(CompositeKind::Nested, Dims::from_slice(&[n_rows]), named);
        whole.left_out = is_list.then_some("the offsets, a list in the pickle,");
        Ok(whole)
    }

    /// A nested tensor as a subclass: rows of different lengths in one tensor, and where each starts.
    fn jagged(&self, by_name: u32, visits: &mut Visits, parts: &mut Parts) -> Result<Whole> {
        visits.spend(self.arena.n_items(Value::Dict(by_name)))?;
        let get = |name| self.arena.get(by_name, name).unwrap_or(Value::None);
        let (values, offsets) = (get("values"), get("offsets"));
        self.plain(values, visits)?;
        let mut named = Named::from_slice(&[("values", values), ("offsets", offsets)]);
        let n_rows = match *self.plain(offsets, visits)?.layout.shape() {
            [n_offsets] if n_offsets > 0 => n_offsets - 1,
            ref other => {
                return Err(Fault::new("a row of offsets", format!("shape {other:?}")).corrupt());
            }
        };
        let lengths = get("lengths");
        if lengths != Value::None {
            let layout = self.plain(lengths, visits)?.layout;
            if layout.shape() != [n_rows] {
                let found = format!("shape {:?}", layout.shape());
                return Err(Fault::new(format!("{n_rows} lengths"), found).corrupt());
            }
            named.push(("lengths", lengths));
        }
        let known: SmallVec<[Value; 4]> =
            named.iter().map(|it| it.1).chain([get("_metadata_cache")]).collect();
        named.push(("metadata", get("_metadata_cache")));
        // The attributes are the same things once more. Others are walked as those of any tensor.
        let mut others = Parts::new();
        for attribute in std::mem::take(parts) {
            let is_repeated = match attribute {
                Value::Dict(dict) => {
                    let items = &self.arena.dicts[dict as usize].items;
                    visits.spend(items.len() as u64)?;
                    items.iter().all(|(_, value)| known.contains(value) || self.is_plain(*value))
                }
                value => self.is_plain(value),
            };
            if !is_repeated {
                others.push(attribute);
            }
        }
        *parts = others;
        Ok(Whole::new(CompositeKind::Nested, Dims::from_slice(&[n_rows]), named))
    }

    fn quantised(&self, own: View, shape: Dims, quantiser: Value, visits: &mut Visits) -> Result<Whole> {
        let items = self.arena.sequence(quantiser).unwrap_or_default();
        let scheme = match items.first().map(|&it| self.arena.meaning(it)) {
            Some(Meaning::Scheme(scheme)) => scheme,
            _ => return Err(malformed("how a tensor was quantised", quantiser)),
        };
        let by_channel = matches!(scheme, "per_channel_affine" | "per_channel_affine_float_qparams");
        let (kind, named, left_out) = match (items, by_channel) {
            (&[_, scale, zero_point], false) if scheme == "per_tensor_affine" => {
                let scale = match scale {
                    Value::Float(Wide(scale)) => scale,
                    Value::Int(Wide(scale)) => scale as f64,
                    other => return Err(malformed("a scale", other)),
                };
                let Value::Int(Wide(zero_point)) = zero_point else {
                    return Err(malformed("a zero point", zero_point));
                };
                let (scale, zero_point) = (Some(scale), Some(zero_point));
                (CompositeKind::Quantised { scheme, axis: None, scale, zero_point }, Named::new(), None)
            }
            (&[_, scales, zero_points, axis], true) => {
                let axis = unsigned(axis)?;
                let len = usize::try_from(axis).ok().and_then(|it| shape.get(it).copied());
                let Some(len) = len else {
                    let expected = format!("an axis of {} dimensions", shape.len());
                    return Err(Fault::new(expected, format!("axis {axis}")).corrupt());
                };
                let mut named = Named::new();
                for (name, value) in [("scales", scales), ("zero_points", zero_points)] {
                    let found = match self.arena.sequence(value) {
                        Some(numbers) => Some(numbers.len() as u64),
                        None => {
                            let layout = self.plain(value, visits)?.layout;
                            named.push((name, value));
                            (layout.shape().len() == 1).then(|| layout.n_elems())
                        }
                    };
                    if found != Some(len) {
                        let found =
                            found.map_or("a tensor of several dimensions".to_owned(), |it| it.to_string());
                        let expected = format!("{len} {name}, one for each index of axis {axis}");
                        return Err(Fault::new(expected, found).corrupt());
                    }
                }
                let kind =
                    CompositeKind::Quantised { scheme, axis: Some(axis), scale: None, zero_point: None };
                let left_out = (named.len() < 2).then_some("scales or zero points, lists in the pickle,");
                (kind, named, left_out)
            }
            _ => {
                let found = format!("{scheme} with {} values", items.len().saturating_sub(1));
                return Err(Fault::new("a scheme and its scales as PyTorch writes them", found).corrupt());
            }
        };
        Ok(Whole { own: Some(own), left_out, ..Whole::new(kind, shape, named) })
    }

    /// A part: a plain tensor, whatever it is wrapped in. One that is made of others is refused, so that nothing is looked
    /// into more than one level deep.
    fn plain(&self, value: Value, visits: &mut Visits) -> Result<View> {
        let unwrapped = match value {
            Value::Call(call) => self.unwrap(call, visits, &mut Parts::new())?,
            _ => Unwrapped::Other,
        };
        match unwrapped {
            Unwrapped::Tensor(view) if view.left_out.is_none() => Ok(view),
            _ => Err(malformed("a plain tensor as a part of another", value)),
        }
    }

    /// True for what holds no tensor at first sight: a number, a text, a short list of such.
    pub(in crate::format) fn is_plain(&self, value: Value) -> bool {
        let is_leaf = |it: &Value| {
            !matches!(
                it,
                Value::Call(_) | Value::Dict(_) | Value::List(_) | Value::Tuple(_) | Value::Storage(_)
            )
        };
        match self.arena.sequence(value) {
            Some(items) => items.len() <= MAX_DIMS && items.iter().all(is_leaf),
            None => is_leaf(&value),
        }
    }

    /// The sizes of a whole, which no layout has checked.
    fn sizes(&self, value: Value) -> Result<Dims> {
        let sizes = self.dims(value)?;
        if sizes.len() > MAX_DIMS {
            let found = format!("{} dimensions", sizes.len());
            return Err(Fault::new(format!("at most {MAX_DIMS} dimensions"), found).unsupported());
        }
        Ok(sizes)
    }
}

fn are_indices(layout: &Layout) -> bool {
    matches!(layout.dtype(), DType::I64 | DType::I32)
}

/// Indices of (sparse dimensions, values), and values of (values, other dimensions).
fn fits_coo(indices: &Layout, values: &Layout, shape: &[u64]) -> bool {
    let &[n_sparse, n_values] = indices.shape() else { return false };
    let dense = usize::try_from(n_sparse).ok().and_then(|it| shape.get(it..));
    are_indices(indices)
        && values.shape().split_first().is_some_and(|(n, rest)| *n == n_values && Some(rest) == dense)
}

/// Pointers of (batch, rows + 1), indices of (batch, values) and values of (batch, values, block, other dimensions) make
/// a shape of (batch, rows, columns, other dimensions); with columns compressed, the pointers count those.
fn fits_compressed(
    layout: SparseLayout,
    compressed: &Layout,
    plain: &Layout,
    values: &Layout,
    shape: &[u64],
) -> bool {
    let (Some((&n_pointers, batch)), Some((&n_values, plain_batch))) =
        (compressed.shape().split_last(), plain.shape().split_last())
    else {
        return false;
    };
    let Some((shape_batch, &[n_rows, n_columns, ref dense @ ..])) = shape.split_at_checked(batch.len())
    else {
        return false;
    };
    let Some((values_batch, [values_len, rest @ ..])) = values.shape().split_at_checked(batch.len()) else {
        return false;
    };
    let is_blocked = matches!(layout, SparseLayout::Bsr | SparseLayout::Bsc);
    let (block, values_dense) = match (is_blocked, rest) {
        (false, rest) => ([1, 1], rest),
        (true, &[high, wide, ref rest @ ..]) => ([high, wide], rest),
        _ => return false,
    };
    let by_rows = matches!(layout, SparseLayout::Csr | SparseLayout::Bsr);
    let (len, block_len) = if by_rows { (n_rows, block[0]) } else { (n_columns, block[1]) };
    are_indices(compressed)
        && compressed.dtype() == plain.dtype()
        && [shape_batch, plain_batch, values_batch].iter().all(|it| *it == batch)
        && *values_len == n_values
        && values_dense == dense
        && block.iter().all(|it| *it > 0)
        && n_rows % block[0] == 0
        && n_columns % block[1] == 0
        && (len / block_len).checked_add(1) == Some(n_pointers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dtype: DType, shape: &[u64]) -> Layout {
        Layout::contiguous(dtype, shape).unwrap()
    }

    #[test]
    fn coordinates_have_a_row_for_each_sparse_dimension() {
        let fits = |indices: &[u64], values: &[u64], shape: &[u64]| {
            fits_coo(&layout(DType::I64, indices), &layout(DType::F32, values), shape)
        };
        assert!(fits(&[2, 5], &[5], &[3, 4]));
        assert!(fits(&[1, 5], &[5, 4], &[3, 4]));
        assert!(fits(&[0, 1], &[1], &[]));
        assert!(!fits(&[2, 5], &[4], &[3, 4]));
        assert!(!fits(&[3, 5], &[5], &[3, 4]));
        assert!(!fits(&[2, 5], &[5, 4], &[3, 4]));
        assert!(!fits_coo(&layout(DType::F32, &[2, 5]), &layout(DType::F32, &[5]), &[3, 4]));
    }

    #[test]
    fn compressed_layouts_count_what_they_compress() {
        let fits = |kind, pointers: &[u64], indices: &[u64], values: &[u64], shape: &[u64]| {
            let [pointers, indices] = [pointers, indices].map(|it| layout(DType::I32, it));
            fits_compressed(kind, &pointers, &indices, &layout(DType::F16, values), shape)
        };
        assert!(fits(SparseLayout::Csr, &[4], &[7], &[7], &[3, 5]));
        assert!(fits(SparseLayout::Csc, &[6], &[7], &[7], &[3, 5]));
        assert!(!fits(SparseLayout::Csc, &[4], &[7], &[7], &[3, 5]));
        assert!(fits(SparseLayout::Bsr, &[3], &[7], &[7, 2, 5], &[4, 10]));
        assert!(fits(SparseLayout::Bsc, &[3], &[7], &[7, 2, 5], &[4, 10]));
        assert!(!fits(SparseLayout::Bsr, &[3], &[7], &[7, 0, 5], &[4, 10]));
        assert!(!fits(SparseLayout::Bsr, &[3], &[7], &[7, 3, 5], &[4, 10]));
        // A batch of two, and values that are rows of six.
        assert!(fits(SparseLayout::Csr, &[2, 4], &[2, 7], &[2, 7, 6], &[2, 3, 5, 6]));
        assert!(!fits(SparseLayout::Csr, &[2, 4], &[7], &[2, 7, 6], &[2, 3, 5, 6]));
        assert!(!fits(SparseLayout::Csr, &[4], &[7], &[7], &[3]));
        assert!(!fits(SparseLayout::Csr, &[0], &[7], &[7], &[u64::MAX, 5]));
    }
}
