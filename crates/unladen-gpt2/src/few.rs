//! Matrix products with few columns, at the speed of the memory in which the left matrix lies.
//!
//! A product with one to eight columns does so little with each weight that reading the weights is all that takes time.
//! So they are read once, in the order in which they lie, and nothing is made of them on the way; the columns and the
//! sums stay in the caches. With more columns it pays to rearrange the weights first, which `matmul` leaves to `gemm`.

use crate::matmul::Matrix;
use pulp::{Arch, Simd, WithSimd};

/// The most columns for which reading the weights takes longer than computing with them.
pub(crate) const MAX_COLS: usize = 8;

/// Rows and columns that are computed together: their sums, and what goes into them, fit in sixteen registers.
const N_ROWS: usize = 4;
const N_COLS: usize = 3;

/// Lines that are added up before a sum goes back to its place in the cache.
const N_LINES: usize = 4;

/// True if [`multiply`] takes a left matrix that lies in memory like this one.
pub(crate) fn takes(left: Matrix<'_>) -> bool {
    left.has_contiguous_rows() || left.transposed().has_contiguous_rows()
}

/// Passes every `(row, col, element)` of `left · right` to `write`. `columns` are the contiguous columns of `right`, at
/// least one element each, `left` is one that this file [`takes`].
pub(crate) fn multiply(left: Matrix<'_>, columns: &[f32], mut write: impl FnMut(usize, usize, f32)) {
    let arch = Arch::new();
    if left.has_contiguous_rows() {
        arch.dispatch(Dots { left, columns, write });
        return;
    }
    let [rows, inner] = left.shape();
    let mut sums = vec![0.0; columns.len() / inner * rows]; // (cols, rows)
    arch.dispatch(Sums { lines: left.transposed(), columns, sums: &mut sums });
    for (col, sums) in sums.chunks_exact(rows).enumerate() {
        sums.iter().enumerate().for_each(|(row, &sum)| write(row, col, sum));
    }
}

/// The first matrix's rows, contiguous, times the columns.
struct Dots<'a, W> {
    left: Matrix<'a>,
    columns: &'a [f32], // (cols, inner)
    write: W,
}

impl<W: FnMut(usize, usize, f32)> WithSimd for Dots<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let [rows, _] = self.left.shape();
        let whole = rows - rows % N_ROWS;
        for row in (0..whole).step_by(N_ROWS) {
            self.rows::<S, N_ROWS>(simd, row);
        }
        for row in whole..rows {
            self.rows::<S, 1>(simd, row);
        }
    }
}

impl<W: FnMut(usize, usize, f32)> Dots<'_, W> {
    #[inline(always)]
    fn rows<S: Simd, const ROWS: usize>(&mut self, simd: S, row: usize) {
        let [_, inner] = self.left.shape();
        let n_cols = self.columns.len() / inner;
        for col in (0..n_cols).step_by(N_COLS) {
            match n_cols - col {
                1 => self.tile::<S, ROWS, 1>(simd, row, col),
                2 => self.tile::<S, ROWS, 2>(simd, row, col),
                _ => self.tile::<S, ROWS, N_COLS>(simd, row, col),
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const ROWS: usize, const COLS: usize>(&mut self, simd: S, row: usize, col: usize) {
        let [_, inner] = self.left.shape();
        let n_vectors = inner / S::F32_LANES;
        let mut rows: [(&[S::f32s], &[f32]); ROWS] = [(&[], &[]); ROWS];
        for (r, it) in rows.iter_mut().enumerate() {
            *it = S::as_simd_f32s(self.left.contiguous_row(row + r));
        }
        let mut columns: [(&[S::f32s], &[f32]); COLS] = [(&[], &[]); COLS];
        for (c, it) in columns.iter_mut().enumerate() {
            *it = S::as_simd_f32s(&self.columns[(col + c) * inner..(col + c + 1) * inner]);
        }
        let mut sums = [[simd.splat_f32s(0.0); COLS]; ROWS];
        for at in 0..n_vectors {
            for r in 0..ROWS {
                for c in 0..COLS {
                    sums[r][c] = simd.mul_add_e_f32s(rows[r].0[at], columns[c].0[at], sums[r][c]);
                }
            }
        }
        for r in 0..ROWS {
            for c in 0..COLS {
                let mut sum = simd.reduce_sum_f32s(sums[r][c]);
                for (a, b) in rows[r].1.iter().zip(columns[c].1) {
                    sum += a * b;
                }
                (self.write)(row + r, col + c, sum);
            }
        }
    }
}

/// Contiguous lines, each times the element of the columns that belongs to it, added up to a sum per column.
struct Sums<'a> {
    lines: Matrix<'a>,   // (inner, rows)
    columns: &'a [f32],  // (cols, inner)
    sums: &'a mut [f32], // (cols, rows)
}

impl WithSimd for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let [inner, _] = self.lines.shape();
        let whole = inner - inner % N_LINES;
        for line in (0..whole).step_by(N_LINES) {
            self.lines::<S, N_LINES>(simd, line);
        }
        for line in whole..inner {
            self.lines::<S, 1>(simd, line);
        }
    }
}

impl Sums<'_> {
    #[inline(always)]
    fn lines<S: Simd, const LINES: usize>(&mut self, simd: S, line: usize) {
        let [inner, _] = self.lines.shape();
        let n_cols = self.columns.len() / inner;
        for col in (0..n_cols).step_by(N_COLS) {
            match n_cols - col {
                1 => self.tile::<S, LINES, 1>(simd, line, col),
                2 => self.tile::<S, LINES, 2>(simd, line, col),
                _ => self.tile::<S, LINES, N_COLS>(simd, line, col),
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const LINES: usize, const COLS: usize>(&mut self, simd: S, line: usize, col: usize) {
        let [inner, rows] = self.lines.shape();
        let n_vectors = rows / S::F32_LANES;
        let mut lines: [(&[S::f32s], &[f32]); LINES] = [(&[], &[]); LINES];
        for (at, it) in lines.iter_mut().enumerate() {
            *it = S::as_simd_f32s(self.lines.contiguous_row(line + at));
        }
        let mut factors = [[0.0; LINES]; COLS];
        for (at, it) in factors.iter_mut().enumerate() {
            it.copy_from_slice(&self.columns[(col + at) * inner + line..][..LINES]);
        }
        let mut spread = [[simd.splat_f32s(0.0); LINES]; COLS];
        for c in 0..COLS {
            for l in 0..LINES {
                spread[c][l] = simd.splat_f32s(factors[c][l]);
            }
        }
        let (sums, _) = self.sums[col * rows..].split_at_mut(COLS * rows);
        for at in 0..n_vectors {
            for c in 0..COLS {
                let (head, _) = S::as_mut_simd_f32s(&mut sums[c * rows..(c + 1) * rows]);
                let mut sum = head[at];
                for l in 0..LINES {
                    sum = simd.mul_add_e_f32s(lines[l].0[at], spread[c][l], sum);
                }
                head[at] = sum;
            }
        }
        for c in 0..COLS {
            let (_, tail) = S::as_mut_simd_f32s(&mut sums[c * rows..(c + 1) * rows]);
            for l in 0..LINES {
                for (sum, it) in tail.iter_mut().zip(lines[l].1) {
                    *sum += it * factors[c][l];
                }
            }
        }
    }
}
