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
    plan::DEFAULT_HOST_BUDGET_BYTES,
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
    /// In `dir`, or in the user's cache folder, or if that cannot be had where temporary files go.
    pub(super) fn new(dir: Option<PathBuf>) -> Result<Workbench> {
        let keeps = dir.is_some();
        let (dir, scratch) = match dir {
            Some(dir) => scratch_in(dir),
            None => scratch_in(cache_dir()).or_else(|_| scratch_in(std::env::temp_dir().join("unladen"))),
        }?;
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
        // The name says which file it was saved from, so no other checkpoint's folder is taken, or touched.
        let name = format!("{stem}-params-{:08x}", stamp_of(checkpoint));
        let kept = self.dir.join(&name);
        if self.keeps && is_same(&kept, checkpoint) {
            return Ok(kept);
        }
        let path = if self.keeps && !kept.exists() { kept } else { self.scratch(&name) };
        self.announce("it again for `per-tensor`, as one file per tensor", checkpoint.len_bytes(), &path);
        let output =
            Output { path: &path, format: Format::Folder, overwrite: false, inputs: &checkpoint.files };
        watch::with_bar("saving", || {
            save::convert(
                checkpoint,
                checkpoint.files(),
                &output,
                DEFAULT_HOST_BUDGET_BYTES,
                watch::progress(),
            )
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

/// Makes the folder, and one in it for what does not stay.
fn scratch_in(dir: PathBuf) -> Result<(PathBuf, TempDir)> {
    let made =
        fs::create_dir_all(&dir).and_then(|()| tempfile::Builder::new().prefix("compare-").tempdir_in(&dir));
    match made {
        Ok(scratch) => Ok((dir, scratch)),
        Err(error) => {
            let hint = "choose a folder that you may write to with --dir";
            Err(Fault::new("a folder to save in", error.to_string()).hint(hint).unsupported().in_file(&dir))
        }
    }
}

/// Short for the checkpoint's files as they are now, and for the part of them that was opened.
fn stamp_of(checkpoint: &OpenCheckpoint) -> u32 {
    let names = checkpoint.tensors.first().map(|it| &it.name);
    let text = format!("{:?} {names:?} {}", checkpoint.files, checkpoint.tensors.len());
    // FNV-1a: the same in every build, and nobody has to be kept from finding two alike.
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// True if the folder holds the same tensors by name, type and shape. That the bytes are the same too is checked after
/// the loads, by their digests.
fn is_same(folder: &Path, checkpoint: &OpenCheckpoint) -> bool {
    let Ok(saved) = unladen::open(folder) else { return false };
    let of = |it: &OpenCheckpoint| {
        let mut tensors: Vec<_> = it.tensors.iter().map(|it| (it.name.clone(), it.layout.loaded())).collect();
        tensors.sort_by(|one, other| one.0.cmp(&other.0));
        tensors
    };
    of(&saved) == of(checkpoint)
}

/// Where programs keep what they can make again.
fn cache_dir() -> PathBuf {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|it| it.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("unladen")
}
