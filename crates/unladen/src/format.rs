//! Headers become a [`Checkpoint`]: what kind of file it is, which tensors it holds and where their bytes are.
//! Reads no tensor data and runs nothing that a file says.

mod assembly;
mod confine;
mod dcp;
mod exported;
mod folder;
mod given;
mod inline;
mod latin1;
mod legacy;
pub mod names;
mod numbered;
mod offload;
mod options;
mod persistent;
mod pickle;
mod plain;
mod print;
mod pth;
mod rebuild;
mod record;
mod records;
mod roots;
mod safetensors;
mod sniff;
mod symbols;
mod tar;
mod torchscript;
mod tree;
mod weight_map;
mod whole;
mod window;
mod zip;

pub use options::{Limits, OpenOptions};
pub use print::{TreeStyle, tree};
pub use records::{Record, records, records_of};

use crate::{
    checkpoint::{Checkpoint, Warning},
    error::{Error, Fault, Result},
    source::{FileSet, FileSource, ReadAt},
    stamp::FileStamp,
};
use sniff::{Container, Pickled};
use std::path::Path;
use whole::Contents;

/// Reads the headers of a file or a folder, told by its content.
///
/// A file is safetensors, or of PyTorch: a zip archive (of `torch.save` or `torch.jit.save`), a legacy file from before
/// PyTorch 1.6, a tar archive from before 0.1.10, or a plain pickle with the tensors inside.
/// Or it says which files are a checkpoint: a weight map (`*.index.json`), the `index.json` of a folder of offloaded
/// tensors, the `.metadata` of a distributed checkpoint. A folder is the first of these that its files' names say:
///
/// 1. A model by the names of Hugging Face's libraries. `model.safetensors`, then its weight map, then `pytorch_model.bin`
///    and its weight map, then the same of `diffusion_pytorch_model`, then `adapter_model.safetensors` and `.bin`; after
///    these, variants (`model.fp16.safetensors`) in the same order, and weight maps of other names. What comes later is left
///    out with a warning; of two variants of one file none is chosen.
/// 2. A distributed checkpoint of PyTorch (DCP): `.metadata`.
/// 3. Tensors that Accelerate offloaded: `index.json` and `.dat` files.
/// 4. A model that DeepSpeed or Megatron split by rank: an error that says what to do.
/// 5. The numbered files of one model without a weight map: `x-00001-of-00002.safetensors` or `.bin`, if all are there.
/// 6. One `.pt` or `.pth` file per tensor, named after it (see [`names`]).
/// 7. The only safetensors file.
///
/// Fails with [`Error::Io`] if the system does, with [`Error::Corrupt`] if a file contradicts itself or another, with
/// [`Error::Unsupported`] for what is known and not read, with [`Error::Mismatch`] if no tensor is below the root that was
/// asked for.
pub fn open(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let (checkpoint, files) = open_whole(path, options)?;
    match &options.root {
        None => Ok((checkpoint, files)),
        Some(root) => Ok((checkpoint.restrict(root)?, files)),
    }
}

/// Opens a checkpoint with all of its tensors.
fn open_whole(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let meta = std::fs::metadata(path).map_err(|error| Error::io(path, "open the file", error))?;
    if meta.is_dir() {
        return folder::open(path, options);
    }
    match (path.file_name().and_then(|it| it.to_str()), path.parent()) {
        (Some(dcp::METADATA), Some(parent)) => dcp::open(parent, options),
        _ => open_file(path, options),
    }
}

/// Opens a file: a checkpoint, or an index of some.
fn open_file(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let source = FileSource::open(path)?;
    if weight_map::is_json(&sniff::head(&source)?) {
        return if path.file_name().is_some_and(|it| it == offload::INDEX) {
            offload::open_index(source, options)
        } else {
            weight_map::open(source, options)
        };
    }
    open_source(source, options)
}

/// Opens a checkpoint file.
fn open_source(source: FileSource, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let checkpoint = parse(&source, source.stamp().clone(), options)?;
    let mut files = FileSet::default();
    files.push_with_packed(source, &checkpoint.files)?;
    Ok((checkpoint, files))
}

/// Reads the headers of one file from any source. `stamp` says which file that is; its path goes into messages.
///
/// Fails as [`open`] does. What it returns has passed [`Checkpoint::validate`]. All of the file, whatever root is asked
/// for: that is a matter of whole checkpoints, see [`Checkpoint::restrict`].
pub fn parse(source: &dyn ReadAt, stamp: FileStamp, options: &OpenOptions) -> Result<Checkpoint> {
    let path = stamp.path.clone();
    parse_any(source, stamp, options).map_err(|error| error.in_file(&path))
}

fn parse_any(source: &dyn ReadAt, stamp: FileStamp, options: &OpenOptions) -> Result<Checkpoint> {
    let head = sniff::head(source)?;
    if weight_map::is_json(&head) {
        return Err(Fault::new("a checkpoint", "JSON, perhaps a weight map")
            .hint("open a weight map by its own path: it names files of its folder")
            .unsupported());
    }
    let checkpoint = match sniff::sniff(source, &head, &options.limits)? {
        Container::Safetensors => safetensors::parse(source, stamp, options)?,
        Container::Pickled(kind) => {
            with_contents(kind, source, stamp, options, |contents| whole::checkpoint(contents, options))?
        }
    };
    checkpoint.validate()?;
    if options.strict {
        refuse_trailing_bytes(&checkpoint)?;
    }
    Ok(checkpoint)
}

/// Reads a container around one pickle but for its tensors, and passes it to `look`.
fn with_contents<T>(
    kind: Pickled,
    source: &dyn ReadAt,
    stamp: FileStamp,
    options: &OpenOptions,
    look: impl FnOnce(Contents<'_>) -> Result<T>,
) -> Result<T> {
    match kind {
        Pickled::Zip => pth::with_contents(source, stamp, options, look),
        Pickled::Legacy => legacy::with_contents(source, stamp, options, look),
        Pickled::Tar => tar::with_contents(source, stamp, options, look),
        Pickled::Plain => plain::with_contents(source, stamp, options, look),
    }
}

fn refuse_trailing_bytes(checkpoint: &Checkpoint) -> Result<()> {
    let trailing = |it: &Warning| match it {
        Warning::TrailingBytes { after, len_bytes } => Some((*after, *len_bytes)),
        _ => None,
    };
    match checkpoint.warnings.iter().find_map(trailing) {
        None => Ok(()),
        Some((after, len_bytes)) => {
            let expected = format!("nothing behind {after}");
            Err(Fault::new(expected, format!("{len_bytes} bytes")).hint("open it without --strict").corrupt())
        }
    }
}
