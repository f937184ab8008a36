//! The rules that indices keep, those that PyTorch checks with `check_invariants=True`: pure functions over numbers that
//! come one by one. Each ends at the first that is wrong, with what was expected and what was found.

use super::{Numbers, n_in_front};
use crate::{checkpoint::SparseLayout, error::Result, tensor::Layout};

/// What was expected, and what was found.
pub(super) type Told = (String, String);

/// True if `0 <= number < end`.
fn is_below(number: i64, end: u64) -> bool {
    u64::try_from(number).is_ok_and(|it| it < end)
}

/// Coordinates of values: all of the first dimension, then all of the next.
pub(super) fn coordinates<'s>(
    sizes: impl Iterator<Item = &'s u64>,
    n_values: u64,
    numbers: &mut Numbers<'_>,
) -> Result<Option<Told>> {
    for (dim, &size) in sizes.enumerate() {
        for value in 0..n_values {
            let index = numbers.next()?;
            if !is_below(index, size) {
                let expected = format!("indices of dimension {dim} from 0 on and below {size}");
                return Ok(Some((expected, format!("{index}, of value {value}"))));
            }
        }
    }
    Ok(None)
}

/// Sizes of a compressed layout, in blocks.
pub(super) struct Compressed {
    n_batches: u64,
    /// Rows, or columns where those are compressed.
    n_compressed: u64,
    /// Columns, or rows.
    n_plain: u64,
    /// Values of each batch.
    n_values: u64,
}

impl Compressed {
    /// `None` if the parts do not fit each other.
    pub(super) fn of(
        kind: SparseLayout,
        pointers: &Layout,
        plain: &Layout,
        values: &Layout,
        shape: &[u64],
    ) -> Option<Compressed> {
        let n_batch_dims = pointers.shape().len().checked_sub(1)?;
        let &[n_rows, n_columns] = shape.get(n_batch_dims..)?.first_chunk()?;
        let block = match kind {
            SparseLayout::Bsr | SparseLayout::Bsc => {
                *values.shape().get(n_batch_dims.checked_add(1)?..)?.first_chunk()?
            }
            _ => [1, 1],
        };
        let n_blocks = [n_rows.checked_div(block[0])?, n_columns.checked_div(block[1])?];
        let by_rows = matches!(kind, SparseLayout::Csr | SparseLayout::Bsr);
        let n_plain = if by_rows { n_blocks[1] } else { n_blocks[0] };
        Some(Compressed {
            n_batches: n_in_front(pointers, 1),
            n_compressed: pointers.shape().last()?.checked_sub(1)?,
            n_plain,
            n_values: *plain.shape().last()?,
        })
    }

    /// With what is wrong, whether it is among the pointers.
    pub(super) fn check(
        &self,
        pointers: &mut Numbers<'_>,
        plain: &mut Numbers<'_>,
    ) -> Result<Option<(bool, Told)>> {
        for batch in 0..self.n_batches {
            let place = |index: u64| match self.n_batches {
                1 => format!("at {index}"),
                _ => format!("at {index} of batch {batch}"),
            };
            let first = pointers.next()?;
            if first != 0 {
                let told = ("pointers that begin with 0".to_owned(), format!("{first} {}", place(0)));
                return Ok(Some((true, told)));
            }
            let mut start = 0;
            for row in 1..=self.n_compressed {
                let pointer = pointers.next()?;
                let step = u64::try_from(pointer).ok().and_then(|it| it.checked_sub(start));
                let is_last = row == self.n_compressed;
                let Some(step) = step.filter(|it| *it <= self.n_plain && *it <= self.n_values - start) else {
                    let expected = format!(
                        "pointers that grow by 0 to {} each time, from 0 to {}",
                        self.n_plain, self.n_values
                    );
                    return Ok(Some((true, (expected, format!("{pointer} {}, after {start}", place(row))))));
                };
                let mut before = None;
                for value in start..start + step {
                    let index = plain.next()?;
                    if !is_below(index, self.n_plain) {
                        let expected = format!("indices from 0 on and below {}", self.n_plain);
                        return Ok(Some((false, (expected, format!("{index} {}", place(value))))));
                    }
                    if before.is_some_and(|it| it >= index) {
                        let expected = "indices that grow between two pointers".to_owned();
                        let found = format!("{index} {}, after {}", place(value), before.unwrap_or_default());
                        return Ok(Some((false, (expected, found))));
                    }
                    before = Some(index);
                }
                start += step;
                if is_last && start != self.n_values {
                    return Ok(Some((true, self.ends(start, place(row)))));
                }
            }
            if self.n_compressed == 0 && self.n_values != 0 {
                return Ok(Some((true, self.ends(0, place(0)))));
            }
        }
        Ok(None)
    }

    fn ends(&self, pointer: u64, place: String) -> Told {
        let expected = format!("pointers that end with {}, the number of values", self.n_values);
        (expected, format!("{pointer} {place}"))
    }
}

/// Sizes, strides and offsets of rows in a buffer, in elements.
pub(super) fn nested(
    n_rows: u64,
    n_dims: u64,
    n_elems: u64,
    [sizes, strides, offsets]: [&mut Numbers<'_>; 3],
) -> Result<Option<Told>> {
    for row in 0..n_rows {
        let offset = offsets.next()?;
        let (mut is_empty, mut is_negative, mut last) = (false, offset < 0, i128::from(offset));
        for _ in 0..n_dims {
            let (size, stride) = (sizes.next()?, strides.next()?);
            is_empty |= size == 0;
            is_negative |= size < 0 || stride < 0;
            last = last.saturating_add((i128::from(size) - 1).saturating_mul(i128::from(stride)));
        }
        let is_inside = match is_empty {
            true => i128::from(offset) <= i128::from(n_elems),
            false => last < i128::from(n_elems),
        };
        if is_negative {
            let expected = "offsets, sizes and strides from 0 on".to_owned();
            return Ok(Some((expected, format!("row {row} with offset {offset} and one below 0"))));
        }
        if !is_inside {
            let expected = format!("rows within a buffer of {n_elems} elements");
            let last = if is_empty { i128::from(offset) } else { last };
            return Ok(Some((expected, format!("row {row} from {offset} on, up to {last}"))));
        }
    }
    Ok(None)
}

/// Where rows of one tensor begin, and how long they are: by default up to the next.
///
/// They are rows of its first dimension, or of another if the nested tensor was transposed: then that ends where they do.
pub(super) fn jagged(
    n_rows: u64,
    values_shape: &[u64],
    offsets: &mut Numbers<'_>,
    mut lengths: Option<&mut Numbers<'_>>,
) -> Result<Option<Told>> {
    let mut start = offsets.next()?;
    if start < 0 {
        return Ok(Some(("offsets from 0 on".to_owned(), format!("{start} at 0"))));
    }
    let mut end = 0u64;
    for row in 1..=n_rows {
        let next = offsets.next()?;
        if next < start {
            let expected = "offsets that do not shrink".to_owned();
            return Ok(Some((expected, format!("{next} at {row}, after {start}"))));
        }
        let row_end = match &mut lengths {
            None => next,
            Some(lengths) => match lengths.next()? {
                len @ 0.. => start.saturating_add(len),
                len => {
                    return Ok(Some(("lengths from 0 on".to_owned(), format!("{len} of row {}", row - 1))));
                }
            },
        };
        end = end.max(u64::try_from(row_end).unwrap_or(u64::MAX));
        start = next;
    }
    let len = values_shape.first().copied().unwrap_or(0);
    let is_inside = end <= len || values_shape.contains(&end);
    Ok((!is_inside).then(|| (format!("rows within the {len} of the values"), format!("rows up to {end}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_are_below_the_sizes() {
        let found = |numbers: &[i64]| {
            coordinates([2, 5].iter(), 3, &mut Numbers::of(numbers)).unwrap().map(|it| it.1)
        };
        assert_eq!(found(&[0, 1, 1, 4, 0, 4]), None);
        assert_eq!(found(&[0, 2, 1, 4, 0, 4]).as_deref(), Some("2, of value 1"));
        assert_eq!(found(&[0, 1, 1, 4, 0, -1]).as_deref(), Some("-1, of value 2"));
        assert!(coordinates([2].iter(), 3, &mut Numbers::of(&[0])).is_err());
    }

    /// A matrix of 3 rows and 4 columns with 4 values, and a batch of two where there are twice as many numbers.
    fn rows(pointers: &[i64], plain: &[i64]) -> Option<(bool, String)> {
        let n_batches = plain.len() as u64 / 4;
        let sizes = Compressed { n_batches, n_compressed: 3, n_plain: 4, n_values: 4 };
        let told = sizes.check(&mut Numbers::of(pointers), &mut Numbers::of(plain)).unwrap();
        told.map(|(is_pointer, (_, found))| (is_pointer, found))
    }

    #[test]
    fn compressed_indices_keep_the_rules() {
        let wrong = |is_pointer: bool, found: &str| Some((is_pointer, found.to_owned()));
        assert_eq!(rows(&[0, 2, 2, 4], &[0, 3, 1, 2]), None);
        assert_eq!(rows(&[0, 4, 4, 4], &[0, 1, 2, 3]), None);
        assert_eq!(rows(&[1, 2, 2, 4], &[0, 3, 1, 2]), wrong(true, "1 at 0"));
        assert_eq!(rows(&[0, 900, -5, 3], &[0, 3, 1, 2]), wrong(true, "900 at 1, after 0"));
        assert_eq!(rows(&[0, 2, 1, 4], &[0, 3, 1, 2]), wrong(true, "1 at 2, after 2"));
        assert_eq!(
            rows(&[0, 2, i64::MIN, 4], &[0, 3, 1, 2]),
            wrong(true, format!("{} at 2, after 2", i64::MIN).as_str())
        );
        assert_eq!(rows(&[0, 2, 2, 3], &[0, 3, 1, 2]), wrong(true, "3 at 3"));
        assert_eq!(rows(&[0, 2, 2, 4], &[0, 4, 1, 2]), wrong(false, "4 at 1"));
        assert_eq!(rows(&[0, 2, 2, 4], &[0, 3, 2, 2]), wrong(false, "2 at 3, after 2"));
        assert_eq!(rows(&[0, 2, 2, 4, 0, 1, 1, 4], &[0, 3, 1, 2, 3, 0, 1, 2]), None);
        assert_eq!(
            rows(&[0, 2, 2, 4, 0, 1, 1, 4], &[0, 3, 1, 2, 3, 0, 1, 9]),
            wrong(false, "9 at 3 of batch 1")
        );
    }

    #[test]
    fn a_layout_without_rows_has_no_values() {
        let check = |n_values| {
            let sizes = Compressed { n_batches: 1, n_compressed: 0, n_plain: 4, n_values };
            sizes.check(&mut Numbers::of(&[0]), &mut Numbers::of(&[])).unwrap().is_none()
        };
        assert!(check(0) && !check(2));
    }

    #[test]
    fn nested_rows_lie_in_the_buffer() {
        let check = |sizes: &[i64], strides: &[i64], offsets: &[i64]| {
            let [mut sizes, mut strides, mut offsets] = [sizes, strides, offsets].map(Numbers::of);
            let told = nested(2, 2, 18, [&mut sizes, &mut strides, &mut offsets]).unwrap();
            told.map(|it| it.1)
        };
        assert_eq!(check(&[2, 3, 4, 3], &[3, 1, 3, 1], &[0, 6]), None);
        assert_eq!(check(&[2, 3, 4, 0], &[3, 1, 3, 1], &[0, 18]), None);
        assert!(check(&[2, 3, 4, 3], &[3, 1, 3, 1], &[0, 7]).unwrap().contains("up to 18"));
        assert!(check(&[2, 3, 4, 3], &[3, 1, 3, 1], &[0, 1_000_000_000]).unwrap().starts_with("row 1 "));
        assert!(check(&[2, 3, 4, 3], &[3, 1, 3, 1], &[-1, 6]).unwrap().starts_with("row 0 "));
        assert!(check(&[2, -3, 4, 3], &[3, 1, 3, 1], &[0, 6]).is_some());
        assert!(check(&[2, i64::MAX, 4, 3], &[i64::MAX, i64::MAX, 3, 1], &[0, 6]).is_some());
    }

    #[test]
    fn jagged_rows_lie_in_the_values() {
        let check = |offsets: &[i64], lengths: Option<&[i64]>| {
            let mut lengths = lengths.map(Numbers::of);
            jagged(2, &[6, 3], &mut Numbers::of(offsets), lengths.as_mut()).unwrap().is_none()
        };
        assert!(check(&[0, 2, 6], None) && check(&[0, 0, 3], None));
        assert!(!check(&[0, 2, 7], None) && !check(&[0, 3, 2], None) && !check(&[-1, 2, 6], None));
        assert!(check(&[0, 2, 9], Some(&[2, 4])) && !check(&[0, 2, 6], Some(&[2, 5])));
        assert!(!check(&[0, 2, 6], Some(&[-2, 4])));
        // Transposed: 12 columns that the rows share.
        let told = jagged(2, &[6, 12], &mut Numbers::of(&[0, 2, 12]), None).unwrap();
        assert_eq!(told, None);
    }
}
