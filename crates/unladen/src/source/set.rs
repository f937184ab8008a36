//! The files of a checkpoint, some of them open.

use super::{FileSource, file::same};
use crate::{
    error::Result,
    stamp::{FileStamp, fingerprint},
};
use std::{path::Path, sync::Arc};

/// The files of a checkpoint, by position. The first few stay open from `open` to the load, so that nobody can swap
/// them in between; the others (a folder may hold thousands) are opened again, and must be what they were.
#[derive(Debug, Default)]
pub struct FileSet {
    files: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    stamp: FileStamp,
    open: Option<Arc<FileSource>>,
    /// Stays open however many do.
    is_shared: bool,
}

/// How many files stay open: well below the 1,024 that a process may have by default.
const MAX_OPEN: usize = 128;

impl FileSet {
    /// Adds a file behind the others.
    pub fn push(&mut self, source: FileSource) {
        let stamp = source.stamp().clone();
        let open = (self.files.len() < MAX_OPEN).then(|| Arc::new(source));
        self.files.push(Known { stamp, open, is_shared: false });
    }

    /// Adds a file that stays open, however many do: the caller has opened it already, and others may hold it too.
    pub fn push_shared(&mut self, source: Arc<FileSource>) {
        self.files.push(Known { stamp: source.stamp().clone(), open: Some(source), is_shared: true });
    }

    /// Adds the files of another set behind the others. Those for which there is no room among the open ones are closed.
    pub fn append(&mut self, other: FileSet) {
        for known in other.files {
            let stays_open = known.is_shared || self.files.len() < MAX_OPEN;
            self.files.push(Known { open: known.open.filter(|_| stays_open), ..known });
        }
    }

    /// Fails with [`Error::Mismatch`](crate::Error::Mismatch) if a file that stayed open was written to or shortened since.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files
            .iter()
            .filter_map(|known| known.open.as_ref())
            .try_for_each(|source| source.check_unchanged())
    }

    /// The [`fingerprint`] of all files.
    pub fn fingerprint(&self) -> u64 {
        fingerprint(self.files.iter().map(|it| &it.stamp))
    }

    /// What the files were when they were opened, by position.
    pub fn stamps(&self) -> Vec<FileStamp> {
        self.files.iter().map(|it| it.stamp.clone()).collect()
    }

    /// The path of a file, if there is one of that number.
    pub fn path(&self, index: usize) -> Option<&Path> {
        self.files.get(index).map(|it| &*it.stamp.path)
    }

    /// Number of files.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// True without files.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// A file, opened again if need be.
    ///
    /// Fails with [`Error::Mismatch`](crate::Error::Mismatch) if the path now leads to something else.
    pub fn get(&self, index: usize) -> Result<Arc<FileSource>> {
        let known = &self.files[index];
        if let Some(source) = &known.open {
            return Ok(Arc::clone(source));
        }
        let source = FileSource::open(&known.stamp.path)?;
        same(&known.stamp, source.stamp())?;
        Ok(Arc::new(source))
    }
}
