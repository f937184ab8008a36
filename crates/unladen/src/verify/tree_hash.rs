//! BLAKE3 in parts: several threads hash one long tensor, each another part of it, and the hash is that of the whole.

use blake3::{
    Hasher,
    hazmat::{HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root},
};
use std::ops::Range;

/// A part, but for the last: a power of two, as BLAKE3's tree of 1 KiB chunks wants it, and whole elements of any type.
pub(super) const PART_BYTES: u64 = 32 << 20;

/// A hash, or the root of a part's tree.
pub(super) type Node = [u8; 32];

/// Where the parts of so many bytes begin and end: at least one part, be it empty.
pub(super) fn parts(len_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let n_parts = len_bytes.div_ceil(PART_BYTES).max(1);
    (0..n_parts).map(move |part| part * PART_BYTES..len_bytes.min((part + 1) * PART_BYTES))
}

/// Hashes one part.
pub(super) struct PartHasher {
    hasher: Hasher,
    is_whole: bool,
}

impl PartHasher {
    /// For bytes that are hashed in one go, however many.
    pub(super) fn whole() -> PartHasher {
        PartHasher { hasher: Hasher::new(), is_whole: true }
    }

    /// For one of several [`parts`].
    pub(super) fn part(part: &Range<u64>) -> PartHasher {
        let mut hasher = Hasher::new();
        hasher.set_input_offset(part.start);
        PartHasher { hasher, is_whole: false }
    }

    /// The next bytes of the part.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// To be joined with the other parts'.
    pub(super) fn finish(&self) -> Node {
        match self.is_whole {
            true => *self.hasher.finalize().as_bytes(),
            false => self.hasher.finalize_non_root(),
        }
    }
}

/// The hash of `len_bytes`, from what their [`parts`] gave, in order.
pub(super) fn join(nodes: &[Node], len_bytes: u64) -> Node {
    match nodes {
        [whole] => *whole,
        _ => {
            let (left, right) = halves(nodes, len_bytes);
            *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()
        }
    }
}

/// The nodes of the two subtrees of several parts.
fn halves(nodes: &[Node], len_bytes: u64) -> (Node, Node) {
    let left_bytes = left_subtree_len(len_bytes);
    let (left, right) = nodes.split_at((left_bytes / PART_BYTES) as usize);
    (inner(left, left_bytes), inner(right, len_bytes - left_bytes))
}

/// As deep as the logarithm of the number of parts.
fn inner(nodes: &[Node], len_bytes: u64) -> Node {
    match nodes {
        [only] => *only,
        _ => {
            let (left, right) = halves(nodes, len_bytes);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hashes bytes that are `period` bytes again and again, so that long ones need no memory.
    fn in_parts(period: &[u8], len_bytes: u64) -> Node {
        let nodes: Vec<Node> = parts(len_bytes)
            .map(|part| {
                let is_whole = part == (0..len_bytes);
                let mut hasher = if is_whole { PartHasher::whole() } else { PartHasher::part(&part) };
                feed(period, part.start, part.end, |bytes| hasher.update(bytes));
                hasher.finish()
            })
            .collect();
        join(&nodes, len_bytes)
    }

    fn feed(period: &[u8], start: u64, end: u64, mut update: impl FnMut(&[u8])) {
        let mut at = start;
        while at < end {
            let from = (at % period.len() as u64) as usize;
            let upto = period.len().min(from + (end - at) as usize);
            update(&period[from..upto]);
            at += (upto - from) as u64;
        }
    }

    #[test]
    fn parts_give_the_hash_of_the_whole() {
        let period: Vec<u8> = (0..1_000_003u32).map(|it| (it * 7 + it / 251) as u8).collect();
        let lens = [0, 1, 1024, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1];
        let long = [2 * PART_BYTES, 3 * PART_BYTES - 5, 5 * PART_BYTES + 1025];
        for len_bytes in lens.into_iter().chain(long) {
            let mut whole = Hasher::new();
            feed(&period, 0, len_bytes, |bytes| {
                whole.update(bytes);
            });
            assert_eq!(in_parts(&period, len_bytes), *whole.finalize().as_bytes(), "{len_bytes}");
        }
    }

    #[test]
    fn the_hash_is_blake3_as_published() {
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        let found: String = in_parts(b"x", 0).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, empty);
    }
}
