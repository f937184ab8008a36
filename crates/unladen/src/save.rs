//! Writes checkpoints from any source, a tensor at a time: memory does not grow with the model, and a file appears
//! under its name only when it is whole. What the formats look like is in `pth`, `safetensors` and `folder`.

mod archive;
mod folder;
mod pickle;
mod pth;
mod safetensors;
mod target;

pub use crate::contents::Sink;
pub use target::free_disk_bytes;

use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    contents::{self, ReadPlan, Reader, Reads},
    dtype::DType,
    error::{Error, Fault, Result},
    progress::Progress,
    source::FileSet,
    stamp::FileStamp,
    tensor::{Backing, Layout, Tensor, TensorId},
};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

/// A tensor to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its full path.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// Which data it has, a number of the caller's choice. Entries with the same number are tied.
    pub data: usize,
}

/// Passes the row-major little-endian bytes of the data with this number to the sink, in order.
pub type Read<'a> = dyn FnMut(usize, &mut Sink<'_>) -> Result<()> + 'a;

/// What to write to.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// The file or folder to make.
    pub path: &'a Path,
    /// What it shall be.
    pub format: Format,
    /// Replace what is there already: a regular file, or a folder with nothing but `.pt` files in it.
    pub overwrite: bool,
    /// Files that the bytes come from: never replaced.
    pub inputs: &'a [FileStamp],
}

/// What the path says about the format, unless the caller does: by extension, a folder without one.
///
/// Fails with [`Error::Unsupported`] for an extension that no format has.
pub fn format_for_path(path: &Path, explicit: Option<Format>) -> Result<Format> {
    let is_folder = path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.is_dir();
    let extension = path.extension().map(|it| it.to_ascii_lowercase());
    match (explicit, extension.as_ref().map(|it| it.to_string_lossy()).as_deref()) {
        (Some(format), _) => Ok(format),
        _ if is_folder => Ok(Format::Folder),
        (_, None) => Ok(Format::Folder),
        (_, Some("pth" | "pt" | "bin")) => Ok(Format::Pth),
        (_, Some("safetensors")) => Ok(Format::Safetensors),
        (_, Some(other)) => Err(Fault::new(
            "a name that ends in .pth, .pt, .bin or .safetensors, or a folder",
            format!(".{other}"),
        )
        .hint("choose another name, or say which format to write (--to)")
        .unsupported()
        .in_file(path)),
    }
}

/// A checkpoint's tensors as entries; `data` is the number of the first tensor with the same bytes.
///
/// Fails if a tensor has no data.
pub fn entries_of(checkpoint: &Checkpoint) -> Result<Vec<Entry>> {
    let entry = |(tensor, first): (&Tensor, TensorId)| {
        if tensor.backing == Backing::Meta {
            return Err(Fault::new("a tensor with data", "one on the meta device")
                .tensor(&tensor.name)
                .hint("save the model again with its weights loaded")
                .unsupported()
                .in_file(&checkpoint.path));
        }
        Ok(Entry {
            name: tensor.name.clone(),
            dtype: tensor.layout.dtype(),
            shape: tensor.layout.shape().to_vec(),
            data: first.0 as usize,
        })
    };
    checkpoint.tensors.iter().zip(checkpoint.first_with_same_bytes()).map(entry).collect()
}

/// Writes a checkpoint's tensors in another format, or the same one anew.
///
/// Sparse and nested tensors and subclasses are written as their parts, tensors like any other, with a warning for each:
/// their sizes are in it and not in the new file. Quantised ones are refused by formats that have no such dtype.
///
/// Holds no more than the host budget. What is read leaves the page cache as it is; what is written goes through it.
///
/// Fails if a file of the checkpoint changes meanwhile; nothing is left behind then.
pub fn convert(
    checkpoint: &Checkpoint,
    files: &FileSet,
    output: &Output<'_>,
    host_budget_bytes: u64,
    progress: &Progress,
) -> Result<Vec<Warning>> {
    let writing_bytes = writing_bytes(checkpoint);
    let plan = ReadPlan::beside(writing_bytes, Reads::Tensors, checkpoint, files, host_budget_bytes, 1)?;
    let entries = entries_of(checkpoint)?;
    let open = contents::files_of(files);
    let mut reader = Reader::new(checkpoint, &open, &plan, progress)?;
    let output = Output { inputs: &checkpoint.files, ..*output };
    let mut read = |data: usize, sink: &mut Sink<'_>| {
        let id = TensorId(data as u32);
        reader.for_each_chunk(id, sink)?;
        checkpoint
            .pieces(id)
            .try_for_each(|piece| files.get(checkpoint.storage_of(&piece).file.0 as usize)?.check_unchanged())
    };
    let mut warnings = write(&output, &entries, &mut read, progress)?;
    warnings.extend(views_written_out(checkpoint));
    warnings.extend(checkpoint.composites.iter().map(|it| Warning::PartsAlone {
        name: it.name.clone(),
        what: format!("{} {:?}", it.kind, &it.shape[..]),
    }));
    Ok(warnings)
}

/// The warning for views that repeat bytes, if there are any: a few bytes of a file can be a tensor of gigabytes.
fn views_written_out(checkpoint: &Checkpoint) -> Option<Warning> {
    let repeated = checkpoint.first_with_same_bytes().into_iter().enumerate().filter_map(|(index, first)| {
        let layout = &checkpoint.tensor(first).layout;
        let more_bytes = layout.len_bytes().saturating_sub(bytes_in_file(layout));
        (first.0 as usize == index && more_bytes > 0).then_some(more_bytes)
    });
    let (n_tensors, len_bytes) = repeated.fold((0, 0), |(n, sum), it| (n + 1, sum + it));
    (n_tensors > 0).then_some(Warning::ViewsWrittenOut { n_tensors, len_bytes })
}

/// Bytes that the elements of a view lie in, or a few more where they lie in each other's way.
fn bytes_in_file(layout: &Layout) -> u64 {
    let stored = layout.stored_bytes();
    // What is expanded has a stride of zero.
    let sizes = layout.shape().iter().zip(layout.stride()).filter(|(_, stride)| **stride > 0);
    let n_elems = sizes.fold(1, |product: u64, (size, _)| product.saturating_mul(*size));
    n_elems.saturating_mul(layout.dtype().size_bytes()).min(stored.end - stored.start)
}

/// Fails as [`write_file`] would before its first byte.
pub fn check_file(path: &Path, overwrite: bool, inputs: &[FileStamp]) -> Result<()> {
    target::check_free(&plain(path, overwrite, inputs), false).map_err(|error| error.in_file(path))
}

/// Writes a file that is no checkpoint, whole or not at all: under a temporary name beside its own, synced and renamed.
/// `inputs` are files that are never replaced.
pub fn write_file(
    path: &Path,
    overwrite: bool,
    inputs: &[FileStamp],
    fill: impl FnOnce(&mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    let output = plain(path, overwrite, inputs);
    let write = || {
        target::check_free(&output, false)?;
        target::write_file(&output, |file| fill(&mut |bytes| file.write(bytes)))
    };
    write().map_err(|error| error.in_file(path))
}

/// Which format plays no part where bytes are written as they come.
fn plain<'a>(path: &'a Path, overwrite: bool, inputs: &'a [FileStamp]) -> Output<'a> {
    Output { path, format: Format::Pth, overwrite, inputs }
}

/// What writing takes besides reading: a buffer for small writes, and the lists of tensors and records with their names.
fn writing_bytes(checkpoint: &Checkpoint) -> u64 {
    let names: u64 = checkpoint.tensors.iter().map(|it| it.name.len() as u64).sum();
    target::BUFFER_BYTES as u64 + 4 * names + checkpoint.tensors.len() as u64 * BYTES_PER_ENTRY
}

/// What a tensor takes in these lists at most, its names apart.
const BYTES_PER_ENTRY: u64 = 512;

/// Writes tensors. `read` is called for one tensor after the other, in the order of the file.
///
/// The file is written under a temporary name beside its own, synced and renamed; on any error, and when the caller
/// cancels, it is removed. Fails before the first byte if something is in the way, the disk is too full, or the
/// format cannot hold a tensor; afterwards if `read` does or passes on more or fewer bytes than it should.
pub fn write(
    output: &Output<'_>,
    entries: &[Entry],
    read: &mut Read<'_>,
    progress: &Progress,
) -> Result<Vec<Warning>> {
    let tensors = check(entries).map_err(|error| error.in_file(output.path))?;
    let source = &mut Source { read, progress, path: output.path };
    match output.format {
        Format::Pth => pth::write(output, &tensors, source),
        Format::Safetensors => safetensors::write(output, &tensors, source),
        Format::Folder => folder::write(output, &tensors, source),
        read_only => {
            let written: Vec<_> = Format::writable().map(Format::name).collect();
            let expected = format!("a format that is written ({})", written.join(", "));
            Err(Fault::new(expected, format!("`{}`, which is only read", read_only.name()))
                .hint("write pth, safetensors or a folder")
                .unsupported())
        }
    }
    .map_err(|error| error.in_file(output.path))
}

/// An entry whose sizes have been checked.
struct Checked<'a> {
    name: &'a str,
    layout: Layout,
    data: usize,
}

impl Checked<'_> {
    fn len_bytes(&self) -> u64 {
        self.layout.len_bytes()
    }

    /// The error for a tensor that a format cannot hold.
    fn unsupported(&self, expected: &str, hint: &str) -> Error {
        Fault::new(expected, self.layout.dtype().name()).tensor(self.name).hint(hint).unsupported()
    }
}

/// Checks what every format relies on: each name once, sizes that do not overflow, ties that agree.
fn check(entries: &[Entry]) -> Result<Vec<Checked<'_>>> {
    let mut names = HashSet::new();
    let mut first_with: HashMap<usize, Layout> = HashMap::new();
    let mut total_bytes = 0u64;
    let mut tensors = Vec::with_capacity(entries.len());
    for entry in entries {
        let name = entry.name.as_str();
        let layout = Layout::contiguous(entry.dtype, &entry.shape).map_err(|error| error.in_tensor(name))?;
        if !names.insert(name) {
            return Err(Fault::new("each name once", "a second one").tensor(name).mismatch());
        }
        let first = first_with.entry(entry.data).or_insert_with(|| layout.clone());
        if (first.dtype(), first.len_bytes()) != (layout.dtype(), layout.len_bytes()) {
            let [one, other] = [&*first, &layout].map(|it| format!("{} {:?}", it.dtype(), it.shape()));
            let fault = Fault::new(format!("as its tied tensor, {one}"), other);
            return Err(fault.tensor(name).mismatch());
        }
        total_bytes = total_bytes.saturating_add(layout.len_bytes());
        if total_bytes > i64::MAX as u64 {
            let fault = Fault::new("tensors of less than 2^63 bytes in all", "more");
            return Err(fault.tensor(name).unsupported());
        }
        tensors.push(Checked { name, layout, data: entry.data });
    }
    Ok(tensors)
}

/// The warning for formats without ties, if there are any.
fn ties_written_out(tensors: &[Checked<'_>]) -> Vec<Warning> {
    let mut known = HashSet::new();
    let again = tensors.iter().filter(|it| !known.insert(it.data));
    let (n_tensors, len_bytes) = again.fold((0, 0), |(n, sum), it| (n + 1, sum + it.len_bytes()));
    (n_tensors > 0).then_some(Warning::TiesWrittenOut { n_tensors, len_bytes }).into_iter().collect()
}

/// Where the bytes come from, counted on their way.
struct Source<'a, 'r> {
    read: &'a mut Read<'r>,
    progress: &'a Progress,
    /// What is being written.
    path: &'a Path,
}

impl Source<'_, '_> {
    /// Passes a tensor's bytes to `sink`: exactly as many as it has, or an error.
    fn stream(&mut self, tensor: &Checked<'_>, sink: &mut Sink<'_>) -> Result<()> {
        let (progress, path) = (self.progress, self.path);
        let wrong = |found: String| {
            let expected = format!("{} bytes of data", tensor.len_bytes());
            Err(Fault::new(expected, found).tensor(tensor.name).mismatch())
        };
        progress.check(path)?;
        let mut done_bytes = 0;
        (self.read)(tensor.data, &mut |chunk| {
            progress.check(path)?;
            done_bytes += chunk.len() as u64;
            if done_bytes > tensor.len_bytes() {
                return wrong(format!("at least {done_bytes}"));
            }
            sink(chunk)?;
            progress.add(chunk.len() as u64);
            Ok(())
        })?;
        if done_bytes == tensor.len_bytes() { Ok(()) } else { wrong(format!("{done_bytes}")) }
    }
}

#[cfg(test)]
mod tests;
