//! The folder where `compare` keeps what it saves: the GPT-2 to compare with, and checkpoints as single tensors.

use crate::{gpt2_file, human, out, watch};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use unladen::{
    Format, OpenCheckpoint, Result,
    error::Fault,
    save::{self, Output},
};

pub(super) struct Workbench {
    dir: PathBuf,
    /// What is saved here stays, and serves again.
    keeps: bool,
    /// Goes when the comparison is over.
    scratch: TempDir,
}

/// Every GPT-2 that `compare` saves is the same.
const SEED: u64 = 123;

impl Workbench {
    /// In `dir`, or in the user's cache folder.
    pub(super) fn new(dir: Option<PathBuf>) -> Result<Workbench> {
        let keeps = dir.is_some();
        let dir = dir.unwrap_or_else(cache_dir);
        let made = fs::create_dir_all(&dir)
            .and_then(|()| tempfile::Builder::new().prefix("compare-").tempdir_in(&dir));
        let scratch = made.map_err(|error| {
            let hint = "choose a folder that you may write to with --dir";
            Fault::new("a folder to save in", error.to_string()).hint(hint).unsupported().in_file(&dir)
        })?;
        Ok(Workbench { dir, keeps, scratch })
    }

    /// A file that goes when the comparison is over.
    pub(super) fn scratch(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A randomly initialised GPT-2, saved the first time.
    pub(super) fn gpt2(&mut self, size: &str) -> Result<PathBuf> {
        self.keeps = true;
        let path = self.dir.join(format!("gpt2-{size}.pth"));
        if path.exists() {
            out::words(&format!("using {}, saved before", path.display()));
            return Ok(path);
        }
        let len_bytes = gpt2_file::len_bytes(size);
        self.announce(&format!("a randomly initialised gpt2-{size}"), len_bytes, &path);
        watch::with_bar("saving", || gpt2_file::save(size, SEED, &path, Format::Pth, false))?;
        Ok(path)
    }

    /// The checkpoint as a folder with one file per tensor, saved the first time.
    pub(super) fn folder_of(&mut self, checkpoint: &OpenCheckpoint) -> Result<PathBuf> {
        let stem = checkpoint.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let kept = self.dir.join(format!("{stem}-params"));
        if self.keeps && is_same(&kept, checkpoint) {
            return Ok(kept);
        }
        let path = if self.keeps { kept } else { self.scratch(&format!("{stem}-params")) };
        self.announce("it again for `per-tensor`, as one file per tensor", checkpoint.len_bytes(), &path);
        watch::with_bar("saving", || {
            // What is there under this name was saved from another checkpoint.
            let output = Output {
                path: &path,
                format: Format::Folder,
                overwrite: self.keeps,
                inputs: &checkpoint.files,
            };
            save::convert(checkpoint, checkpoint.files(), &output, watch::progress())
        })?;
        Ok(path)
    }

    fn announce(&self, what: &str, len_bytes: u64, path: &Path) {
        let free = save::free_disk_bytes(&self.dir).map_or_else(|| "unknown".to_owned(), human::bytes);
        let until = if path.starts_with(self.scratch.path()) { ", removed afterwards" } else { "" };
        out::words(&format!(
            "saving {what}: {} to {} ({free} free{until})",
            human::bytes(len_bytes),
            path.display()
        ));
    }
}

/// True if the folder was saved from this checkpoint: not older, and the same tensors by name, type and shape. That the
/// bytes are the same too is checked after the loads, by their digests.
fn is_same(folder: &Path, checkpoint: &OpenCheckpoint) -> bool {
    let Ok(saved) = unladen::open(folder) else { return false };
    let of = |it: &OpenCheckpoint| {
        let mut tensors: Vec<_> = it.tensors.iter().map(|it| (it.name.clone(), it.layout.loaded())).collect();
        tensors.sort_by(|one, other| one.0.cmp(&other.0));
        tensors
    };
    let newest = checkpoint.files.iter().map(|it| it.mtime_ns).max();
    saved.files.iter().all(|it| Some(it.mtime_ns) >= newest) && of(&saved) == of(checkpoint)
}

/// Where programs keep what they can make again.
fn cache_dir() -> PathBuf {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|it| it.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("unladen")
}
