//! Tensors and storages that a container gives by other means than a storage's key: by number, or inside the pickle.

use super::rebuild::{StorageRef, View};
use crate::tensor::{Layout, StorageId};
use foldhash::HashMap;

/// What was found before the pickle's tree is walked. Most containers have nothing of it.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// Tensors, by position in the arena's persistent ids.
    pub(super) tensors: HashMap<u32, GivenTensor>,
    /// Arrays of NumPy, by call.
    pub(super) arrays: HashMap<u32, GivenTensor>,
    /// Storages inside the pickle, by call.
    pub(super) storages: HashMap<u32, StorageRef>,
    /// Arrays of NumPy that are not read, by call, and why.
    pub(super) left_out: HashMap<u32, String>,
}

impl Given {
    /// Why an array is not listed.
    pub(super) fn left_out(&self, call: u32) -> Option<&str> {
        self.left_out.get(&call).map(String::as_str)
    }
}

/// A tensor as it stands in the file.
#[derive(Debug)]
pub(super) struct GivenTensor {
    pub(super) layout: Layout,
    /// `None`: it has no elements, and no storage either.
    pub(super) storage: Option<StorageId>,
}

impl GivenTensor {
    /// The same, as a call that rebuilds it gives it.
    pub(super) fn view(&self) -> View {
        View::new(self.layout.clone(), self.storage)
    }
}
