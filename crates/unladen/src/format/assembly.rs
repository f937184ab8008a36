//! Puts the checkpoints of several files together into one, within the limits of one.

use super::{OpenOptions, tree::MAX_WARNINGS};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    error::{Fault, Result},
    source::FileSet,
};
use std::path::Path;

/// A checkpoint that grows file by file.
pub(super) struct Assembly {
    pub(super) checkpoint: Checkpoint,
    files: FileSet,
    n_silent: usize,
    max_tensors: usize,
}

impl Assembly {
    /// `path` is what the user named.
    pub(super) fn new(format: Format, path: &Path, options: &OpenOptions) -> Assembly {
        let checkpoint = Checkpoint {
            format,
            path: path.to_owned(),
            files: Vec::new(),
            storages: Vec::new(),
            extents: Vec::new(),
            tensors: Vec::new(),
            composites: Vec::new(),
            roots: Vec::new(),
            warnings: Vec::new(),
        };
        let max_tensors = options.limits.n_tensors;
        Assembly { checkpoint, files: FileSet::default(), n_silent: 0, max_tensors }
    }

    /// How the next file is to be opened: all files together may hold so many tensors, not each of them.
    pub(super) fn options_left(&self, options: &OpenOptions) -> OpenOptions {
        let mut left = options.clone();
        left.limits.n_tensors = self.max_tensors.saturating_sub(self.checkpoint.tensors.len());
        left
    }

    /// Adds what one file says, with that file and others that belong to it.
    pub(super) fn append(&mut self, (mut part, files): (Checkpoint, FileSet)) -> Result<()> {
        if self.checkpoint.tensors.len().saturating_add(part.tensors.len()) > self.max_tensors {
            let expected = format!("at most {} tensors in all files", self.max_tensors);
            return Err(Fault::new(expected, "more of them").over_limit("n_tensors"));
        }
        let n_room = MAX_WARNINGS.saturating_sub(self.checkpoint.warnings.len());
        self.n_silent += part.warnings.len().saturating_sub(n_room);
        part.warnings.truncate(n_room);
        self.checkpoint.append(part)?;
        self.files.append(files);
        Ok(())
    }

    /// The whole, checked.
    pub(super) fn finish(self) -> Result<(Checkpoint, FileSet)> {
        let Assembly { mut checkpoint, files, n_silent, .. } = self;
        if n_silent > 0 {
            checkpoint.warnings.push(Warning::LeftOut(format!("{n_silent} more warnings")));
        }
        checkpoint.files.shrink_to_fit();
        checkpoint.storages.shrink_to_fit();
        checkpoint.extents.shrink_to_fit();
        checkpoint.tensors.shrink_to_fit();
        checkpoint.validate()?;
        Ok((checkpoint, files))
    }
}

/// Fails if an index names more files than may be opened.
pub(super) fn check_n_files(n_files: usize, options: &OpenOptions) -> Result<()> {
    let most = options.limits.n_files;
    if n_files <= most {
        return Ok(());
    }
    let expected = format!("a checkpoint of at most {most} files");
    Err(Fault::new(expected, format!("{n_files} of them")).over_limit("n_files"))
}
