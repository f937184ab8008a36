//! The files of a checkpoint, some of them open, and the records that are packed in them.

use super::{FileSource, ReadAt, UnpackSource, file::same, unpack::stray};
use crate::{
    error::Result,
    stamp::{FileStamp, fingerprint},
};
use std::{path::Path, sync::Arc};

/// The files of a checkpoint, by position. The first few stay open from `open` to the load, so that nobody can swap
/// them in between; the others (a folder may hold thousands) are opened again, and must be what they were. A packed record
/// is read through the file that it is in, which stands before it.
#[derive(Debug, Default)]
pub struct FileSet {
    files: Vec<Known>,
    n_open: usize,
}

#[derive(Debug)]
struct Known {
    stamp: FileStamp,
    open: Option<Arc<FileSource>>,
    /// Position of the file itself, or of the one that a packed record is in.
    file: usize,
    /// Stays open however many do.
    is_shared: bool,
}

/// How many files stay open: well below the 1,024 that a process may have by default.
const MAX_OPEN: usize = 128;

impl FileSet {
    /// Adds a file behind the others.
    pub fn push(&mut self, source: FileSource) {
        let stamp = source.stamp().clone();
        let open = (self.n_open < MAX_OPEN).then(|| Arc::new(source));
        self.add(Known { stamp, open, file: self.files.len(), is_shared: false });
    }

    /// Adds a file that stays open, however many do: the caller has opened it already, and others may hold it too.
    pub fn push_shared(&mut self, source: Arc<FileSource>) {
        let stamp = source.stamp().clone();
        self.add(Known { stamp, open: Some(source), file: self.files.len(), is_shared: true });
    }

    /// Adds a record that is packed in the last file that was added.
    ///
    /// Fails with [`Error::Mismatch`](crate::Error::Mismatch) if it is not in that file.
    pub fn push_packed(&mut self, stamp: FileStamp) -> Result<()> {
        match self.files.last().map(|it| it.file) {
            Some(file) if stamp.is_packed_in(&self.files[file].stamp) => {
                self.add(Known { stamp, open: None, file, is_shared: false });
                Ok(())
            }
            _ => Err(stray(&stamp)),
        }
    }

    /// Adds a file and the records that are packed in it, as its checkpoint lists them.
    ///
    /// Fails with [`Error::Mismatch`](crate::Error::Mismatch) if one of them is not in the file.
    pub fn push_with_packed(&mut self, source: FileSource, stamps: &[FileStamp]) -> Result<()> {
        self.push(source);
        stamps.iter().filter(|it| it.packed.is_some()).try_for_each(|it| self.push_packed(it.clone()))
    }

    /// Adds the files of another set behind the others. Those for which there is no room among the open ones are closed.
    pub fn append(&mut self, other: FileSet) {
        let first = self.files.len();
        for known in other.files {
            let stays_open = known.is_shared || self.n_open < MAX_OPEN;
            let open = known.open.filter(|_| stays_open);
            self.add(Known { open, file: first + known.file, ..known });
        }
    }

    fn add(&mut self, known: Known) {
        self.n_open += usize::from(known.open.is_some());
        self.files.push(known);
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

    /// What a file was when it was opened, if there is one of that number.
    pub fn stamp(&self, index: usize) -> Option<&FileStamp> {
        self.files.get(index).map(|it| &it.stamp)
    }

    /// The path of a file, if there is one of that number.
    pub fn path(&self, index: usize) -> Option<&Path> {
        self.files.get(index).map(|it| &*it.stamp.path)
    }

    /// Position of the file that a packed record is in; of any other file, its own.
    pub fn position_of_file(&self, index: usize) -> usize {
        self.files[index].file
    }

    /// Number of files.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// True without files.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// A file to be read, opened again if need be. Whoever asks for a packed record has a cursor of his own in it.
    ///
    /// Fails with [`Error::Mismatch`](crate::Error::Mismatch) if the path now leads to something else.
    pub fn get(&self, index: usize) -> Result<Arc<dyn ReadAt>> {
        let known = &self.files[index];
        let file = self.file(index)?;
        match &known.stamp.packed {
            Some(_) => Ok(Arc::new(UnpackSource::new(file, known.stamp.clone())?)),
            None => Ok(file),
        }
    }

    /// The open file itself, of a packed record the one that it is in: to be mapped, or asked about.
    ///
    /// Fails like [`FileSet::get`].
    pub fn file(&self, index: usize) -> Result<Arc<FileSource>> {
        let known = &self.files[self.files[index].file];
        if let Some(source) = &known.open {
            return Ok(Arc::clone(source));
        }
        let source = FileSource::open(&known.stamp.path)?;
        same(&known.stamp, source.stamp())?;
        Ok(Arc::new(source))
    }
}
