//! Headers become a [`Checkpoint`]: what kind of file it is, which tensors it holds and where their bytes are.
//! Reads no tensor data and runs nothing that a file says.

mod folder;
pub mod names;
mod options;
mod pickle;
mod print;
mod pth;
mod rebuild;
mod roots;
mod safetensors;
mod sniff;
mod symbols;
mod tree;
mod zip;

pub use options::{Limits, OpenOptions};
pub use print::{TreeStyle, tree};

use crate::{
    checkpoint::{Checkpoint, Warning},
    error::{Error, Fault, Result},
    source::{FileSet, FileSource, ReadAt},
    stamp::FileStamp,
};
use sniff::Container;
use std::path::Path;

/// Reads the headers of a file or a folder, told by its content.
///
/// A folder holds one `.pt` or `.pth` file per tensor, named after it (see [`names`]), or is one of Hugging Face with a
/// single `model.safetensors` or `pytorch_model.bin`. Fails with [`Error::Io`] if the system does, with
/// [`Error::Corrupt`] if a file contradicts itself, with [`Error::Unsupported`] for what is known and not read, with
/// [`Error::Mismatch`] if no tensor is below the root that was asked for.
pub fn open(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let meta = std::fs::metadata(path).map_err(|error| Error::io(path, "open the file", error))?;
    let opened = if meta.is_dir() { folder::open(path, options) } else { open_file(path, options) };
    let (checkpoint, files) = opened?;
    match &options.root {
        None => Ok((checkpoint, files)),
        Some(root) => Ok((checkpoint.restrict(root)?, files)),
    }
}

fn open_file(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let source = FileSource::open(path)?;
    let checkpoint = parse(&source, source.stamp().clone(), options)?;
    let mut files = FileSet::default();
    files.push(source);
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
    let head = source.read_range(0..source.len_bytes().min(sniff::HEAD_BYTES))?;
    let checkpoint = match sniff::sniff(&head, options.limits.header_bytes)? {
        Container::Zip => pth::parse(source, stamp, options)?,
        Container::Safetensors => safetensors::parse(source, stamp, options)?,
    };
    checkpoint.validate()?;
    if options.strict {
        refuse_trailing_bytes(&checkpoint)?;
    }
    Ok(checkpoint)
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
