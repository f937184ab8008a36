//! Files on a local file system: opened once, identified by a stamp, read at any place.

use super::{
    RawRead, ReadAt,
    memory::ends_early,
    raw::{Alignment, Descriptors},
};
use crate::{
    error::{Error, Fault, Result},
    io_path::IoPath,
    memory::{Mapping, Reservation},
    stamp::FileStamp,
};
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    sync::{Arc, OnceLock, atomic::AtomicBool},
};

/// One open file.
#[derive(Debug)]
pub struct FileSource {
    file: Arc<File>,
    stamp: FileStamp,
    pub(super) raw: Box<dyn RawRead>,
    pub(super) direct: DirectReads,
}

/// What was found out about reading the file past the page cache.
#[derive(Debug, Default)]
pub(super) struct DirectReads {
    pub(super) alignment: OnceLock<Option<Alignment>>,
    /// The file system refused one; none is tried again.
    pub(super) is_refused: AtomicBool,
    pub(super) is_tried_well: OnceLock<bool>,
    /// Once something was to be dropped behind the reader.
    pub(super) is_read_ahead_off: AtomicBool,
}

impl FileSource {
    /// Opens a regular file; a pipe or a device is an error rather than a hang.
    pub fn open(path: &Path) -> Result<FileSource> {
        // Without O_NONBLOCK, opening a pipe would wait for a writer.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(|source| Error::io(path, "open the file", source))?;
        let stamp = stamp(&file, path)?;
        let file = Arc::new(file);
        let raw = Box::new(Descriptors::new(Arc::clone(&file)));
        Ok(FileSource { file, stamp, raw, direct: DirectReads::default() })
    }

    /// Puts something between this source and its system calls; what was found out about them is forgotten.
    pub fn with_raw(self, wrap: impl FnOnce(Box<dyn RawRead>) -> Box<dyn RawRead>) -> FileSource {
        FileSource { raw: wrap(self.raw), direct: DirectReads::default(), ..self }
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
    let (dev, ino, len_bytes) = (meta.dev(), meta.ino(), meta.len());
    Ok(FileStamp { path: path.to_owned(), dev, ino, len_bytes, mtime_ns, packed: None })
}

pub(super) fn same(before: &FileStamp, now: &FileStamp) -> Result<()> {
    if before == now {
        return Ok(());
    }
    let hint = "something writes to the file; wait until it is done, then load again";
    let found = if (before.dev, before.ino) != (now.dev, now.ino) {
        "another file of that name".to_owned()
    } else if before.len_bytes != now.len_bytes {
        format!("{} bytes instead of {}", now.len_bytes, before.len_bytes)
    } else {
        "one that was written to since".to_owned()
    };
    Err(Fault::new("the file as it was opened", found).hint(hint).mismatch().in_file(&now.path))
}

impl ReadAt for FileSource {
    fn len_bytes(&self) -> u64 {
        self.stamp.len_bytes
    }

    fn path(&self) -> &Path {
        &self.stamp.path
    }

    fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        self.read_buffered(start_byte, target)
    }

    fn check_unchanged(&self) -> Result<()> {
        FileSource::check_unchanged(self)
    }

    fn read_by(&self, path: IoPath, start_byte: u64, target: &mut [u8], need_bytes: usize) -> Result<()> {
        self.read(path, start_byte, target, need_bytes)
    }
}
