//! What the caller decides about reading headers.

use crate::checkpoint::Root;

/// How a checkpoint is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// How much a file may claim.
    pub limits: Limits,
    /// The part of the checkpoint that is opened; `None`: all of it, with full names.
    pub root: Option<Root>,
    /// Refuse what PyTorch's `weights_only` would refuse to name in a pickle, and bytes behind the end of a format. Without
    /// it both are warnings: nothing that a file names is run in either case.
    pub strict: bool,
    /// Files that an index names may be links to anywhere. Without, a link may lead to another file of its folder, or from
    /// a snapshot in Hugging Face's cache to the cache's blobs: an index and links from strangers could otherwise make any
    /// file of the machine a part of a model.
    pub follow_links: bool,
}

/// The most that a file may claim; each claim is checked before memory is taken for it. What exceeds one is
/// [`Error::Unsupported`](crate::Error::Unsupported), with a hint that names the field: the defaults are far above any real
/// checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Length of a pickle. gpt2-xl's has 100 KB.
    pub pickle_bytes: u64,
    /// Objects that a pickle makes. It takes a few tens of bytes of memory for each.
    pub n_objects: usize,
    /// Records of a zip archive.
    pub n_records: u64,
    /// Length of a safetensors header; the reference implementation has the same limit.
    pub header_bytes: u64,
    /// Length of a weight map, or of another index in JSON.
    pub weight_map_bytes: u64,
    /// Files that an index names.
    pub n_files: usize,
    /// Tensors of a checkpoint, all its files together, and chunks of them.
    pub n_tensors: usize,
    /// Containers inside containers.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            pickle_bytes: 256 << 20,
            n_objects: 20_000_000,
            n_records: 1_000_000,
            header_bytes: 100_000_000,
            weight_map_bytes: 64 << 20,
            n_files: 1_000_000,
            n_tensors: 5_000_000,
            depth: 1_000,
        }
    }
}
