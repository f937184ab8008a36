//! What a pickle put aside under numbers: references, never copies.

use super::Value;
use foldhash::{HashMap, HashMapExt as _};

/// Values by number. Writers count up from 0; whatever else a file does costs no more than its own bytes.
pub(super) struct Memo {
    dense: Vec<Value>,
    sparse: HashMap<u32, Value>,
}

impl Memo {
    /// An empty one, with the room that `dense` has.
    pub(super) fn new(dense: Vec<Value>) -> Memo {
        Memo { dense, sparse: HashMap::new() }
    }

    pub(super) fn put(&mut self, number: u32, value: Value) {
        let n_dense = self.dense.len();
        if let Some(place) = self.dense.get_mut(number as usize) {
            *place = value;
        } else if number as usize == n_dense && !self.sparse.contains_key(&number) {
            self.dense.push(value);
        } else {
            self.sparse.insert(number, value);
        }
    }

    pub(super) fn get(&self, number: u32) -> Option<Value> {
        self.dense.get(number as usize).or_else(|| self.sparse.get(&number)).copied()
    }

    pub(super) fn len(&self) -> usize {
        self.dense.len() + self.sparse.len()
    }
}
