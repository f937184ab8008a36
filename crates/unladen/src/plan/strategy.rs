//! The ways of loading. The first six are the cells of Sebastian Raschka's notebook "Memory-efficient Model Weight Loading";
//! the last is ours.

use crate::error::{Error, Result};
use std::{fmt, str::FromStr};

/// A way of loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// A random model on the device, the whole state dict beside it on the device, a copy of each tensor.
    Naive,
    /// A random model on the device, the whole state dict on the host, one tensor at a time to the device.
    Sequential,
    /// An empty model on the device, the whole state dict beside it on the device, a copy of each tensor.
    Meta,
    /// No model: the tensors are views of the mapped file.
    Mmap,
    /// An empty model on the device, filled from the mapped file.
    MmapCopy,
    /// An empty model on the device, filled with one tensor at a time, loaded on the host.
    PerTensor,
    /// Straight from the file to where the bytes stay.
    Stream,
}

/// Strategy, name, and what it does in a line.
const NAMES: &[(Strategy, &str, &str)] = &[
    (Strategy::Naive, "naive", "random model, whole state dict beside it, copy"),
    (Strategy::Sequential, "sequential", "random model, state dict on the host, one tensor at a time"),
    (Strategy::Meta, "meta", "empty model, whole state dict beside it, copy"),
    (Strategy::Mmap, "mmap", "views of the mapped file, read when touched"),
    (Strategy::MmapCopy, "mmap-copy", "empty model, filled from the mapped file"),
    (Strategy::PerTensor, "per-tensor", "empty model, one file per tensor"),
    (Strategy::Stream, "stream", "straight from the file to where the bytes stay"),
];

impl Strategy {
    /// Every strategy, in the notebook's order, ours last.
    pub fn all() -> impl Iterator<Item = Strategy> {
        NAMES.iter().map(|(strategy, ..)| *strategy)
    }

    fn row(self) -> &'static (Strategy, &'static str, &'static str) {
        &NAMES[self as usize]
    }

    /// The name that commands take.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// What it does, in a line.
    pub fn describe(self) -> &'static str {
        self.row().2
    }

    /// True if it maps the checkpoint's files.
    pub fn maps_files(self) -> bool {
        matches!(self, Strategy::Mmap | Strategy::MmapCopy)
    }

    /// True if the weights are the caller's own in the end: writing to them is cheap and a changed file cannot
    /// change them.
    pub fn is_private(self) -> bool {
        self != Strategy::Mmap
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Strategy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Strategy, Error> {
        NAMES.iter().find(|(_, name, _)| *name == text).map(|(strategy, ..)| *strategy).ok_or_else(|| {
            let known: Vec<_> = NAMES.iter().map(|(_, name, _)| *name).collect();
            crate::error::Fault::new(format!("a strategy ({})", known.join(", ")), format!("`{text}`"))
                .hint("`unladen load --help` lists them")
                .mismatch()
        })
    }
}
