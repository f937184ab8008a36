//! Boxes of elements with a place on either side of a copy: how strided bytes become row-major ones, in bounded pieces.

use super::{Dims, Layout};
use smallvec::SmallVec;

/// A box of a tensor's index space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Index of the first element.
    pub start: Dims,
    /// Sizes.
    pub shape: Dims,
}

impl Window {
    /// The whole tensor.
    pub fn whole(shape: &[u64]) -> Window {
        Window { start: Dims::from_elem(0, shape.len()), shape: Dims::from_slice(shape) }
    }

    /// Cuts a tensor into windows of at most `max_elems` elements whose row-major bytes, one window after the other,
    /// are the row-major bytes of the tensor. Nothing for a tensor without elements.
    pub fn in_order(shape: &[u64], max_elems: u64) -> impl Iterator<Item = Window> + use<> {
        let max_elems = max_elems.max(1);
        let shape = Dims::from_slice(shape);
        // Dimensions below `split` fit whole into a window, `rows` of them at a time; those above go one by one.
        let (mut split, mut inner) = (shape.len(), 1u64);
        while split > 0 && inner.saturating_mul(shape[split - 1]) <= max_elems {
            split -= 1;
            inner *= shape[split].max(1);
        }
        let rows = max_elems / inner;
        let mut next = (!shape.contains(&0)).then(|| Dims::from_elem(0, shape.len()));
        std::iter::from_fn(move || {
            let start = next.take()?;
            let mut window = Window { start: start.clone(), shape: Dims::from_elem(1, shape.len()) };
            window.shape[split..].copy_from_slice(&shape[split..]);
            let mut after = start;
            let mut step = 1;
            if split > 0 {
                step = rows.min(shape[split - 1] - after[split - 1]);
                window.shape[split - 1] = step;
            }
            for dim in (0..split).rev() {
                after[dim] += step;
                step = 1;
                if after[dim] < shape[dim] {
                    next = Some(after);
                    break;
                }
                after[dim] = 0;
            }
            Some(window)
        })
    }
}

/// Which side of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the bytes are.
    Source,
    /// Where they go.
    Target,
}

/// One dimension of a [`Block`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Number of steps.
    pub len: u64,
    /// Distance of two neighbours in the source.
    pub source_step_bytes: u64,
    /// Distance of two neighbours in the target.
    pub target_step_bytes: u64,
}

impl Axis {
    fn step_bytes(&self, side: Side) -> u64 {
        match side {
            Side::Source => self.source_step_bytes,
            Side::Target => self.target_step_bytes,
        }
    }
}

/// A box of elements to copy. Neighbours that touch on both sides are merged, so contiguous data has no axis at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Where it starts in the source.
    pub source_byte: u64,
    /// Where it starts in the target.
    pub target_byte: u64,
    /// Length of a run that is contiguous on both sides, whole elements.
    pub run_bytes: u64,
    /// Size of an element; runs are cut between elements only.
    pub elem_bytes: u64,
    /// The dimensions above the run, outermost first.
    pub axes: SmallVec<[Axis; 4]>,
}

impl Block {
    /// The part of `window` that a piece of a tensor covers: from its storage to the row-major bytes of the window.
    ///
    /// `layout` is the piece's own, `at` the index of its first element in the tensor. `None` if they do not meet.
    pub fn within(layout: &Layout, at: &[u64], window: &Window) -> Option<Block> {
        // Beside a zero the other sizes, the steps and the offset may be anything, and no product of them is safe.
        if layout.shape().contains(&0) || window.shape.contains(&0) {
            return None;
        }
        let elem_bytes = layout.dtype().size_bytes();
        let mut block = Block {
            source_byte: layout.offset_elems() * elem_bytes,
            target_byte: 0,
            run_bytes: elem_bytes,
            elem_bytes,
            axes: SmallVec::new(),
        };
        let mut target_step_bytes = elem_bytes;
        for dim in (0..at.len()).rev() {
            let (low, high) = (at[dim], at[dim] + layout.shape()[dim]);
            let start = low.max(window.start[dim]);
            let end = high.min(window.start[dim] + window.shape[dim]);
            if start >= end {
                return None;
            }
            let source_step_bytes = layout.stride()[dim].saturating_mul(elem_bytes);
            // A size-1 dimension may carry any stride, and is then always entered at its start.
            block.source_byte += if start == low { 0 } else { (start - low) * source_step_bytes };
            block.target_byte += (start - window.start[dim]) * target_step_bytes;
            block.put_outside(Axis { len: end - start, source_step_bytes, target_step_bytes });
            target_step_bytes *= window.shape[dim];
        }
        block.axes.reverse();
        Some(block)
    }

    /// Adds a dimension outside those there are (kept innermost first while building), merged where it can be.
    pub(super) fn put_outside(&mut self, axis: Axis) {
        if axis.len == 1 {
            return;
        }
        let touches =
            |inside_len_bytes: [u64; 2]| [axis.source_step_bytes, axis.target_step_bytes] == inside_len_bytes;
        match self.axes.last_mut() {
            None if touches([self.run_bytes; 2]) => self.run_bytes *= axis.len,
            Some(inner)
                if touches(
                    [inner.source_step_bytes, inner.target_step_bytes]
                        .map(|step| step.saturating_mul(inner.len)),
                ) =>
            {
                inner.len *= axis.len;
            }
            _ => self.axes.push(axis),
        }
    }

    /// Bytes from the first to the last that the block touches on one side.
    pub fn span_bytes(&self, side: Side) -> u64 {
        self.axes.iter().map(|axis| (axis.len - 1) * axis.step_bytes(side)).sum::<u64>() + self.run_bytes
    }

    /// Bytes that a copy of the block moves.
    pub fn len_bytes(&self) -> u64 {
        self.axes.iter().map(|axis| axis.len).product::<u64>() * self.run_bytes
    }

    /// How many bytes of the source to read at once, at most `max_bytes`: all that the block spans, unless most of them
    /// belong to others.
    ///
    /// A few columns of a wide matrix span all its rows. Reading them row by row touches the columns alone, instead of
    /// reading the matrix again for every part; worth it while the rows are few and the runs not tiny. `is_disk`: a disk is
    /// not asked for less than 64 KiB, reading what lies between is faster.
    pub fn read_limit(&self, max_bytes: u64, is_disk: bool) -> u64 {
        let min_row_bytes = if is_disk { 64 << 10 } else { 512 };
        let span_bytes = self.span_bytes(Side::Source);
        let reach = |axis: &Axis| (axis.len - 1) * axis.source_step_bytes;
        let Some(widest) = self.axes.iter().max_by_key(|axis| reach(axis)) else { return max_bytes };
        let row_bytes = span_bytes - reach(widest);
        let is_sparse = span_bytes / 4 > self.len_bytes();
        if is_sparse && row_bytes >= min_row_bytes && widest.len <= 1 << 16 { row_bytes } else { max_bytes }
            .min(max_bytes)
    }

    /// Cuts the block until no part spans more than `max_bytes` (at least an element) on one side; parts come in
    /// the order of the widest steps on that side. Cut while they are taken: there may be millions.
    pub fn split(self, side: Side, max_bytes: u64) -> Parts {
        let max_bytes = max_bytes.max(self.elem_bytes);
        Parts { side, max_bytes, whole: Some(self), cuts: SmallVec::new() }
    }

    /// Where to cut a block that spans more than `max_bytes` on one side.
    fn cut(self, side: Side, max_bytes: u64) -> Cut {
        let span_bytes = self.span_bytes(side);
        let reach = |axis: &Axis| (axis.len - 1) * axis.step_bytes(side);
        let widest = (0..self.axes.len()).max_by_key(|&it| reach(&self.axes[it]));
        // The run is cut where it is the widest and too long for any part, or where the axis's steps overlap in it.
        let cut_axis = |&it: &usize| {
            let is_whole = self.run_bytes <= max_bytes && self.axes[it].step_bytes(side) >= self.run_bytes;
            is_whole || reach(&self.axes[it]) >= self.run_bytes
        };
        let axis = widest.filter(cut_axis);
        let step = match axis {
            Some(widest) => {
                let axis = self.axes[widest];
                let rest_bytes = span_bytes - reach(&axis);
                // Where the other axes leave little room, filling it would make a part of every step: two axes that
                // overlap would make millions. Halves keep the parts as square as they can be.
                match rest_bytes > max_bytes / 2 {
                    true => axis.len.div_ceil(2),
                    false => (max_bytes - rest_bytes) / axis.step_bytes(side) + 1,
                }
            }
            None => {
                let is_overlapped = !self.axes.is_empty() && self.run_bytes <= max_bytes;
                let fits = if is_overlapped { self.run_bytes.div_ceil(2) } else { max_bytes };
                (fits / self.elem_bytes).max(1) * self.elem_bytes
            }
        };
        Cut { block: self, axis, step, next: 0 }
    }
}

/// The parts that [`Block::split`] cuts, in order.
#[derive(Clone, Debug)]
pub struct Parts {
    side: Side,
    max_bytes: u64,
    whole: Option<Block>,
    /// Blocks that are being cut, each a part of the one before.
    cuts: SmallVec<[Cut; 4]>,
}

/// A block that is being cut along an axis, or along its run.
#[derive(Clone, Debug)]
struct Cut {
    block: Block,
    axis: Option<usize>,
    /// Steps of the axis, or bytes of the run, in a part.
    step: u64,
    next: u64,
}

impl Cut {
    fn next(&mut self) -> Option<Block> {
        let len = self.axis.map_or(self.block.run_bytes, |it| self.block.axes[it].len);
        let start = self.next;
        if start >= len {
            return None;
        }
        self.next += self.step;
        let mut part = self.block.clone();
        match self.axis {
            Some(index) => {
                let axis = &mut part.axes[index];
                part.source_byte += start * axis.source_step_bytes;
                part.target_byte += start * axis.target_step_bytes;
                axis.len = self.step.min(len - start);
                part.axes.retain(|it| it.len > 1);
            }
            None => {
                part.source_byte += start;
                part.target_byte += start;
                part.run_bytes = self.step.min(len - start);
            }
        }
        Some(part)
    }
}

impl Iterator for Parts {
    type Item = Block;

    fn next(&mut self) -> Option<Block> {
        loop {
            let block = match self.whole.take() {
                Some(whole) => whole,
                None => match self.cuts.last_mut()?.next() {
                    Some(part) => part,
                    None => {
                        self.cuts.pop();
                        continue;
                    }
                },
            };
            if block.span_bytes(self.side) <= self.max_bytes {
                return Some(block);
            }
            self.cuts.push(block.cut(self.side, self.max_bytes));
        }
    }
}

/// Layouts to test with, and what they mean.
#[cfg(test)]
pub(super) mod test_layouts {
    use crate::{dtype::DType, tensor::Layout};
    use proptest::prelude::*;

    /// Row-major bytes, an element at a time, as slowly and plainly as can be.
    pub(crate) fn slow(layout: &Layout, storage: &[u8]) -> Vec<u8> {
        let size = layout.dtype().size_bytes() as usize;
        let mut bytes = Vec::new();
        for number in 0..layout.n_elems() {
            let (mut rest, mut elem) = (number, layout.offset_elems());
            for (&len, &step) in layout.shape().iter().zip(layout.stride()).rev() {
                elem += rest % len * step;
                rest /= len;
            }
            bytes.extend_from_slice(&storage[elem as usize * size..][..size]);
        }
        bytes
    }

    pub(crate) fn any_layout() -> impl Strategy<Value = Layout> {
        let dims = prop::collection::vec((0u64..5, 0u64..7), 0..5);
        (
            dims,
            0u64..4,
            prop::sample::select(vec![DType::U8, DType::F16, DType::F32, DType::C64, DType::C128]),
        )
            .prop_map(|(dims, offset, dtype)| {
                let (shape, stride): (Vec<u64>, Vec<u64>) = dims.into_iter().unzip();
                Layout::strided(dtype, &shape, &stride, offset).unwrap()
            })
    }
}

#[cfg(test)]
mod tests {
    use super::{test_layouts::*, *};
    use crate::dtype::DType;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn windows_and_splits_gather_what_a_plain_walk_gathers(
            layout in any_layout(), max_elems in 1u64..40, max_bytes in 1u64..100,
        ) {
            let storage: Vec<u8> = (0..layout.stored_bytes().end).map(|it| (it * 7 % 251) as u8).collect();
            let at = vec![0; layout.shape().len()];
            let mut bytes = Vec::new();
            for window in Window::in_order(layout.shape(), max_elems) {
                let n_elems: u64 = window.shape.iter().product();
                prop_assert!(n_elems <= max_elems);
                let mut target = vec![0; (n_elems * layout.dtype().size_bytes()) as usize];
                let block = Block::within(&layout, &at, &window).unwrap();
                for part in block.split(Side::Source, max_bytes) {
                    prop_assert!(part.span_bytes(Side::Source) <= max_bytes.max(part.elem_bytes));
                    part.gather(&storage, &mut target);
                }
                bytes.extend(target);
            }
            prop_assert_eq!(bytes, slow(&layout, &storage));
        }
    }

    #[test]
    fn contiguous_bytes_are_one_run() {
        let layout = Layout::contiguous(DType::F32, &[3, 1, 4]).unwrap();
        let block = Block::within(&layout, &[0; 3], &Window::whole(layout.shape())).unwrap();
        assert_eq!((block.run_bytes, block.axes.len()), (48, 0));
        assert_eq!(block.split(Side::Source, 20).count(), 3);
    }

    #[test]
    fn overlapping_axes_split_into_few_parts() {
        let n = 1 << 22;
        let layout = Layout::strided(DType::U8, &[n, n], &[1, 1], 0).unwrap();
        let block = Block::within(&layout, &[0; 2], &Window::whole(layout.shape())).unwrap();
        let parts: Vec<Block> = block.split(Side::Source, n).collect();
        assert!(parts.len() <= 16, "{}", parts.len());
        assert_eq!(parts.iter().map(Block::len_bytes).sum::<u64>(), n * n);
    }

    #[test]
    fn extents_land_at_their_place_in_the_window() {
        // A 4 x 4 tensor whose right half is an extent of its own, seen through the two middle rows.
        let half = Layout::contiguous(DType::U8, &[4, 2]).unwrap();
        let window = Window { start: Dims::from_slice(&[1, 0]), shape: Dims::from_slice(&[2, 4]) };
        let mut target = [0; 8];
        Block::within(&half, &[0, 2], &window)
            .unwrap()
            .gather(&[10, 11, 12, 13, 14, 15, 16, 17], &mut target);
        assert_eq!(target, [0, 0, 12, 13, 0, 0, 14, 15]);
        assert_eq!(Block::within(&half, &[0, 4], &Window::whole(&[4, 4])), None);
    }

    #[test]
    fn a_tensor_without_elements_is_in_no_window_whatever_its_other_sizes() {
        let huge = 1 << 62;
        for shape in [[huge, 0, huge], [0, huge, huge], [huge, huge, 0]] {
            let layout = Layout::strided(DType::F64, &shape, &[huge; 3], u64::MAX).unwrap();
            assert_eq!(Block::within(&layout, &[0; 3], &Window::whole(&shape)), None);
            assert_eq!(Window::in_order(&shape, 100).count(), 0);
        }
    }
}
