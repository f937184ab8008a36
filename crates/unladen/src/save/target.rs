//! Files and folders that appear whole or not at all: written under another name beside their own, synced, renamed.

use super::Output;
use crate::error::{Error, Fault, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// Small writes are collected up to this size.
pub(super) const BUFFER_BYTES: usize = 1 << 20;

/// The folder that will hold `path`.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A name that no other save uses, beside `path`. `attempt` makes the file or folder.
fn create_beside<T>(path: &Path, attempt: impl Fn(&Path) -> io::Result<T>) -> Result<(PathBuf, T)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Not made from the file's own name, which may be as long as a name can be.
        let name = parent(path).join(format!(".unladen-{}-{number}.part", std::process::id()));
        match attempt(&name) {
            Ok(made) => return Ok((name, made)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io(path, "write in its folder", error)),
        }
    }
}

/// Fails unless `output` may be written: nothing is there, or something that may be replaced.
pub(super) fn check_free(output: &Output<'_>, is_folder: bool) -> Result<()> {
    let path = output.path;
    if path.file_name().is_none() {
        return Err(Fault::new("a name for the output", path.display().to_string())
            .hint("name the file or folder to write")
            .unsupported());
    }
    let there = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(path, "look at the output", error)),
    };
    let found = if is_folder {
        if !there.is_dir() {
            Some("something else of that name")
        } else if !tensor_files(path)?.1 {
            Some("a folder that holds other things too")
        } else {
            None
        }
    } else {
        match fs::metadata(path) {
            Ok(meta) if !meta.is_file() => Some("a folder, a pipe or a device"),
            _ => None,
        }
    };
    if let Some(found) = found {
        let expected =
            if is_folder { "nothing, or a folder of .pt files" } else { "nothing, or a regular file" };
        return Err(Fault::new(expected, found).hint("choose another name").mismatch());
    }
    let files = if is_folder { tensor_files(path)?.0 } else { vec![path.to_owned()] };
    for file in files {
        let Ok(meta) = fs::metadata(&file) else { continue };
        if output.inputs.iter().any(|it| (it.dev, it.ino) == (meta.dev(), meta.ino())) {
            return Err(Fault::new("an output apart from the input", "one and the same file")
                .hint("choose another name for the output")
                .mismatch()
                .in_file(&file));
        }
    }
    match output.overwrite {
        true => Ok(()),
        false => Err(Error::io(path, "write the output", exists())),
    }
}

fn exists() -> io::Error {
    io::Error::new(io::ErrorKind::AlreadyExists, "it is there already")
}

/// The `.pt` files of a folder, and whether they are all that it holds.
fn tensor_files(folder: &Path) -> Result<(Vec<PathBuf>, bool)> {
    let failed = |error| Error::io(folder, "list the folder", error);
    let (mut files, mut is_all) = (Vec::new(), true);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_tensor = entry.file_type().map_err(failed)?.is_file()
            && entry.file_name().as_encoded_bytes().ends_with(b".pt");
        if is_tensor { files.push(entry.path()) } else { is_all = false }
    }
    Ok((files, is_all))
}

/// Bytes that this user may still write to the disk that holds `folder`. `None`: the system does not tell.
pub fn free_disk_bytes(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    (disk.f_blocks > 0).then(|| disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Fails unless the disk has room for `needed_bytes`.
pub(super) fn check_room(path: &Path, needed_bytes: u64) -> Result<()> {
    // A file system that does not say how large it is (some network ones) will say when it is full.
    let Some(free_bytes) = free_disk_bytes(parent(path)).filter(|&it| it < needed_bytes) else {
        return Ok(());
    };
    let found = format!("{needed_bytes} bytes are needed, {free_bytes} are free");
    Err(Error::io(path, "write the output", io::Error::new(io::ErrorKind::StorageFull, found)))
}

/// A file that is being written.
pub(super) struct TargetFile {
    file: BufWriter<File>,
    /// What messages name: the file as it will be called.
    path: PathBuf,
    at_byte: u64,
}

impl TargetFile {
    fn new(file: File, path: &Path) -> TargetFile {
        TargetFile { file: BufWriter::with_capacity(BUFFER_BYTES, file), path: path.to_owned(), at_byte: 0 }
    }

    /// Bytes written so far.
    pub(super) fn at_byte(&self) -> u64 {
        self.at_byte
    }

    /// Appends.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.at_byte += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, "write", error))
    }

    /// Makes the disk hold what was written.
    pub(super) fn sync(self) -> Result<()> {
        let file =
            self.file.into_inner().map_err(|error| Error::io(&self.path, "write", error.into_error()))?;
        file.sync_all().map_err(|error| Error::io(&self.path, "sync", error))
    }
}

/// Whatever is under this name goes when the save ends, well or not.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // A save that went well has renamed it: nothing is there then, and nobody is left to tell of a failure.
        match fs::symlink_metadata(&self.0) {
            Ok(meta) if meta.is_dir() => drop(remove_folder(&self.0)),
            Ok(_) => drop(fs::remove_file(&self.0)),
            Err(_) => {}
        }
    }
}

/// Removes a folder of `.pt` files; one that somebody put other things into stays, with these.
fn remove_folder(folder: &Path) -> Result<()> {
    let failed = |error| Error::io(folder, "remove the folder", error);
    tensor_files(folder)?.0.iter().try_for_each(fs::remove_file).map_err(failed)?;
    fs::remove_dir(folder).map_err(failed)
}

/// Makes the file `output`, which `fill` writes.
pub(super) fn write_file(
    output: &Output<'_>,
    fill: impl FnOnce(&mut TargetFile) -> Result<()>,
) -> Result<()> {
    let create = |name: &Path| OpenOptions::new().write(true).create_new(true).open(name);
    let (name, file) = create_beside(output.path, create)?;
    let temporary = Temporary(name);
    let mut target = TargetFile::new(file, output.path);
    fill(&mut target)?;
    target.sync()?;
    rename(&temporary.0, output)
}

/// A folder that is being written.
pub(super) struct TargetFolder(PathBuf);

impl TargetFolder {
    /// Makes a file in the folder, which `fill` writes.
    pub(super) fn write_file(
        &self,
        name: &str,
        fill: impl FnOnce(&mut TargetFile) -> Result<()>,
    ) -> Result<()> {
        let path = self.0.join(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let mut target =
            TargetFile::new(file.map_err(|error| Error::io(&path, "make the file", error))?, &path);
        fill(&mut target)?;
        target.sync()
    }
}

/// Makes the folder `output`, which `fill` puts files into.
pub(super) fn write_folder(
    output: &Output<'_>,
    fill: impl FnOnce(&TargetFolder) -> Result<()>,
) -> Result<()> {
    let (name, ()) = create_beside(output.path, |name| fs::create_dir(name))?;
    let temporary = Temporary(name);
    fill(&TargetFolder(temporary.0.clone()))?;
    sync_folder(&temporary.0, output.path)?;
    rename(&temporary.0, output)
}

/// Gives what is whole its name.
fn rename(from: &Path, output: &Output<'_>) -> Result<()> {
    let to = output.path;
    let failed = |error: io::Error| Error::io(to, "rename the finished output", error);
    let is_folder = from.is_dir();
    // A folder cannot be renamed over another that has files in it, but the two can change places: the old one
    // then stands under the temporary name, and goes with it.
    let flags = match output.overwrite {
        false => RenameFlags::NOREPLACE,
        true if is_folder && to.exists() => RenameFlags::EXCHANGE,
        true => RenameFlags::empty(),
    };
    match renameat_with(CWD, from, CWD, to, flags) {
        Ok(()) => {}
        // Not every file system knows the flags.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
            if to.symlink_metadata().is_ok() {
                match output.overwrite {
                    false => return Err(failed(exists())),
                    true if is_folder => remove_folder(to)?,
                    true => {}
                }
            }
            fs::rename(from, to).map_err(failed)?;
        }
        Err(error) => return Err(failed(error.into())),
    }
    sync_folder(parent(to), to)
}

/// Makes the disk hold the folder's names.
fn sync_folder(folder: &Path, path: &Path) -> Result<()> {
    let failed = |error| Error::io(path, "sync the folder", error);
    File::open(folder).map_err(failed)?.sync_all().map_err(failed)
}
