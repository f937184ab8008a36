//! What identified a file when its header was read; compared again before and after a load.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::PathBuf,
};

/// A path, and what identifies a file's content well enough to notice that it was replaced or written to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileStamp {
    /// The path it was opened by.
    pub path: PathBuf,
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Length.
    pub len_bytes: u64,
    /// Time of the last change, since the epoch.
    pub mtime_ns: i128,
}

/// One number for all files of a checkpoint: what is made for them is for no others.
pub fn fingerprint<'a>(stamps: impl Iterator<Item = &'a FileStamp>) -> u64 {
    let mut hasher = DefaultHasher::new();
    stamps.for_each(|it| it.hash(&mut hasher));
    hasher.finish()
}
