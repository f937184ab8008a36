//! Tensors that are made of others, as comparisons and manifests know them: what each is, its sizes and the names of its
//! parts. Which numbers stand in the parts is compared as in any tensor.

use crate::checkpoint::{Checkpoint, Composite};
use serde::{Deserialize, Serialize};
use std::{cmp::Ordering, fmt};

/// Parts that a message names.
const MAX_NAMED: usize = 5;

/// What is known of one sparse, nested or quantised tensor, or one of a class of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub struct Made {
    /// Its full path.
    pub name: String,
    /// `sparse`, `nested`, `quantised` or `subclass`.
    pub kind: String,
    /// What exactly: PyTorch's name of the layout or scheme with what is said there (`per_tensor_affine, scale 0.1, zero
    /// point 3`), or the name of the class.
    pub what: String,
    /// Its sizes, as [`Composite::shape`] says.
    pub shape: Vec<u64>,
    /// The names of the tensors that it is made of.
    pub parts: Vec<String>,
}

impl Made {
    fn of(checkpoint: &Checkpoint, composite: &Composite) -> Made {
        Made {
            name: composite.name.clone(),
            kind: composite.kind.word().to_owned(),
            what: composite.kind.to_string(),
            shape: composite.shape.to_vec(),
            parts: composite.part_ids().map(|it| checkpoint.tensor(it).name.clone()).collect(),
        }
    }

    /// All that a checkpoint has, sorted.
    pub(super) fn all(checkpoint: &Checkpoint) -> Vec<Made> {
        let mut all: Vec<Made> = checkpoint.composites.iter().map(|it| Made::of(checkpoint, it)).collect();
        all.sort_unstable();
        all
    }

    /// About what it holds in memory.
    pub(super) fn len_bytes(&self) -> u64 {
        let parts: usize = self.parts.iter().map(|it| size_of::<String>() + it.len() + 16).sum();
        let texts = self.name.len() + self.kind.len() + self.what.len() + 8 * self.shape.len();
        (size_of::<Made>() + texts + parts + 96) as u64
    }
}

impl fmt::Display for Made {
    /// `sparse_coo [2, 2] made of `s.indices`, `s.values``.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> =
            self.parts.iter().take(MAX_NAMED).map(|it| format!("`{}`", it.escape_debug())).collect();
        write!(f, "{} {:?} made of {}", self.what.escape_debug(), self.shape, parts.join(", "))?;
        match self.parts.len().saturating_sub(MAX_NAMED) {
            0 => Ok(()),
            n_more => write!(f, " and {n_more} more"),
        }
    }
}

/// Whose names are not made of the same, in order of names: what either side has there. Both sides are sorted.
///
/// What one side lacks counts only if it has some of the parts, as plain tensors: that all of them are missing is told
/// of each.
pub(super) fn differences(
    sides: [&[Made]; 2],
    has_tensor: impl Fn(usize, &str) -> bool,
) -> Vec<[Option<&Made>; 2]> {
    let [mut ones, mut others] = sides.map(|it| it.iter().peekable());
    let mut different = Vec::new();
    loop {
        let order = match (ones.peek(), others.peek()) {
            (None, None) => return different,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(one), Some(other)) => one.name.cmp(&other.name),
        };
        let one = if order.is_le() { ones.next() } else { None };
        let other = if order.is_ge() { others.next() } else { None };
        let is_told = match (one, other) {
            (Some(one), Some(other)) => one != other,
            (Some(alone), None) => alone.parts.iter().any(|it| has_tensor(1, it)),
            (None, Some(alone)) => alone.parts.iter().any(|it| has_tensor(0, it)),
            (None, None) => false,
        };
        if is_told {
            different.push([one, other]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(name: &str, what: &str, shape: &[u64], parts: &[&str]) -> Made {
        Made {
            name: name.into(),
            kind: "sparse".into(),
            what: what.into(),
            shape: shape.to_vec(),
            parts: parts.iter().map(|it| (*it).to_owned()).collect(),
        }
    }

    #[test]
    fn what_is_made_otherwise_is_told_and_what_is_missing_with_its_parts_is_not() {
        let coo = made("b", "sparse_coo", &[2, 2], &["b.indices", "b.values"]);
        let larger = Made { shape: vec![5, 5], ..coo.clone() };
        let same = made("a", "nested", &[2], &["a.values"]);
        let plain = made("c", "sparse_coo", &[2], &["c.indices", "c.values"]);
        let gone = made("d", "sparse_coo", &[2], &["d.indices", "d.values"]);
        let one = [same.clone(), coo.clone(), plain.clone(), gone];
        let other = [same, larger.clone()];
        let has_tensor = |side: usize, name: &str| side == 1 && name == "c.values";
        let expected = [[Some(&coo), Some(&larger)], [Some(&plain), None]];
        assert_eq!(differences([&one, &other], has_tensor), expected);
        let turned = differences([&other, &one], |side, name| has_tensor(1 - side, name));
        assert_eq!(turned, expected.map(|[one, other]| [other, one]));
        assert_eq!(coo.to_string(), "sparse_coo [2, 2] made of `b.indices`, `b.values`");
    }

    #[test]
    fn two_of_one_name_are_compared_in_their_order() {
        let twice = [made("0", "sparse_coo", &[2], &["0.a"]), made("0", "sparse_coo", &[3], &["0.a~2"])];
        assert_eq!(differences([&twice, &twice], |_, _| true), Vec::<[Option<&Made>; 2]>::new());
        assert_eq!(differences([&twice, &twice[..1]], |_, _| true), [[Some(&twice[1]), None]]);
    }
}
