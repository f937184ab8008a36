//! What every container around one pickle comes to: the pickle, and the storages that it names. Makes a checkpoint of it.

use super::{
    OpenOptions,
    given::Given,
    pickle::{Arena, Pickle, Value},
    rebuild::{Rebuild, StorageRef},
    roots, symbols,
    torchscript::Constants,
    tree::{self, MAX_WARNINGS},
};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    error::Result,
    stamp::FileStamp,
    tensor::Storage,
};

/// A container that was read but for its tensors.
pub(super) struct Contents<'a> {
    pub(super) format: Format,
    /// The file, and behind it what is packed in it: deflated records, bytes that stand as text.
    pub(super) files: Vec<FileStamp>,
    pub(super) arena: &'a Arena<'a>,
    /// What the pickle stands for.
    pub(super) root: Value,
    pub(super) parts: Parts,
    /// Tensors that no object of the pickle owns.
    pub(super) constants: Option<Constants>,
    pub(super) warnings: Vec<Warning>,
}

/// What a container says about the storages that its pickle refers to.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) storages: Vec<Storage>,
    /// By position in the arena's persistent ids.
    pub(super) refs: Vec<StorageRef>,
    pub(super) given: Given,
}

impl Contents<'_> {
    pub(super) fn rebuild(&self) -> Rebuild<'_> {
        let Parts { storages, refs, given } = &self.parts;
        Rebuild { arena: self.arena, storages, refs, given }
    }
}

/// Brings a pickle's dictionaries in order, and looks at the names that it has.
///
/// Fails if the options are strict and a name is not allowed.
pub(super) fn prepare(
    pickle: &mut Pickle<'_>,
    options: &OpenOptions,
    warnings: &mut Vec<Warning>,
) -> Result<()> {
    warnings.extend(pickle.arena.merge_duplicate_keys(MAX_WARNINGS).into_iter().map(Warning::DuplicateKey));
    symbols::check(&pickle.arena, options.strict, warnings)
}

/// The checkpoint of one file with one pickle.
pub(super) fn checkpoint(mut contents: Contents<'_>, options: &OpenOptions) -> Result<Checkpoint> {
    let mut warnings = std::mem::take(&mut contents.warnings);
    let mut listing = tree::list(&contents.rebuild(), contents.root, &options.limits, &mut warnings)?;
    let roots = roots::candidates(contents.arena, contents.root);
    let Contents { format, mut files, parts: Parts { mut storages, .. }, constants, .. } = contents;
    if let Some(constants) = constants {
        constants.add_to(&mut storages, &mut listing);
    }
    files.shrink_to_fit();
    storages.shrink_to_fit();
    listing.tensors.shrink_to_fit();
    Ok(Checkpoint {
        format,
        path: files[0].path.clone(),
        files,
        storages,
        extents: Vec::new(),
        tensors: listing.tensors,
        composites: listing.composites,
        roots,
        warnings,
    })
}
