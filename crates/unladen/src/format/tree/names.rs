//! Which tensor has which name.

use crate::tensor::Tensor;
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use std::hash::BuildHasher as _;

/// Which tensor has which name: positions alone, the names stand with the tensors.
pub(super) struct Names {
    state: RandomState,
    positions: HashTable<u32>,
}

impl Names {
    pub(super) fn with_room(n_names: usize) -> Names {
        Names { state: RandomState::default(), positions: HashTable::with_capacity(n_names) }
    }

    pub(super) fn contains(&self, tensors: &[Tensor], name: &str) -> bool {
        let is_name = |&it: &u32| tensors[it as usize].name == name;
        self.positions.find(self.state.hash_one(name), is_name).is_some()
    }

    /// Adds the name of the last tensor, which no other has.
    pub(super) fn insert_last(&mut self, tensors: &[Tensor]) {
        let hash = |it: &u32| self.state.hash_one(tensors[*it as usize].name.as_str());
        if let Some(last) = tensors.len().checked_sub(1).map(|it| it as u32) {
            self.positions.insert_unique(hash(&last), last, hash);
        }
    }
}
