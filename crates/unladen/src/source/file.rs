//! Files on a local file system: opened once, identified by a stamp, read at any place.

use super::{ReadAt, memory::ends_early};
use crate::{
    error::{Error, Fault, Result},
    memory::{Mapping, Reservation},
    stamp::FileStamp,
};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

/// One open file.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    stamp: FileStamp,
}

impl FileSource {
    /// Opens a regular file; a pipe or a device is an error rather than a hang.
    pub fn open(path: &Path) -> Result<FileSource> {
        // Without O_NONBLOCK, opening a pipe would wait for a writer.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(|source| Error::io(path, "open the file", source))?;
        let stamp = stamp(&file, path)?;
        Ok(FileSource { file, stamp })
    }

    /// What the file was when it was opened.
    pub fn stamp(&self) -> &FileStamp {
        &self.stamp
    }

    /// Fails with [`Error::Mismatch`] if the file was written to or shortened since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        same(&self.stamp, &stamp(&self.file, &self.stamp.path)?)
    }

    /// Maps the first bytes of the file, as many as were reserved.
    ///
    /// Fails with [`Error::Mismatch`] if the file is shorter: touching what is not there would kill the process.
    pub fn map(&self, reservation: Reservation) -> Result<Mapping> {
        if reservation.len_bytes() > self.stamp.len_bytes {
            return Err(ends_early(reservation.len_bytes(), self.stamp.len_bytes).in_file(&self.stamp.path));
        }
        self.check_unchanged()?;
        Mapping::new(&self.file, reservation, &self.stamp.path)
    }

    /// The open file, for questions to the system about it.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn stamp(file: &File, path: &Path) -> Result<FileStamp> {
    let meta = file.metadata().map_err(|source| Error::io(path, "look at the file", source))?;
    if !meta.is_file() {
        let found = if meta.is_dir() { "a folder" } else { "a pipe or a device" };
        return Err(Fault::new("a regular file", found)
            .hint("name a checkpoint file")
            .unsupported()
            .in_file(path));
    }
    let mtime_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    Ok(FileStamp { path: path.to_owned(), dev: meta.dev(), ino: meta.ino(), len_bytes: meta.len(), mtime_ns })
}

fn same(before: &FileStamp, now: &FileStamp) -> Result<()> {
    if before == now {
        return Ok(());
    }
    let hint = "something writes to the file; wait until it is done, then load again";
    Err(Fault::new(format!("the file as it was opened ({before:?})"), format!("{now:?}"))
        .hint(hint)
        .mismatch()
        .in_file(&now.path))
}

impl ReadAt for FileSource {
    fn len_bytes(&self) -> u64 {
        self.stamp.len_bytes
    }

    fn path(&self) -> &Path {
        &self.stamp.path
    }

    fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < target.len() {
            let at = start_byte + done as u64;
            match self.file.read_at(&mut target[done..], at) {
                Ok(0) => {
                    let end_byte = start_byte + target.len() as u64;
                    return Err(ends_early(end_byte, at).in_file(&self.stamp.path));
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io_at(&self.stamp.path, "read", at, error)),
            }
        }
        Ok(())
    }
}

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
}

/// How many files stay open: well below the 1,024 that a process may have by default.
const MAX_OPEN: usize = 128;

impl FileSet {
    /// Adds a file behind the others.
    pub fn push(&mut self, source: FileSource) {
        let stamp = source.stamp.clone();
        let open = (self.files.len() < MAX_OPEN).then(|| Arc::new(source));
        self.files.push(Known { stamp, open });
    }

    /// Fails with [`Error::Mismatch`] if a file that stayed open was written to or shortened since.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files
            .iter()
            .filter_map(|known| known.open.as_ref())
            .try_for_each(|source| source.check_unchanged())
    }

    /// What the files were when they were opened, by position.
    pub fn stamps(&self) -> Vec<FileStamp> {
        self.files.iter().map(|it| it.stamp.clone()).collect()
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
    /// Fails with [`Error::Mismatch`] if the path now leads to something else.
    pub fn get(&self, index: usize) -> Result<Arc<FileSource>> {
        let known = &self.files[index];
        if let Some(source) = &known.open {
            return Ok(Arc::clone(source));
        }
        let source = FileSource::open(&known.stamp.path)?;
        same(&known.stamp, &source.stamp)?;
        Ok(Arc::new(source))
    }
}
