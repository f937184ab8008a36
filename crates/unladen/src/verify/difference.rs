//! How two tensors of one type and shape differ: how many elements, where first, and by how much.

use super::value::{self, real};
use crate::dtype::DType;

/// How the elements of two tensors differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Elements {
    /// How many there are.
    pub n_elems: u64,
    /// How many have other bytes: NaNs of another payload and zeros of another sign are different.
    pub n_different: u64,
    /// The index of the first that differs.
    pub first_index: Vec<u64>,
    /// What that is on either side.
    pub values: [String; 2],
    /// The most that two finite floats (or halves of complex numbers) are apart; `None` for other types.
    pub max_abs_difference: Option<f64>,
    /// Pairs of different floats of which one at least is infinite or no number.
    pub n_not_finite: u64,
}

/// What was seen of two tensors so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tally {
    n_different: u64,
    /// Position in row-major order, and the values.
    first: Option<(u64, [String; 2])>,
    max_abs_difference: Option<f64>,
    n_not_finite: u64,
}

/// Equal runs are passed over this many bytes at a time: whole elements of any type.
const BLOCK_BYTES: usize = 4096;

impl Tally {
    /// Compares elements, as many on either side. The first of them is at `at_elem` in the tensors' row-major order.
    pub(super) fn add(&mut self, dtype: DType, at_elem: u64, one: &[u8], other: &[u8]) {
        let elem_bytes = dtype.size_bytes() as usize;
        let blocks = one.chunks(BLOCK_BYTES).zip(other.chunks(BLOCK_BYTES)).enumerate();
        for (index, (one, other)) in blocks.filter(|(_, (one, other))| one != other) {
            let at_elem = at_elem + (index * (BLOCK_BYTES / elem_bytes)) as u64;
            let elems = one.chunks_exact(elem_bytes).zip(other.chunks_exact(elem_bytes));
            for (index, (one, other)) in elems.enumerate().filter(|(_, (one, other))| one != other) {
                self.n_different += 1;
                self.first.get_or_insert_with(|| {
                    (at_elem + index as u64, [one, other].map(|it| value::show(dtype, it)))
                });
                self.measure(dtype, one, other);
            }
        }
    }

    fn measure(&mut self, dtype: DType, one: &[u8], other: &[u8]) {
        let Some(real) = real(dtype) else { return };
        let mut is_finite = true;
        for (one, other) in one.chunks_exact(real.len_bytes).zip(other.chunks_exact(real.len_bytes)) {
            let (one, other) = ((real.read)(one), (real.read)(other));
            match one.is_finite() && other.is_finite() {
                true => {
                    let apart = (one - other).abs();
                    self.max_abs_difference = Some(self.max_abs_difference.unwrap_or(0.0).max(apart));
                }
                false => is_finite = false,
            }
        }
        self.n_not_finite += u64::from(!is_finite);
    }

    /// What was seen of another part of the same tensors.
    pub(super) fn join(&mut self, other: Tally) {
        self.n_different += other.n_different;
        self.n_not_finite += other.n_not_finite;
        if other.first.as_ref().is_some_and(|(at, _)| self.first.as_ref().is_none_or(|(first, _)| at < first))
        {
            self.first = other.first;
        }
        let apart = self.max_abs_difference.into_iter().chain(other.max_abs_difference);
        self.max_abs_difference = apart.reduce(f64::max);
    }

    /// What there is to say of tensors of this shape; `None`: nothing, they are the same.
    pub(super) fn finish(&self, shape: &[u64]) -> Option<Elements> {
        let (at_elem, values) = self.first.clone()?;
        Some(Elements {
            n_elems: shape.iter().product(),
            n_different: self.n_different,
            first_index: index(at_elem, shape),
            values,
            max_abs_difference: self.max_abs_difference,
            n_not_finite: self.n_not_finite,
        })
    }
}

/// The index of an element by its position in row-major order.
fn index(position: u64, shape: &[u64]) -> Vec<u64> {
    let mut left = position;
    let mut index: Vec<u64> = { shape.iter().rev() }
        .map(|&len| {
            let at = left % len.max(1);
            left /= len.max(1);
            at
        })
        .collect();
    index.reverse();
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(of: impl Fn(usize) -> f32) -> Vec<u8> {
        (0..6000).flat_map(|it| of(it).to_le_bytes()).collect()
    }

    #[test]
    fn differences_are_counted_placed_and_measured() {
        let one = floats(|it| it as f32);
        let other = floats(|it| match it {
            2500 => 2500.25,
            2501 => f32::INFINITY,
            5999 => 5998.5,
            _ => it as f32,
        });
        let mut tally = Tally::default();
        tally.add(DType::F32, 0, &one, &other);
        let found = tally.finish(&[2, 3, 1000]).unwrap();
        assert_eq!((found.n_elems, found.n_different, found.n_not_finite), (6000, 3, 1));
        assert_eq!((found.first_index, found.max_abs_difference), (vec![0, 2, 500], Some(0.5)));
        assert_eq!(found.values, ["2500.0", "2500.25"]);
    }

    #[test]
    fn parts_in_any_order_say_what_the_whole_says() {
        let one = floats(|it| it as f32);
        let other = floats(|it| it as f32 + f32::from(u8::from(it % 1000 == 7)));
        let mut whole = Tally::default();
        whole.add(DType::F32, 0, &one, &other);
        let mut joined = Tally::default();
        for part in [2000..6000, 0..2000] {
            let bytes = part.start * 4..part.end * 4;
            let mut tally = Tally::default();
            tally.add(DType::F32, part.start as u64, &one[bytes.clone()], &other[bytes]);
            joined.join(tally);
        }
        assert_eq!(joined, whole);
        assert_eq!(joined.finish(&[6000]).unwrap().n_different, 6);
    }

    #[test]
    fn equal_bytes_are_no_difference_and_zeros_of_two_signs_are_one() {
        let mut tally = Tally::default();
        tally.add(DType::I64, 0, &[7; 80], &[7; 80]);
        assert_eq!(tally.finish(&[10]), None);
        tally.add(DType::F32, 0, &0f32.to_le_bytes(), &(-0f32).to_le_bytes());
        assert_eq!(tally.finish(&[]).map(|it| it.max_abs_difference), Some(Some(0.0)));
    }

    #[test]
    fn integers_have_no_distance_and_complex_numbers_that_of_their_halves() {
        let mut integers = Tally::default();
        integers.add(DType::I32, 0, &1i32.to_le_bytes(), &5i32.to_le_bytes());
        assert_eq!(integers.finish(&[1]).unwrap().max_abs_difference, None);
        let mut complex = Tally::default();
        let [one, other] = [[1f32, 2.0], [1.5, 4.0]].map(|it| it.map(f32::to_le_bytes).concat());
        complex.add(DType::C64, 0, &one, &other);
        let found = complex.finish(&[1]).unwrap();
        assert_eq!((found.n_different, found.max_abs_difference), (1, Some(2.0)));
        assert_eq!(found.values, ["(1.0, 2.0)", "(1.5, 4.0)"]);
    }
}
