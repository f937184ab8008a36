//! Headers become a [`Checkpoint`]: what kind of file it is, which tensors it holds and where their bytes are.
//! Reads no tensor data and runs nothing that a file says.

mod assemble;
mod folder;
mod given;
mod inline;
mod legacy;
pub mod names;
mod options;
mod persistent;
mod pickle;
mod plain;
mod pth;
mod rebuild;
mod safetensors;
mod sniff;
mod tar;
mod torchscript;
mod tree;
mod window;
mod zip;

pub use options::{Limits, OpenOptions};

use crate::{
    checkpoint::Checkpoint,
    error::{Error, Result},
    source::{FileSet, FileSource, ReadAt},
    stamp::FileStamp,
};
use sniff::Container;
use std::path::Path;

/// Reads the headers of a file or a folder, told by its content.
///
/// A file is safetensors, or of PyTorch: a zip archive (of `torch.save` or `torch.jit.save`), a legacy file from before
/// PyTorch 1.6, a tar archive from before 0.1.10, or a plain pickle with the tensors inside.
/// A folder holds one `.pt` or `.pth` file per tensor, named after it (see [`names`]), or is one of Hugging Face with a
/// single `model.safetensors` or `pytorch_model.bin`. Fails with [`Error::Io`] if the system does, with
/// [`Error::Corrupt`] if a file contradicts itself, with [`Error::Unsupported`] for what is known and not read.
pub fn open(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let meta = std::fs::metadata(path).map_err(|error| Error::io(path, "open the file", error))?;
    if meta.is_dir() { folder::open(path, options) } else { open_file(path, options) }
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
/// Fails as [`open`] does. What it returns has passed [`Checkpoint::validate`].
pub fn parse(source: &dyn ReadAt, stamp: FileStamp, options: &OpenOptions) -> Result<Checkpoint> {
    let path = stamp.path.clone();
    parse_any(source, stamp, options).map_err(|error| error.in_file(&path))
}

fn parse_any(source: &dyn ReadAt, stamp: FileStamp, options: &OpenOptions) -> Result<Checkpoint> {
    let head = source.read_range(0..source.len_bytes().min(sniff::HEAD_BYTES))?;
    let checkpoint = match sniff::sniff(&head, options.limits.header_bytes)? {
        Container::Zip => pth::parse(source, stamp, options)?,
        Container::Safetensors => safetensors::parse(source, stamp, options)?,
        Container::Legacy => legacy::parse(source, stamp, options)?,
        Container::Tar => tar::parse(source, stamp, options)?,
        Container::Pickle => plain::parse(source, stamp, options)?,
    };
    checkpoint.validate()?;
    Ok(checkpoint)
}
