//! Tells whether boxes tile a tensor. A hole would become zeros, and of an overlap nobody knows which side is right.

use super::ORIGIN;
use std::hash::{BuildHasher as _, RandomState};

/// A prime, 2⁶¹ - 1: the product of two numbers below it fits into 128 bits.
const PRIME: u64 = (1 << 61) - 1;

/// With each, boxes that tile nothing pass with a chance of one in 2⁵⁴ at most.
const N_ROUNDS: usize = 2;

/// True if boxes (first index and size, inside the shape) hold each element of the shape exactly once.
///
/// The volumes of boxes that tile a whole add up to the whole's, wherever the lines of the grid are moved to. So every line
/// is given a random place that whoever wrote the file cannot know, and the volumes are compared. For boxes with a hole or
/// an overlap, both sides are different polynomials of these places, and their values agree by chance alone. This takes
/// one pass however the boxes are arranged; comparing each with each would take hours for some that a file can claim.
pub(super) fn tiles(shape: &[u64], boxes: &[(&[u64], &[u64])]) -> bool {
    (0..N_ROUNDS).all(|_| {
        let lines = RandomState::new();
        let sum = boxes.iter().fold(0, |sum, (at, size)| (sum + volume(&lines, at, size)) % PRIME);
        sum == volume(&lines, &ORIGIN[..shape.len()], shape)
    })
}

/// The volume of a box, modulo the prime.
fn volume(lines: &RandomState, at: &[u64], size: &[u64]) -> u64 {
    let place = |dim: usize, line: u64| lines.hash_one((dim, line)) % PRIME;
    at.iter().zip(size).enumerate().fold(1, |product, (dim, (&start, &len))| {
        let side = (place(dim, start.saturating_add(len)) + PRIME - place(dim, start)) % PRIME;
        (u128::from(product) * u128::from(side) % u128::from(PRIME)) as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Boxes = Vec<(Vec<u64>, Vec<u64>)>;

    fn are_tiles(shape: &[u64], boxes: &Boxes) -> bool {
        let boxes: Vec<_> = boxes.iter().map(|(at, size)| (&at[..], &size[..])).collect();
        tiles(shape, &boxes)
    }

    /// A box cut in two again and again, each time somewhere else.
    fn cut(shape: &[u64], cuts: &[(prop::sample::Index, prop::sample::Index, prop::sample::Index)]) -> Boxes {
        let mut boxes = vec![(vec![0; shape.len()], shape.to_vec())];
        for (which, dim, place) in cuts {
            let which = which.index(boxes.len());
            let dim = dim.index(shape.len());
            if boxes[which].1[dim] < 2 {
                continue;
            }
            let len = 1 + place.index(boxes[which].1[dim] as usize - 1) as u64;
            let mut right = boxes[which].clone();
            right.0[dim] += len;
            right.1[dim] -= len;
            boxes[which].1[dim] = len;
            boxes.push(right);
        }
        boxes
    }

    /// How often each element is held, counted one by one.
    fn holds_each_once(shape: &[u64], boxes: &Boxes) -> bool {
        let n_elems: u64 = shape.iter().product();
        let mut n_held = vec![0u32; n_elems as usize];
        for (index, n_held) in n_held.iter_mut().enumerate() {
            let mut rest = index as u64;
            let at: Vec<u64> = shape
                .iter()
                .rev()
                .map(|size| {
                    let it = rest % size;
                    rest /= size;
                    it
                })
                .collect();
            let is_in = |(start, size): &&(Vec<u64>, Vec<u64>)| {
                at.iter()
                    .rev()
                    .zip(start.iter().zip(size))
                    .all(|(at, (start, len))| (*start..start + len).contains(at))
            };
            *n_held = boxes.iter().filter(is_in).count() as u32;
        }
        n_held.iter().all(|&it| it == 1)
    }

    proptest! {
        #[test]
        fn tilings_are_told_from_boxes_with_holes_and_overlaps(
            shape in prop::collection::vec(1u64..7, 1..4),
            cuts in prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index, prop::sample::Index)>(), 0..12),
            moved in prop::option::of(any::<(prop::sample::Index, prop::sample::Index, bool)>()),
        ) {
            let mut boxes = cut(&shape, &cuts);
            if let Some((which, dim, grows)) = moved {
                let which = which.index(boxes.len());
                let dim = dim.index(shape.len());
                let (at, size) = &mut boxes[which];
                if grows && at[dim] + size[dim] < shape[dim] { size[dim] += 1 }
                else if at[dim] > 0 { at[dim] -= 1 }
            }
            prop_assert_eq!(are_tiles(&shape, &boxes), holds_each_once(&shape, &boxes));
        }
    }

    #[test]
    fn a_hole_and_an_overlap_of_one_size_do_not_make_up_for_each_other() {
        let row = |at: u64| (vec![at, 0], vec![1, 5]);
        assert!(are_tiles(&[3, 5], &vec![row(0), row(1), row(2)]));
        assert!(!are_tiles(&[3, 5], &vec![row(0), row(0), row(2)]));
        // Around a hole in the middle, as no cut makes them.
        let ring = vec![
            (vec![0, 0], vec![1, 2]),
            (vec![0, 2], vec![2, 1]),
            (vec![2, 1], vec![1, 2]),
            (vec![1, 0], vec![2, 1]),
        ];
        assert!(!are_tiles(&[3, 3], &ring));
        assert!(are_tiles(&[3, 3], &[ring, vec![(vec![1, 1], vec![1, 1])]].concat()));
    }

    #[test]
    fn tensors_without_elements_or_dimensions_are_tiled_by_nothing_and_by_one() {
        assert!(are_tiles(&[0, 7], &vec![]) && !are_tiles(&[7], &vec![]));
        let point = (vec![], vec![]);
        assert!(are_tiles(&[], &vec![point.clone()]));
        assert!(!are_tiles(&[], &vec![point.clone(), point]) && !are_tiles(&[], &vec![]));
    }

    #[test]
    fn a_hundred_thousand_boxes_of_one_grid_are_compared_in_one_pass() {
        let boxes: Boxes = (0..100_000).map(|it| (vec![it / 400 * 3, it % 400 * 2], vec![3, 2])).collect();
        assert!(are_tiles(&[750, 800], &boxes));
        assert!(!are_tiles(&[750, 801], &boxes));
        let mut twice = boxes.clone();
        twice[5] = twice[50_000].clone();
        assert!(!are_tiles(&[750, 800], &twice));
    }
}
