//! The last step of every container around one pickle: its tree is walked, and what was found becomes a checkpoint.

use super::{
    Limits,
    given::Given,
    pickle::Pickle,
    pth::unknown_symbols,
    rebuild::{Rebuild, StorageRef},
    tree::{self, MAX_WARNINGS},
};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    error::Result,
    stamp::FileStamp,
    tensor::Storage,
};

/// What a container says about the storages that its pickle refers to.
pub(super) struct Parts {
    pub(super) storages: Vec<Storage>,
    /// By position in the arena's persistent ids.
    pub(super) refs: Vec<StorageRef>,
    pub(super) given: Given,
}

/// The checkpoint of one file with one pickle.
pub(super) fn checkpoint(
    format: Format,
    stamp: FileStamp,
    mut pickle: Pickle<'_>,
    parts: Parts,
    mut warnings: Vec<Warning>,
    limits: &Limits,
) -> Result<Checkpoint> {
    warnings.extend(pickle.arena.merge_duplicate_keys(MAX_WARNINGS).into_iter().map(Warning::DuplicateKey));
    warnings.extend(unknown_symbols(&pickle.arena));
    let Parts { mut storages, refs, given } = parts;
    let rebuild = Rebuild { arena: &pickle.arena, storages: &storages, refs: &refs, given: &given };
    let mut tensors = tree::tensors(&rebuild, pickle.root, limits, &mut warnings)?;
    storages.shrink_to_fit();
    tensors.shrink_to_fit();
    Ok(Checkpoint {
        format,
        path: stamp.path.clone(),
        files: vec![stamp],
        storages,
        extents: Vec::new(),
        tensors,
        warnings,
    })
}
