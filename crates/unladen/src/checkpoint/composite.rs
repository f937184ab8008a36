//! Tensors that are more than a box of elements: which listed tensors are their parts, and what those mean together.

use super::Checkpoint;
use crate::tensor::{Dims, Tensor, TensorId};
use std::{fmt, ops::Range};

/// A sparse, nested or quantised tensor, or one of a class of its own, by the plain tensors that it is made of.
///
/// Checked when it was read: its parts have the dtypes and shapes that its own shape asks for. What stands in them is
/// data, which opening does not read, so that an index may still be out of bounds: `verify::check` looks at them all.
#[derive(Clone, Debug, PartialEq)]
pub struct Composite {
    /// The full path. The parts are named below it; only the integers of a quantised tensor have its own name.
    pub name: String,
    /// What it is.
    pub kind: CompositeKind,
    /// Its sizes, outermost first. Of a nested tensor the first alone, as those of its rows are data: none if that is
    /// data, too.
    pub shape: Dims,
    /// Its parts: positions in [`Checkpoint::tensors`](crate::Checkpoint).
    pub parts: Range<u32>,
}

impl Composite {
    /// The positions of the parts.
    pub fn part_ids(&self) -> impl Iterator<Item = TensorId> {
        self.parts.clone().map(TensorId)
    }
}

/// What the parts of a [`Composite`] are together.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum CompositeKind {
    /// Values and where they stand; everything else is zero.
    Sparse {
        /// How the places are said.
        layout: SparseLayout,
    },
    /// Tensors of different sizes in one buffer.
    Nested,
    /// Integers that stand for numbers: (integer - zero point) × scale.
    Quantised {
        /// PyTorch's name of the scheme, `per_tensor_affine`.
        scheme: &'static str,
        /// The dimension along which scales differ; `None`: one for all, which stands here.
        axis: Option<u64>,
        /// The scale for all; with an axis, they are a part, `scales`.
        scale: Option<f64>,
        /// The zero point for all; with an axis, they are a part, `zero_points`.
        zero_point: Option<i64>,
    },
    /// A class that keeps its data in other tensors, as torchao's and `DTensor` do.
    Subclass {
        /// Its name, `module.name`. It is never resolved.
        class: String,
    },
}

impl CompositeKind {
    /// The word for it: `sparse`, `nested`, `quantised` or `subclass`.
    pub fn word(&self) -> &'static str {
        match self {
            CompositeKind::Sparse { .. } => "sparse",
            CompositeKind::Nested => "nested",
            CompositeKind::Quantised { .. } => "quantised",
            CompositeKind::Subclass { .. } => "subclass",
        }
    }
}

impl fmt::Display for CompositeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CompositeKind::Sparse { layout } => f.write_str(layout.name()),
            CompositeKind::Nested => f.write_str("nested"),
            CompositeKind::Quantised { scheme, axis, scale, zero_point } => {
                f.write_str(scheme)?;
                if let Some(axis) = axis {
                    write!(f, ", axis {axis}")?;
                }
                if let Some(scale) = scale {
                    write!(f, ", scale {scale:?}")?;
                }
                zero_point.map_or(Ok(()), |it| write!(f, ", zero point {it}"))
            }
            CompositeKind::Subclass { class } => f.write_str(class),
        }
    }
}

/// How a sparse tensor says where its values stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SparseLayout {
    /// Coordinates of each value.
    Coo,
    /// Rows, compressed.
    Csr,
    /// Columns, compressed.
    Csc,
    /// Rows of blocks, compressed.
    Bsr,
    /// Columns of blocks, compressed.
    Bsc,
}

/// A layout, its name in PyTorch, and its parts in the order in which PyTorch writes them.
const SPARSE: [(SparseLayout, &str, &[&str]); 5] = [
    (SparseLayout::Coo, "sparse_coo", &["indices", "values"]),
    (SparseLayout::Csr, "sparse_csr", &["crow_indices", "col_indices", "values"]),
    (SparseLayout::Csc, "sparse_csc", &["ccol_indices", "row_indices", "values"]),
    (SparseLayout::Bsr, "sparse_bsr", &["crow_indices", "col_indices", "values"]),
    (SparseLayout::Bsc, "sparse_bsc", &["ccol_indices", "row_indices", "values"]),
];

impl SparseLayout {
    /// PyTorch's name, `sparse_coo`.
    pub fn name(self) -> &'static str {
        SPARSE[self as usize].1
    }

    /// Names of the parts, which are PyTorch's methods that return them.
    pub fn parts(self) -> &'static [&'static str] {
        SPARSE[self as usize].2
    }

    /// The layout of PyTorch's name.
    pub fn from_name(name: &str) -> Option<SparseLayout> {
        SPARSE.iter().find(|(_, known, _)| *known == name).map(|row| row.0)
    }
}

impl Checkpoint {
    /// Keeps some tensors, which may be renamed on the way, and of what is made of several that of which all are kept.
    pub(crate) fn retain_tensors(&mut self, mut keep: impl FnMut(&mut Tensor) -> bool) {
        let mut n_kept = 0;
        // Positions of what stays, as positions in the new list.
        let mut new_position = Vec::with_capacity(self.tensors.len() + 1);
        self.tensors.retain_mut(|it| {
            new_position.push(n_kept);
            let is_kept = keep(it);
            n_kept += u32::from(is_kept);
            is_kept
        });
        new_position.push(n_kept);
        self.composites.retain_mut(|it| {
            let Range { start, end } = it.parts;
            it.parts = new_position[start as usize]..new_position[end as usize];
            end - start == it.parts.end - it.parts.start
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_stands_in_the_order_of_the_enum() {
        for (index, (layout, name, _)) in SPARSE.into_iter().enumerate() {
            assert_eq!(layout as usize, index);
            assert_eq!(SparseLayout::from_name(name), Some(layout));
        }
    }
}
