//! Copies a block: the inner loops, which decide how fast strided tensors load.

use super::{Axis, Block, Dims};

/// Bytes of a cache line, which is what memory hands out.
const LINE_BYTES: usize = 64;

/// Elements of a target's run that a tile holds.
const TILE_LEN: usize = 64;

impl Block {
    /// Copies the block. `source` and `target` start at the bytes that `source_byte` and `target_byte` count from.
    pub fn gather(&self, source: &[u8], target: &mut [u8]) {
        match self.run_bytes {
            1 => self.gather_elements::<1>(source, target),
            2 => self.gather_elements::<2>(source, target),
            4 => self.gather_elements::<4>(source, target),
            8 => self.gather_elements::<8>(source, target),
            16 => self.gather_elements::<16>(source, target),
            run_bytes => self.for_each_row(&self.axes, |source_byte, target_byte, inner| {
                let (mut from, mut to) = (source_byte, target_byte);
                for _ in 0..inner.len {
                    target[to..to + run_bytes as usize]
                        .copy_from_slice(&source[from..from + run_bytes as usize]);
                    (from, to) =
                        (from + inner.source_step_bytes as usize, to + inner.target_step_bytes as usize);
                }
            }),
        }
    }

    /// Runs of `N` bytes, a length that the compiler knows.
    fn gather_elements<const N: usize>(&self, source: &[u8], target: &mut [u8]) {
        let is_turned = |axis: &Axis| axis.source_step_bytes == N as u64;
        let written_in_order = self.axes.last().filter(|axis| axis.target_step_bytes == N as u64);
        let turned = self.axes.iter().position(is_turned);
        let (Some(inner), Some(outer)) = (written_in_order, turned.filter(|it| it + 1 < self.axes.len()))
        else {
            self.for_each_row(&self.axes, |source_byte, target_byte, inner| {
                copy_runs::<N>(inner, &source[source_byte..], &mut target[target_byte..]);
            });
            return;
        };
        // The file goes along one axis, memory along another: a matrix turned over.
        let mut rest = self.axes.clone();
        rest.pop();
        let outer = rest.remove(outer);
        rest.push(Axis { len: 1, source_step_bytes: 0, target_step_bytes: 0 });
        self.for_each_row(&rest, |source_byte, target_byte, _| {
            turn::<N>([*inner, outer], &source[source_byte..], &mut target[target_byte..]);
        });
    }

    /// Calls `row` with the place on either side where each turn of the last of `axes` starts.
    fn for_each_row(&self, axes: &[Axis], mut row: impl FnMut(usize, usize, Axis)) {
        // The innermost loop runs over the last axis; the others turn like an odometer.
        let (outer, inner) = match axes.split_last() {
            Some((inner, outer)) => (outer, *inner),
            None => (&[][..], Axis { len: 1, source_step_bytes: 0, target_step_bytes: 0 }),
        };
        let mut index = Dims::from_elem(0, outer.len());
        let (mut source_byte, mut target_byte) = (self.source_byte as usize, self.target_byte as usize);
        loop {
            row(source_byte, target_byte, inner);
            let mut dim = outer.len();
            loop {
                if dim == 0 {
                    return;
                }
                dim -= 1;
                let axis = outer[dim];
                index[dim] += 1;
                source_byte += axis.source_step_bytes as usize;
                target_byte += axis.target_step_bytes as usize;
                if index[dim] < axis.len {
                    break;
                }
                index[dim] = 0;
                source_byte -= (axis.len * axis.source_step_bytes) as usize;
                target_byte -= (axis.len * axis.target_step_bytes) as usize;
            }
        }
    }
}

/// `inner.len` runs of `N` bytes.
fn copy_runs<const N: usize>(inner: Axis, source: &[u8], target: &mut [u8]) {
    let (mut from, mut to) = (0, 0);
    for _ in 0..inner.len {
        target[to..to + N].copy_from_slice(&source[from..from + N]);
        (from, to) = (from + inner.source_step_bytes as usize, to + inner.target_step_bytes as usize);
    }
}

/// Turns a matrix over: `inner` steps over elements in the target, `outer` over elements in the source.
///
/// By tiles of a cache line's elements of many rows, so that each line is read once: rows of a matrix are often a power
/// of two apart, and then the cache holds only a few of their lines at the same time.
fn turn<const N: usize>([inner, outer]: [Axis; 2], source: &[u8], target: &mut [u8]) {
    let width = (LINE_BYTES / N).max(1);
    let [rows, columns] = [inner.len as usize, outer.len as usize];
    let [row_step, column_step] = [inner.source_step_bytes as usize, outer.target_step_bytes as usize];
    let mut tile = [0u8; LINE_BYTES * TILE_LEN];
    let (tile, _) = tile.as_chunks_mut::<N>();
    for first_column in (0..columns).step_by(width) {
        let width = width.min(columns - first_column);
        for first_row in (0..rows).step_by(TILE_LEN) {
            let height = TILE_LEN.min(rows - first_row);
            for row in 0..height {
                let from = (first_row + row) * row_step + first_column * N;
                let (elements, _) = source[from..from + width * N].as_chunks::<N>();
                for (column, element) in elements.iter().enumerate() {
                    tile[column * TILE_LEN + row] = *element;
                }
            }
            for column in 0..width {
                let to = (first_column + column) * column_step + first_row * N;
                let elements = &tile[column * TILE_LEN..column * TILE_LEN + height];
                target[to..to + height * N].copy_from_slice(elements.as_flattened());
            }
        }
    }
}
