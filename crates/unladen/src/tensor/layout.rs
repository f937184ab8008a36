//! Type, shape, strides and offset, with every product checked once, at construction.

use crate::{
    dtype::{DType, Resolve},
    error::{Fault, Result},
};
use smallvec::SmallVec;
use std::ops::Range;

/// Sizes or strides, outermost first; up to four without an allocation.
pub type Dims = SmallVec<[u64; 4]>;

/// Expanded views below this many bytes are written out whatever they were expanded from.
const MAX_EXPANDED_BYTES: u64 = 1 << 30;

/// Larger ones may be this many times as large as what is stored.
const MAX_EXPANSION: u64 = 1024;

/// More dimensions than any real tensor has: PyTorch's own iterator stops at 64.
pub const MAX_DIMS: usize = 64;

/// How a tensor's elements stand in its storage.
///
/// Its fields are private because [`Layout::strided`] has checked that no product of them overflows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    dtype: DType,
    shape: Dims,
    stride: Dims,
    offset_elems: u64,
    conj: bool,
    neg: bool,
}

impl Layout {
    /// Row-major elements from the start of a storage.
    ///
    /// Fails if there are more than [`MAX_DIMS`] dimensions, or more than 2⁶³ - 1 bytes.
    pub fn contiguous(dtype: DType, shape: &[u64]) -> Result<Layout> {
        let mut stride = Dims::from_elem(1, shape.len());
        for dim in (1..shape.len()).rev() {
            // A shape with a zero in it may have any other sizes, so this product may overflow harmlessly.
            stride[dim - 1] = stride[dim].saturating_mul(shape[dim].max(1)).min(i64::MAX as u64);
        }
        Layout::strided(dtype, shape, &stride, 0)
    }

    /// Elements `stride` apart (in elements), from `offset_elems` on.
    ///
    /// Fails if `shape` and `stride` differ in length, there are more than [`MAX_DIMS`] dimensions, or the
    /// bytes that the tensor holds or spans in its storage exceed 2⁶³ - 1.
    pub fn strided(dtype: DType, shape: &[u64], stride: &[u64], offset_elems: u64) -> Result<Layout> {
        if shape.len() != stride.len() {
            let found = format!("{} sizes and {} strides", shape.len(), stride.len());
            return Err(Fault::new("as many strides as sizes", found).corrupt());
        }
        if shape.len() > MAX_DIMS {
            let found = format!("{} dimensions", shape.len());
            return Err(Fault::new(format!("at most {MAX_DIMS} dimensions"), found).unsupported());
        }
        let layout = Layout {
            dtype,
            shape: Dims::from_slice(shape),
            stride: Dims::from_slice(stride),
            offset_elems,
            conj: false,
            neg: false,
        };
        if !shape.contains(&0) {
            let size = u128::from(dtype.size_bytes());
            let held = shape.iter().try_fold(size, |product, &it| product.checked_mul(u128::from(it)));
            let steps = shape.iter().zip(stride).map(|(&len, &step)| u128::from(len - 1) * u128::from(step));
            let spanned = steps.fold(u128::from(offset_elems) + 1, u128::saturating_add).saturating_mul(size);
            if held.is_none_or(|it| it > i64::MAX as u128) || spanned > i64::MAX as u128 {
                let found = format!("shape {shape:?}, stride {stride:?}, offset {offset_elems}");
                return Err(Fault::new("a tensor of less than 2^63 bytes", found).corrupt());
            }
        }
        Ok(layout)
    }

    /// Marks the layout as a conjugate or negative view of what is stored.
    pub fn with_view(self, conj: bool, neg: bool) -> Layout {
        Layout { conj, neg, ..self }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Distances between neighbours, in elements.
    pub fn stride(&self) -> &[u64] {
        &self.stride
    }

    /// Position of the first element in the storage.
    pub fn offset_elems(&self) -> u64 {
        self.offset_elems
    }

    /// Number of elements.
    pub fn n_elems(&self) -> u64 {
        if self.shape.contains(&0) { 0 } else { self.shape.iter().product() }
    }

    /// Bytes of all elements, one after the other.
    pub fn len_bytes(&self) -> u64 {
        self.n_elems() * self.dtype.size_bytes()
    }

    /// The bytes of the storage from the first that an element touches to the last; empty without elements.
    pub fn stored_bytes(&self) -> Range<u64> {
        if self.n_elems() == 0 {
            return 0..0;
        }
        let span: u64 = self.shape.iter().zip(&self.stride).map(|(&len, &step)| (len - 1) * step).sum();
        let size = self.dtype.size_bytes();
        self.offset_elems * size..(self.offset_elems + span + 1) * size
    }

    /// Fails with [`Error::Unsupported`](crate::Error::Unsupported) if writing the elements out, one after the other, makes
    /// gigabytes of a few bytes: a view with strides of zero can claim any number of elements. Reading such a tensor to
    /// the end would take hours, whoever holds the result.
    pub fn check_expansion(&self) -> Result<()> {
        let stored = self.stored_bytes();
        let stored_bytes = stored.end - stored.start;
        if self.len_bytes() <= MAX_EXPANDED_BYTES || self.len_bytes() / MAX_EXPANSION <= stored_bytes {
            return Ok(());
        }
        let expected = format!("a tensor of at most {MAX_EXPANSION} times its {stored_bytes} stored bytes");
        let hint = "the tensor is an expanded view; save what it was expanded from";
        Err(Fault::new(expected, format!("{} bytes", self.len_bytes())).hint(hint).unsupported())
    }

    /// True if the elements stand one after the other in row-major order. Dimensions of size 1 may have any stride.
    pub fn is_contiguous(&self) -> bool {
        if self.n_elems() == 0 {
            return true;
        }
        let mut expected = 1;
        self.shape.iter().zip(&self.stride).rev().all(|(&len, &step)| {
            let fits = len == 1 || step == expected;
            expected *= len;
            fits
        })
    }

    /// What must be done to the elements of a storage besides moving them.
    pub fn resolve(&self, swapped: bool) -> Resolve {
        Resolve {
            swap: swapped && self.dtype.swap_bytes() > 1,
            conj: self.conj && self.dtype.is_complex(),
            neg: self.neg,
        }
    }

    /// The same strides over elements of another type.
    ///
    /// Fails if that makes more than 2⁶³ - 1 bytes.
    pub fn with_dtype(&self, dtype: DType) -> Result<Layout> {
        let layout = Layout::strided(dtype, &self.shape, &self.stride, self.offset_elems)?;
        Ok(layout.with_view(self.conj, self.neg))
    }

    /// Sizes of the heap blocks of a layout with more dimensions than fit inline.
    pub(crate) fn block_bytes(&self) -> impl Iterator<Item = usize> {
        [&self.shape, &self.stride].into_iter().filter_map(spilled_bytes)
    }

    /// The same tensor as it stands in memory after a load: row-major, resolved.
    pub fn loaded(&self) -> Layout {
        Layout::contiguous(self.dtype, &self.shape).expect("a shape that was checked")
    }
}

/// The size of the heap block of dimensions that do not fit inline.
pub(crate) fn spilled_bytes(dims: &Dims) -> Option<usize> {
    dims.spilled().then_some(dims.capacity() * size_of::<u64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_of_size_one_do_not_spoil_contiguity() {
        let layout = Layout::strided(DType::F32, &[64, 1, 3, 3], &[9, 9, 3, 1], 0).unwrap();
        assert!(layout.is_contiguous());
        assert!(!Layout::strided(DType::F32, &[3, 3], &[1, 3], 0).unwrap().is_contiguous());
    }

    #[test]
    fn products_that_overflow_are_refused_unless_the_tensor_is_empty() {
        let huge = 1 << 62;
        assert!(Layout::contiguous(DType::F32, &[huge]).is_err());
        assert!(Layout::strided(DType::F32, &[2], &[huge], 0).is_err());
        assert!(Layout::strided(DType::F32, &[2], &[u64::MAX], u64::MAX).is_err());
        let empty = Layout::contiguous(DType::F32, &[huge, huge, huge, 0]).unwrap();
        assert_eq!((empty.n_elems(), empty.stored_bytes()), (0, 0..0));
    }

    #[test]
    fn stored_bytes_span_the_view_and_no_more() {
        let view = Layout::strided(DType::F32, &[2, 3], &[6, 1], 8).unwrap();
        assert_eq!(view.stored_bytes(), 32..68);
        let expanded = Layout::strided(DType::F32, &[1_000_000_000_000], &[0], 0).unwrap();
        assert_eq!((expanded.stored_bytes(), expanded.len_bytes()), (0..4, 4_000_000_000_000));
        assert!(expanded.check_expansion().is_err() && view.check_expansion().is_ok());
    }
}
