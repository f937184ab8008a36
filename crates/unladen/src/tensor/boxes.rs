//! Cuts a block into boxes in the order in which the file holds them, so that a tensor that lies otherwise in memory than in
//! its file passes through a small buffer and is read once.

use super::block::{Axis, Block};
use smallvec::SmallVec;

/// The boxes of a block, found by their number: there may be millions, and nobody lists them.
#[derive(Clone, Debug)]
pub struct Boxes<'b> {
    block: &'b Block,
    /// The axes, those with the widest steps in the source first, and the run.
    cuts: SmallVec<[Cut; 5]>,
}

/// How an axis is cut, or the run.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// Position of the axis; none: the run.
    axis: Option<usize>,
    /// Its steps, or the run's elements.
    len: u64,
    /// How many of them a box takes.
    step: u64,
}

impl Block {
    /// Cuts it into boxes of at most `max_bytes`, or of one element.
    ///
    /// A box takes what is close together in the source: of a matrix that is turned over, some columns, which are lines of
    /// the file. Boxes ascend in the source, unless elements share bytes there.
    pub fn boxes(&self, max_bytes: u64) -> Boxes<'_> {
        let axes = self.axes.iter().enumerate();
        let mut cuts: SmallVec<[Cut; 5]> =
            axes.map(|(axis, it)| Cut { axis: Some(axis), len: it.len, step: 1 }).collect();
        let source_step_bytes = |it: &Cut| it.axis.map_or(0, |axis| self.axes[axis].source_step_bytes);
        cuts.sort_by_key(|it| std::cmp::Reverse(source_step_bytes(it)));
        cuts.push(Cut { axis: None, len: self.run_bytes / self.elem_bytes, step: 1 });
        // From the run on outwards: all of an axis, as long as a box has room for it.
        let mut room_elems = (max_bytes / self.elem_bytes).max(1);
        for cut in cuts.iter_mut().rev() {
            cut.step = cut.len.clamp(1, room_elems);
            room_elems /= cut.step;
        }
        Boxes { block: self, cuts }
    }

    /// The same in two copies: into a buffer where the bytes lie close together, in the target's order, and from there.
    pub fn by_way_of_a_buffer(&self) -> (Block, Block) {
        let mut by_target: SmallVec<[usize; 4]> = (0..self.axes.len()).collect();
        by_target.sort_by_key(|&it| self.axes[it].target_step_bytes);
        let mut gather = Block { target_byte: 0, ..self.clone() };
        let mut scatter = Block { source_byte: 0, axes: SmallVec::new(), ..self.clone() };
        let mut end_bytes = self.run_bytes;
        for index in by_target {
            let Axis { len, target_step_bytes, .. } = self.axes[index];
            gather.axes[index].target_step_bytes = end_bytes;
            scatter.put_outside(Axis { len, source_step_bytes: end_bytes, target_step_bytes });
            end_bytes *= len;
        }
        scatter.axes.reverse();
        (gather, scatter)
    }
}

impl Boxes<'_> {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.cuts.iter().map(|it| it.len.div_ceil(it.step)).product()
    }

    /// Bytes of the largest.
    pub fn max_bytes(&self) -> u64 {
        self.cuts.iter().map(|it| it.step).product::<u64>() * self.block.elem_bytes
    }

    /// One of them, by its number; none behind the last.
    pub fn get(&self, number: u64) -> Option<Block> {
        if number >= self.count() {
            return None;
        }
        let mut part = self.block.clone();
        let mut rest = number;
        for &Cut { axis, len, step } in self.cuts.iter().rev() {
            let n_parts = len.div_ceil(step);
            let start = rest % n_parts * step;
            rest /= n_parts;
            let len = step.min(len - start);
            let [source_step_bytes, target_step_bytes] = match axis {
                Some(axis) => {
                    let axis = &mut part.axes[axis];
                    axis.len = len;
                    [axis.source_step_bytes, axis.target_step_bytes]
                }
                None => {
                    part.run_bytes = len * part.elem_bytes;
                    [part.elem_bytes; 2]
                }
            };
            part.source_byte += start * source_step_bytes;
            part.target_byte += start * target_step_bytes;
        }
        part.axes.retain(|it| it.len > 1);
        Some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType,
        tensor::{Layout, Side, Window, block::test_layouts::*},
    };
    use proptest::prelude::*;

    fn whole(layout: &Layout) -> Option<Block> {
        Block::within(layout, &vec![0; layout.shape().len()], &Window::whole(layout.shape()))
    }

    proptest! {
        #[test]
        fn boxes_by_way_of_a_buffer_bring_what_a_plain_walk_brings(
            layout in any_layout(), max_bytes in 1u64..200,
        ) {
            let storage: Vec<u8> = (0..layout.stored_bytes().end).map(|it| (it * 7 % 251) as u8).collect();
            let mut bytes = vec![0xEE; layout.len_bytes() as usize];
            if let Some(block) = whole(&layout) {
                let boxes = block.boxes(max_bytes);
                for number in 0..boxes.count() {
                    let part = boxes.get(number).unwrap();
                    let (gather, scatter) = part.by_way_of_a_buffer();
                    prop_assert!(part.len_bytes() <= boxes.max_bytes());
                    prop_assert!(boxes.max_bytes() <= max_bytes.max(part.elem_bytes));
                    let mut buffer = vec![0xDD; part.len_bytes() as usize];
                    gather.gather(&storage, &mut buffer);
                    scatter.gather(&buffer, &mut bytes);
                }
                prop_assert_eq!(boxes.get(boxes.count()), None);
            }
            prop_assert_eq!(bytes, slow(&layout, &storage));
        }

        #[test]
        fn a_permuted_tensor_is_read_once_and_in_order(
            shape in prop::collection::vec(1u64..7, 1..5), seed in 0usize..24, max_bytes in 4u64..300,
        ) {
            // Contiguous in the file, its dimensions in another order in memory.
            let mut order: Vec<usize> = (0..shape.len()).collect();
            for (at, by) in (0..shape.len()).zip([seed, seed / 2, seed / 3, seed / 4]) {
                order.swap(at, by % shape.len());
            }
            let mut stride = vec![0; shape.len()];
            let mut end = 1;
            for dim in order {
                stride[dim] = end;
                end *= shape[dim];
            }
            let layout = Layout::strided(DType::F32, &shape, &stride, 0).unwrap();
            let block = whole(&layout).unwrap();
            let boxes = block.boxes(max_bytes);
            let mut read_bytes = 0;
            for part in (0..boxes.count()).map(|it| boxes.get(it).unwrap()) {
                prop_assert_eq!(part.source_byte, read_bytes);
                prop_assert_eq!(part.span_bytes(Side::Source), part.len_bytes());
                read_bytes += part.len_bytes();
            }
            prop_assert_eq!(read_bytes, layout.len_bytes());
        }
    }

    #[test]
    fn a_matrix_turned_over_goes_by_lines_of_the_file_and_lies_in_lines_of_memory() {
        // 100 x 8 elements of 4 bytes, of which the file holds the columns one after the other.
        let layout = Layout::strided(DType::F32, &[100, 8], &[1, 100], 0).unwrap();
        let block = whole(&layout).unwrap();
        let boxes = block.boxes(1200);
        assert_eq!(boxes.count(), 3);
        let part = boxes.get(1).unwrap();
        assert_eq!((part.source_byte, part.len_bytes(), part.target_byte), (1200, 1200, 12));
        let (_, scatter) = part.by_way_of_a_buffer();
        let lines = Axis { len: 100, source_step_bytes: 12, target_step_bytes: 32 };
        assert_eq!((scatter.run_bytes, &scatter.axes[..]), (12, &[lines][..]));
    }

    #[test]
    fn elements_that_are_repeated_cost_no_more_boxes_than_they_fill() {
        let n = 1 << 40;
        let layout = Layout::strided(DType::U8, &[n, 16], &[0, 1], 0).unwrap();
        assert_eq!(whole(&layout).unwrap().boxes(1 << 20).count(), (n * 16) >> 20);
    }
}
