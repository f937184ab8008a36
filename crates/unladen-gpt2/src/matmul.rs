//! Matrix products on borrowed memory: the one place that hands pointers to the `gemm` crate.
#![allow(unsafe_code)]

use crate::few;
use std::ops::Range;

/// A matrix in borrowed memory, any strides: element `(row, col)` is `elements[row * row_step + col * col_step]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    elements: &'a [f32],
    rows: usize,
    cols: usize,
    row_step: usize,
    col_step: usize,
}

impl<'a> Matrix<'a> {
    /// Sees `elements` as a matrix. `None`: they do not reach to its last element.
    pub(crate) fn new(
        elements: &'a [f32],
        [rows, cols]: [usize; 2],
        [row_step, col_step]: [usize; 2],
    ) -> Option<Matrix<'a>> {
        // A step that is never taken may be any number; it must not reach pointer arithmetic.
        let row_step = if rows > 1 { row_step } else { 0 };
        let col_step = if cols > 1 { col_step } else { 0 };
        let last = |len: usize, step: usize| len.saturating_sub(1).checked_mul(step);
        let end = last(rows, row_step)?.checked_add(last(cols, col_step)?)?.checked_add(1)?;
        (rows == 0 || cols == 0 || end <= elements.len()).then_some(Matrix {
            elements,
            rows,
            cols,
            row_step,
            col_step,
        })
    }

    /// Row-major elements, rows `row_step` apart.
    ///
    /// Panics if they are too few, as a slice does: every caller in this crate has made the buffer for the shape.
    pub(crate) fn rows(elements: &'a [f32], [rows, cols]: [usize; 2], row_step: usize) -> Matrix<'a> {
        Matrix::new(elements, [rows, cols], [row_step, 1]).expect("a buffer that was made for the shape")
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Rows become columns; nothing moves.
    pub(crate) fn transposed(self) -> Matrix<'a> {
        let Matrix { rows, cols, row_step, col_step, .. } = self;
        Matrix { rows: cols, cols: rows, row_step: col_step, col_step: row_step, ..self }
    }

    /// Some of the rows. Panics if there are fewer, as a slice does.
    pub(crate) fn slice_rows(self, range: Range<usize>) -> Matrix<'a> {
        assert!(range.start <= range.end && range.end <= self.rows, "{range:?} of {} rows", self.rows);
        let start = if range.is_empty() { 0 } else { range.start * self.row_step };
        Matrix { elements: &self.elements[start..], rows: range.len(), ..self }
    }

    /// True if the elements of a row lie side by side.
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.col_step == 1 || self.cols == 1
    }

    /// A row whose elements lie side by side. Panics if there is no such row, as a slice does.
    pub(crate) fn contiguous_row(self, row: usize) -> &'a [f32] {
        let row = self.slice_rows(row..row + 1);
        debug_assert!(row.has_contiguous_rows(), "rows of steps of {}", row.col_step);
        &row.elements[..row.cols]
    }

    /// The elements of a row. Panics if there is no such row, as a slice does.
    pub(crate) fn row(self, row: usize) -> impl Iterator<Item = f32> {
        let row = self.slice_rows(row..row + 1);
        (0..row.cols).map(move |col| row.elements[col * row.col_step])
    }
}

/// The right matrix of products: columns, each a token's numbers. What makes products with few of them fast is done once.
pub(crate) struct Columns<'a> {
    matrix: Matrix<'a>,
    /// Few columns, one after the other. Empty if they are many.
    turned: Vec<f32>,
}

impl<'a> Columns<'a> {
    /// Sees the columns of `matrix`; copies them if they are few.
    pub(crate) fn new(matrix: Matrix<'a>) -> Columns<'a> {
        let mut turned = Vec::new();
        if matrix.cols <= few::MAX_COLS && matrix.rows > 0 {
            turned.reserve_exact(matrix.rows * matrix.cols);
            for col in 0..matrix.cols {
                let column = matrix.elements[col * matrix.col_step..].iter();
                turned.extend(column.step_by(matrix.row_step.max(1)).take(matrix.rows));
            }
        }
        Columns { matrix, turned }
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.matrix.shape()
    }
}

/// What becomes of the numbers that stand in the target of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// They are replaced.
    Overwrite,
    /// The product is added to them.
    Add,
}

/// `target = factor · left · right`, or `target +=` it, on the calling thread.
///
/// `target` is row-major, its rows `target_step` apart. Panics if the shapes disagree or the target is too short: the
/// shapes are this crate's own, whatever the input was.
pub(crate) fn multiply(
    into: Target,
    target: &mut [f32],
    target_step: usize,
    factor: f32,
    left: Matrix<'_>,
    right: &Columns<'_>,
) {
    let Columns { matrix: right, turned } = right;
    let [rows, cols] = [left.rows, right.cols];
    assert_eq!(left.cols, right.rows, "inner sizes");
    if rows == 0 || cols == 0 {
        return;
    }
    // Rows that overlapped would be written twice, with a result that depends on the order.
    assert!(rows == 1 || target_step >= cols, "rows of {cols} elements, {target_step} apart");
    let last = (rows - 1).checked_mul(target_step).and_then(|it| it.checked_add(cols - 1));
    assert!(last.is_some_and(|it| it < target.len()), "a target for {rows} rows of {cols} elements");
    let is_added = into == Target::Add;
    if !turned.is_empty() && few::takes(left) {
        return few::multiply(left, turned, |row, col, product| {
            let it = &mut target[row * target_step + col];
            *it = if is_added { *it + factor * product } else { factor * product };
        });
    }
    // SAFETY: `gemm` reads the elements `(row, col)` of `left` and `right` and reads and writes those of `target`, for
    // rows and columns below the sizes that it is given, at `row * row_step + col * col_step` from the pointers.
    // - Reads: `Matrix::new` checked that the last such element lies inside `elements`, and `transposed` and `slice_rows`
    //   keep that true (fewer rows, from a start that is an element's place). No element has a smaller place than the first.
    // - Writes: the assertions above checked the last element of `target`, and that no two are the same one. `target` is
    //   borrowed mutably, so it overlaps neither `left` nor `right`, and nobody else reads it.
    // - Every step is at most the length of a slice of `f32`, or 0, so it fits an `isize`; `target_step` is used only
    //   when there is more than one row, and then lies below `target.len()` too.
    // - `f32` is a type that `gemm` takes, and every bit pattern of it is a number.
    unsafe {
        gemm::gemm(
            rows,
            cols,
            left.cols,
            target.as_mut_ptr(),
            1,
            if rows > 1 { target_step as isize } else { 1 },
            is_added,
            left.elements.as_ptr(),
            left.col_step as isize,
            left.row_step as isize,
            right.elements.as_ptr(),
            right.col_step as isize,
            right.row_step as isize,
            if is_added { 1.0 } else { 0.0 },
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, salt: usize) -> Vec<f32> {
        (0..n).map(|it| ((it * 31 + salt) % 17) as f32 - 8.0).collect()
    }

    #[test]
    fn products_of_all_shapes_and_orientations_are_the_plain_sums() {
        for (rows, inner, cols) in [(1, 1, 1), (1, 5, 9), (7, 3, 1), (33, 40, 5), (20, 70, 64), (130, 2, 31)]
        {
            for orientation in 0..4 {
                let (a, b) = (numbers(rows * inner, 1), numbers(inner * cols, 2));
                let left = match orientation & 1 {
                    0 => Matrix::rows(&a, [rows, inner], inner),
                    _ => Matrix::rows(&a, [inner, rows], rows).transposed(),
                };
                let right = match orientation & 2 {
                    0 => Matrix::rows(&b, [inner, cols], cols),
                    _ => Matrix::rows(&b, [cols, inner], inner).transposed(),
                };
                let step = cols + 3;
                let mut target = vec![1.0; (rows - 1) * step + cols];
                multiply(Target::Overwrite, &mut target, step, 1.0, left, &Columns::new(right));
                multiply(Target::Add, &mut target, step, 2.0, left, &Columns::new(right));
                for row in 0..rows {
                    let at = row * step;
                    for col in 0..cols {
                        let column = right.transposed().row(col);
                        let sum: f32 = left.row(row).zip(column).map(|(a, b)| a * b).sum();
                        assert_eq!(target[at + col], 3.0 * sum, "{rows} {inner} {cols} {orientation}");
                    }
                    let gap = target.get(at + cols..at + step).unwrap_or_default();
                    assert!(gap.iter().all(|&it| it == 1.0), "elements between rows are left alone");
                }
            }
        }
    }

    #[test]
    fn few_columns_give_the_sums_of_many_in_every_orientation() {
        for (rows, inner) in [(1, 1), (1, 37), (3, 5), (4, 8), (7, 64), (13, 33), (34, 17), (70, 130)] {
            for cols in 1..=few::MAX_COLS + 1 {
                for orientation in 0..4 {
                    let gap = orientation; // elements between rows
                    let (long, wide) = ((rows + gap) * inner, (inner + gap) * rows);
                    let a: Vec<f32> = numbers(long.max(wide), 1).iter().map(|it| it / 7.0).collect();
                    let left = match orientation & 1 {
                        0 => Matrix::rows(&a, [rows, inner], inner + gap),
                        _ => Matrix::rows(&a, [inner, rows], rows + gap).transposed(),
                    };
                    let b: Vec<f32> = numbers(inner * cols, 2).iter().map(|it| it / 3.0).collect();
                    let right = match orientation & 2 {
                        0 => Matrix::rows(&b, [inner, cols], cols),
                        _ => Matrix::rows(&b, [cols, inner], inner).transposed(),
                    };
                    let few = Columns::new(right);
                    assert_eq!(few.turned.is_empty(), cols > few::MAX_COLS);
                    let many = Columns { matrix: right, turned: Vec::new() };
                    let mut targets = [vec![0.5; rows * cols], vec![0.5; rows * cols]];
                    for (target, right) in targets.iter_mut().zip([&few, &many]) {
                        multiply(Target::Overwrite, target, cols, 0.5, left, right);
                        multiply(Target::Add, target, cols, 2.0, left, right);
                    }
                    let largest = targets[1].iter().fold(0f32, |max, it| max.max(it.abs()));
                    for (few, many) in targets[0].iter().zip(&targets[1]) {
                        let is_close = (few - many).abs() <= 1e-5 * largest;
                        assert!(is_close, "{rows} {inner} {cols} {orientation}: {few}, not {many}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_product_over_nothing_is_zero() {
        let (left, right) = (Matrix::rows(&[], [3, 0], 0), Matrix::rows(&[], [0, 2], 2));
        let mut target = [1.0; 6];
        multiply(Target::Add, &mut target, 2, 1.0, left, &Columns::new(right));
        assert_eq!(target, [1.0; 6]);
        multiply(Target::Overwrite, &mut target, 2, 1.0, left, &Columns::new(right));
        assert_eq!(target, [0.0; 6]);
    }

    #[test]
    fn a_matrix_that_its_elements_do_not_hold_is_none() {
        let elements = [0.0; 11];
        assert!(Matrix::new(&elements, [3, 4], [4, 1]).is_none());
        assert!(Matrix::new(&elements, [3, 3], [4, 1]).is_some());
        assert!(Matrix::new(&elements, [1, 11], [usize::MAX, 1]).is_some());
        assert!(Matrix::new(&elements, [2, 2], [usize::MAX, 1]).is_none());
    }
}
