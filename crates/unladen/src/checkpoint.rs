//! A checkpoint as data: what its headers say, with every claim checked. No I/O.

mod append;
mod composite;
mod cover;
mod metadata;
mod packed;
mod root;

pub use composite::{Composite, CompositeKind, SparseLayout};
pub use root::Root;

use crate::{
    error::{Fault, Result},
    stamp::FileStamp,
    tensor::{Backing, Extent, FileId, Layout, MAX_DIMS, Piece, Storage, StorageId, Tensor, TensorId},
};
use foldhash::{HashMap, HashMapExt as _};
use std::{fmt, path::PathBuf};

/// Which kind of file or folder a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// A zip archive as `torch.save` writes it since PyTorch 1.6.
    Pth,
    /// One safetensors file.
    Safetensors,
    /// A folder with one `.pt` file per tensor.
    Folder,
    /// Pickles and raw storages one behind the other, as `torch.save` wrote them before PyTorch 1.6.
    Legacy,
    /// A tar archive of PyTorch 0.1.1 to 0.1.9.
    Tar,
    /// One pickle with the tensors inside, as `pickle.dump` writes it.
    Pickle,
    /// A zip archive with a program, as `torch.jit.save` writes it; the program is never run.
    TorchScript,
    /// Several files that a weight map or their names make one model: Hugging Face's shards.
    Sharded,
    /// A folder of PyTorch's distributed checkpoints: chunks of tensors, and a `.metadata` file that says which.
    Dcp,
    /// A folder with the plain bytes of one tensor in each file, and an index: what Accelerate offloads to disk.
    Offload,
}

impl Format {
    /// Every format.
    pub fn all() -> impl Iterator<Item = Format> {
        let read_only = [
            Format::Legacy,
            Format::Tar,
            Format::Pickle,
            Format::TorchScript,
            Format::Sharded,
            Format::Dcp,
            Format::Offload,
        ];
        Format::writable().chain(read_only)
    }

    /// Those that are written, too.
    pub fn writable() -> impl Iterator<Item = Format> {
        [Format::Pth, Format::Safetensors, Format::Folder].into_iter()
    }

    /// The name that commands print and take.
    pub fn name(self) -> &'static str {
        match self {
            Format::Pth => "pth",
            Format::Safetensors => "safetensors",
            Format::Folder => "folder",
            Format::Legacy => "legacy",
            Format::Tar => "tar",
            Format::Pickle => "pickle",
            Format::TorchScript => "torchscript",
            Format::Sharded => "sharded",
            Format::Dcp => "dcp",
            Format::Offload => "offload",
        }
    }
}

/// Something about a checkpoint that the user should know, and that does not stop a load.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// Objects of unknown classes: kept as symbols, never run. Names as `module.name`, sorted.
    UnknownSymbols(Vec<String>),
    /// Of the symbols that were not run, those that could do harm if another program ran them. Names as `module.name`.
    DangerousSymbols(Vec<String>),
    /// One key stood twice in a dictionary; the last value counts, as in Python.
    DuplicateKey(String),
    /// The archive lacks a record that PyTorch writes.
    MissingRecord(&'static str),
    /// Bytes follow where the format ends.
    TrailingBytes {
        /// After what.
        after: &'static str,
        /// How many.
        len_bytes: u64,
    },
    /// The tensor has a shape and no data.
    MetaTensor(String),
    /// Two tensors have one name; the second is listed under another.
    SameName {
        /// The name of both.
        name: String,
        /// The second one's name here.
        listed_as: String,
        /// Where the second one stands in the file, as Python writes it: `['a'][0]`.
        place: String,
    },
    /// Something of the file is left out, with what and why.
    LeftOut(String),
    /// A format without ties holds the bytes of tied tensors once per name.
    TiesWrittenOut {
        /// How many names share the bytes of another.
        n_tensors: u64,
        /// Bytes that are written again.
        len_bytes: u64,
    },
    /// Views that name bytes of theirs more than once, as `Tensor.expand` makes them, are written with each of their elements.
    ViewsWrittenOut {
        /// How many tensors.
        n_tensors: u64,
        /// Bytes that they have more than in the file that they come from.
        len_bytes: u64,
    },
    /// Only what is below one path was asked for.
    OutsideRoot {
        /// The path.
        root: String,
        /// How many tensors are not below it.
        n_tensors: u64,
        /// Their bytes, ties counted as often as they are named.
        len_bytes: u64,
        /// Where the path was not given but found: others that may have been meant.
        others: Vec<String>,
    },
    /// A format of plain tensors holds the parts of a sparse or nested tensor, and not that they are one.
    PartsAlone {
        /// The tensor.
        name: String,
        /// What it is, and its shape.
        what: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warning::UnknownSymbols(names) => {
                write!(f, "names code that was not run: {}", names.join(", ").escape_debug())
            }
            Warning::DangerousSymbols(names) => {
                let names = names.join(", ");
                write!(
                    f,
                    "dangerous: names {}, which was not run here; do not trust it",
                    names.escape_debug()
                )
            }
            Warning::DuplicateKey(key) => {
                write!(f, "key `{}` stands twice, the last one counts", key.escape_debug())
            }
            Warning::MissingRecord(name) => write!(f, "has no `{name}` record"),
            Warning::TrailingBytes { after, len_bytes } => {
                write!(f, "{len_bytes} bytes follow after {after}")
            }
            Warning::MetaTensor(name) => {
                write!(f, "tensor `{}` is on the meta device and has no data", name.escape_debug())
            }
            Warning::SameName { name, listed_as, place } => {
                let [name, listed_as, place] = [name, listed_as, place].map(|it| shown(it));
                write!(f, "two tensors are named `{name}`, the one at {place} is listed as `{listed_as}`")
            }
            Warning::LeftOut(what) => write!(f, "left out: {}", shown(what)),
            Warning::TiesWrittenOut { n_tensors, len_bytes } => {
                write!(f, "{n_tensors} tied tensors lose their ties: {len_bytes} bytes are written again")
            }
            Warning::ViewsWrittenOut { n_tensors, len_bytes } => {
                let more = "bytes more than they have in the file";
                write!(f, "{n_tensors} expanded views are written out in full: {len_bytes} {more}")
            }
            Warning::OutsideRoot { root, n_tensors, len_bytes, others } => {
                let root = root.escape_debug();
                write!(f, "left out: {n_tensors} tensors ({len_bytes} bytes) that are not below `{root}`")?;
                for (index, other) in others.iter().enumerate() {
                    let before = if index == 0 { "; meant may be " } else { ", " };
                    write!(f, "{before}`{}`", other.escape_debug())?;
                }
                Ok(())
            }
            Warning::PartsAlone { name, what } => {
                let [name, what] = [name, what].map(|it| it.escape_debug());
                write!(f, "`{name}` ({what}) is written as its parts, tensors like any other")
            }
        }
    }
}

/// Text on a terminal: control characters as escapes, quotes as they are.
fn shown(text: &str) -> String {
    let escape = |it: char| match it {
        '\'' | '"' => it.to_string(),
        _ => it.escape_debug().to_string(),
    };
    text.chars().map(escape).collect()
}

/// What a checkpoint's headers say.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The kind of file or folder.
    pub format: Format,
    /// What the user named: the file, or the folder.
    pub path: PathBuf,
    /// The files, by [`FileId`].
    pub files: Vec<FileStamp>,
    /// The storages, by [`StorageId`].
    pub storages: Vec<Storage>,
    /// Boxes of tensors that are stored in several.
    pub extents: Vec<Extent>,
    /// The tensors, in the file's order, by [`TensorId`].
    pub tensors: Vec<Tensor>,
    /// Tensors that are made of others, in the order of their parts.
    pub composites: Vec<Composite>,
    /// Paths of what may be the state dict where other things stand beside it, the likeliest first; more than one: it is
    /// ambiguous. Empty where the tensors stand at the top, and for formats without a tree.
    pub roots: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<Warning>,
}

/// At most [`MAX_DIMS`] zeros: where a tensor that is not split starts in itself.
const ORIGIN: [u64; MAX_DIMS] = [0; MAX_DIMS];

impl Checkpoint {
    /// A tensor by position.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.0 as usize]
    }

    /// A file by position.
    pub fn file(&self, id: FileId) -> &FileStamp {
        &self.files[id.0 as usize]
    }

    /// The storage that a piece views.
    pub fn storage_of(&self, piece: &Piece<'_>) -> &Storage {
        &self.storages[piece.storage.0 as usize]
    }

    /// Every tensor with its position.
    pub fn iter(&self) -> impl Iterator<Item = (TensorId, &Tensor)> {
        self.tensors.iter().enumerate().map(|(index, tensor)| (TensorId(index as u32), tensor))
    }

    /// Bytes of all tensors in row-major order: what a load has to bring. Tied tensors count once, those without data not.
    pub fn len_bytes(&self) -> u64 {
        let apart = self.iter().zip(self.first_with_same_bytes()).filter(|((id, _), first)| id == first);
        let with_data = apart.filter(|((_, tensor), _)| tensor.backing != Backing::Meta);
        with_data.map(|((_, tensor), _)| tensor.layout.len_bytes()).fold(0, u64::saturating_add)
    }

    /// The boxes that make up a tensor: one, unless it is sharded; none for a tensor without data.
    pub fn pieces(&self, id: TensorId) -> impl Iterator<Item = Piece<'_>> {
        let tensor = self.tensor(id);
        let (whole, extents) = match &tensor.backing {
            Backing::Meta => (None, 0..0),
            Backing::Storage(storage) => (Some(*storage), 0..0),
            Backing::Extents(range) => (None, range.start as usize..range.end as usize),
        };
        let n_dims = tensor.layout.shape().len();
        let whole = whole.map(|storage| (storage, &tensor.layout, &ORIGIN[..n_dims]));
        let extents = self.extents[extents].iter().map(|it| (it.storage, &it.layout, &it.at[..]));
        whole.into_iter().chain(extents).map(|(storage, layout, at)| {
            let swapped = self.storages[storage.0 as usize].swapped;
            Piece { storage, layout, at, resolve: layout.resolve(swapped) }
        })
    }

    /// Checks what the parsers promise: every storage lies in its file, every tensor in its storage.
    pub fn validate(&self) -> Result<()> {
        for storage in &self.storages {
            let file = self.file(storage.file);
            let end_byte = storage.start_byte.saturating_add(storage.len_bytes);
            if end_byte > file.len_bytes {
                return Err(Fault::new(
                    format!("{end_byte} bytes, as the header claims"),
                    format!("{} bytes", file.len_bytes),
                )
                .hint("the file looks truncated; compare its size with the publisher's")
                .corrupt()
                .in_file(&file.path));
            }
        }
        for (id, tensor) in self.iter() {
            for piece in self.pieces(id) {
                let storage = self.storage_of(&piece);
                let end_byte = piece.layout.stored_bytes().end;
                if end_byte > storage.len_bytes {
                    return Err(Fault::new(
                        format!("a storage of at least {end_byte} bytes"),
                        format!("{} bytes", storage.len_bytes),
                    )
                    .tensor(&tensor.name)
                    .corrupt()
                    .in_file(&self.file(storage.file).path));
                }
                let inside = piece.at.iter().zip(piece.layout.shape()).zip(tensor.layout.shape());
                let fits = piece.at.len() == tensor.layout.shape().len() && { inside }
                    .all(|((&at, &len), &size)| at.checked_add(len).is_some_and(|end| end <= size));
                if !fits || piece.layout.dtype() != tensor.layout.dtype() {
                    return Err(Fault::new(
                        "extents inside the tensor, of its dtype",
                        format!("{:?}", piece.layout),
                    )
                    .tensor(&tensor.name)
                    .corrupt()
                    .in_file(&self.file(storage.file).path));
                }
            }
            if matches!(tensor.backing, Backing::Extents(_)) {
                self.check_cover(id, tensor)?;
            }
        }
        self.check_packed()
    }

    /// For each tensor, the first tensor that has the same bytes: itself, unless it is tied to an earlier one.
    ///
    /// Tied are tensors with one storage and equal layouts; views that merely overlap are not.
    pub fn first_with_same_bytes(&self) -> Vec<TensorId> {
        // Most storages have one tensor, so that nothing needs hashing but the further ones.
        let mut first_on: Vec<Option<TensorId>> = vec![None; self.storages.len()];
        let mut others: HashMap<(StorageId, &Layout), TensorId> = HashMap::new();
        let first = self.iter().map(|(id, tensor)| {
            let Backing::Storage(storage) = tensor.backing else { return id };
            match &mut first_on[storage.0 as usize] {
                Some(first) if self.tensor(*first).layout == tensor.layout => *first,
                Some(_) => *others.entry((storage, &tensor.layout)).or_insert(id),
                unseen => *unseen.insert(id),
            }
        });
        first.collect()
    }

    /// Checks that the extents of a tensor cover it, each element once: a hole would become zeros.
    fn check_cover(&self, id: TensorId, tensor: &Tensor) -> Result<()> {
        let pieces: Vec<_> = self.pieces(id).filter(|piece| piece.layout.n_elems() > 0).collect();
        let n_elems: u128 = pieces.iter().map(|piece| u128::from(piece.layout.n_elems())).sum();
        let boxes: Vec<_> = pieces.iter().map(|piece| (piece.at, piece.layout.shape())).collect();
        if n_elems == u128::from(tensor.layout.n_elems()) && cover::tiles(tensor.layout.shape(), &boxes) {
            return Ok(());
        }
        let found = format!("{} extents with {n_elems} elements, or some that overlap", pieces.len());
        let expected = format!("extents that hold each of {} elements once", tensor.layout.n_elems());
        Err(Fault::new(expected, found).tensor(&tensor.name).corrupt().in_file(&self.path))
    }
}
