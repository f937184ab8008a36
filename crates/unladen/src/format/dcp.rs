//! Opens distributed checkpoints of PyTorch (DCP): a `.metadata` file that says which tensor is in which chunks, and
//! `.distcp` files, in which the chunks stand one after the other, each as a whole archive that `torch.save` wrote.

mod metadata;

use super::{
    OpenOptions,
    assembly::{Assembly, check_n_files},
    confine::{Folder, ShownNames},
    folder::natural,
    pickle,
    records::records_inside,
    tree::MAX_WARNINGS,
};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    error::{Error, Fault, Result},
    source::{FileSet, FileSource, ReadAt as _, Section},
    stamp::FileStamp,
    tensor::{Backing, Extent, Layout, Storage, StorageId, Tensor, TensorId},
};
use metadata::{Chunk, Metadata, Object, SplitTensor};
use std::{collections::HashSet, ops::Range, path::Path};

/// The file that makes a folder a distributed checkpoint.
pub(super) const METADATA: &str = ".metadata";

/// What names of files with chunks end with.
pub(super) const CHUNKS: &str = ".distcp";

/// What helps where a chunk's archive is none that PyTorch writes there.
const SAVE_AGAIN: &str = "load it with PyTorch and save it again with torch.distributed.checkpoint.save";

/// Opens the folder.
pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let folder = Folder::new(path, options);
    let source = folder.open(METADATA)?;
    read(&source, &folder, options).map_err(|error| error.in_file(source.path()))
}

fn read(source: &FileSource, folder: &Folder<'_>, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let mut metadata = read_metadata(source, options)?;
    check_n_files(metadata.files.len(), options)?;
    let mut assembly = Assembly::new(Format::Dcp, folder.path(), options);
    let places = open_files(&metadata, folder, &mut assembly, options)?;
    assembly.checkpoint.warnings.append(&mut metadata.warnings);
    assembly.checkpoint.warnings.extend(strays(folder.path(), &metadata.files, options));
    assembly.checkpoint.roots = std::mem::take(&mut metadata.roots);
    put_together(metadata, places, &mut assembly.checkpoint)?;
    assembly.finish()
}

/// A warning about files of chunks that the metadata do not name. None if the folder cannot be listed: the metadata say what
/// the checkpoint is, and this is news beside it.
fn strays(folder: &Path, files: &[String], options: &OpenOptions) -> Option<Warning> {
    let named: HashSet<&str> = files.iter().map(String::as_str).collect();
    let entries = std::fs::read_dir(folder).ok()?.take(options.limits.n_files);
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut strays: Vec<String> = names.filter(|it| it.ends_with(CHUNKS) && !named.contains(&**it)).collect();
    strays.sort_unstable();
    let mut shown = ShownNames::default();
    strays.iter().for_each(|it| shown.push(it));
    let what = || format!("files that `{METADATA}` does not name: {shown}");
    (shown.len() > 0).then(|| Warning::LeftOut(what()))
}

fn read_metadata(source: &FileSource, options: &OpenOptions) -> Result<Metadata> {
    pickle::check_len(source.len_bytes(), &options.limits)?;
    metadata::read(&source.read_range(0..source.len_bytes())?, options)
}

/// Where the chunks of a folder that was opened before are: in which files, and where there.
pub(super) fn archives(path: &Path, options: &OpenOptions) -> Result<Vec<(String, Range<u64>)>> {
    let source = FileSource::open(&path.join(METADATA))?;
    let metadata = read_metadata(&source, options).map_err(|error| error.in_file(source.path()))?;
    let place = |part: Part<'_>| (metadata.files[part.file as usize].clone(), part.bytes);
    Ok(parts(&metadata).into_iter().map(place).collect())
}

/// What a folder's state dict holds under a name.
pub(super) enum Item {
    /// A tensor of the checkpoint's.
    Tensor(TensorId),
    /// What is no tensor, in an archive of its own: in this file of the folder, and where there.
    Object { name: String, file: String, bytes: Range<u64> },
}

/// Everything that a folder's state dict holds, in its order. `n_tensors`: of the checkpoint that it was opened as.
///
/// Fails with [`Error::Mismatch`] if the metadata say something else by now.
pub(super) fn items(path: &Path, n_tensors: usize, options: &OpenOptions) -> Result<Vec<Item>> {
    let source = Folder::new(path, options).open(METADATA)?;
    let metadata = read_metadata(&source, options).map_err(|error| error.in_file(source.path()))?;
    if metadata.tensors.len() != n_tensors {
        let found = format!("{}", metadata.tensors.len());
        return Err(Fault::new(format!("metadata of {n_tensors} tensors"), found)
            .hint("the folder changed meanwhile; try again")
            .mismatch()
            .in_file(source.path()));
    }
    let mut items = Vec::with_capacity(n_tensors + metadata.objects.len());
    let mut tensors = (0..n_tensors as u32).map(|it| Item::Tensor(TensorId(it)));
    let mut n_listed = 0;
    for Object { name, n_before, place } in metadata.objects {
        items.extend(tensors.by_ref().take(n_before - n_listed));
        n_listed = n_before;
        let place = place.map(|(file, bytes)| (metadata.files[file as usize].clone(), bytes));
        items.extend(place.map(|(file, bytes)| Item::Object { name, file, bytes }));
    }
    items.extend(tensors);
    Ok(items)
}

/// An archive in one of the files: of a chunk, or of what is no tensor.
struct Part<'m> {
    file: u32,
    bytes: Range<u64>,
    name: &'m str,
    /// Its position in [`Metadata::chunks`], and whose it is.
    chunk: Option<(usize, &'m SplitTensor)>,
}

fn parts(metadata: &Metadata) -> Vec<Part<'_>> {
    let chunks = metadata.tensors.iter().flat_map(|tensor| {
        tensor.chunks.clone().map(move |index| {
            let Chunk { file, bytes, .. } = &metadata.chunks[index];
            Part { file: *file, bytes: bytes.clone(), name: &tensor.name, chunk: Some((index, tensor)) }
        })
    });
    let objects = metadata.objects.iter().filter_map(|object| {
        let (file, bytes) = object.place.clone()?;
        Some(Part { file, bytes, name: &object.name, chunk: None })
    });
    chunks.chain(objects).collect()
}

/// Where a chunk's elements are.
type Place = (StorageId, Layout);

/// Opens the files one after the other and reads the headers of every chunk, not what is no tensor; the places are those of the chunks, by position.
fn open_files(
    metadata: &Metadata,
    folder: &Folder<'_>,
    assembly: &mut Assembly,
    options: &OpenOptions,
) -> Result<Vec<Option<Place>>> {
    let names = &metadata.files;
    let mut order: Vec<u32> = (0..names.len() as u32).collect();
    order.sort_by(|a, b| natural(&names[*a as usize], &names[*b as usize]));
    let mut rank = vec![0; names.len()];
    order.iter().enumerate().for_each(|(index, file)| rank[*file as usize] = index);
    let mut parts = parts(metadata);
    parts.sort_by_key(|it| (rank[it.file as usize], it.bytes.start, it.bytes.end));

    let mut places = vec![None; metadata.chunks.len()];
    for of_file in parts.chunk_by(|a, b| a.file == b.file) {
        let Some(first) = of_file.first() else { continue };
        let source = folder.open(&names[first.file as usize])?;
        let first_storage = assembly.checkpoint.storages.len() as u32;
        let (mut storages, mut warnings) = (Vec::with_capacity(of_file.len()), Vec::new());
        let mut free_byte = 0;
        for part in of_file {
            let named = |error: Error| error.in_tensor(part.name).in_file(source.path());
            if part.bytes.start < free_byte {
                let found = format!("one at bytes {}..{}", part.bytes.start, part.bytes.end);
                let fault =
                    Fault::new(format!("a chunk from byte {free_byte} on, chunks share no bytes"), found);
                return Err(named(fault.corrupt()));
            }
            free_byte = part.bytes.end;
            let Some((index, tensor)) = part.chunk else {
                // It is not read, but nothing about its archive may be ambiguous.
                records_inside(&source, part.bytes.clone(), &options.limits).map_err(named)?;
                continue;
            };
            let chunk = &metadata.chunks[index];
            let (storage, layout) =
                open_chunk(&source, chunk, tensor, options, &mut warnings).map_err(named)?;
            places[index] = Some((StorageId(first_storage + storages.len() as u32), layout));
            storages.push(storage);
        }
        let stamp = source.stamp().clone();
        let mut files = FileSet::default();
        files.push(source);
        assembly.append((of_one_file(stamp, storages, warnings), files))?;
    }
    Ok(places)
}

fn of_one_file(stamp: FileStamp, storages: Vec<Storage>, warnings: Vec<Warning>) -> Checkpoint {
    Checkpoint {
        format: Format::Dcp,
        path: stamp.path.clone(),
        files: vec![stamp],
        storages,
        extents: Vec::new(),
        tensors: Vec::new(),
        composites: Vec::new(),
        roots: Vec::new(),
        warnings,
    }
}

/// Reads the headers of the archive that a chunk is, and finds the one tensor in it.
fn open_chunk(
    source: &FileSource,
    chunk: &Chunk,
    tensor: &SplitTensor,
    options: &OpenOptions,
    warnings: &mut Vec<Warning>,
) -> Result<(Storage, Layout)> {
    let section = Section::new(source, chunk.bytes.clone())?;
    let stamp = FileStamp { len_bytes: section.len_bytes(), ..source.stamp().clone() };
    let options = OpenOptions { limits: options.limits, ..OpenOptions::default() };
    let mut one =
        super::parse(&section, stamp, &options).map_err(|error| further(error, chunk.bytes.start))?;
    // One writer makes all chunks, and what is odd about one is odd about all.
    for warning in one.warnings.drain(..) {
        if warnings.len() < MAX_WARNINGS && !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
    if let Some(composite) = one.composites.first() {
        let found = format!("one of a {} tensor, which is more than its numbers", composite.kind);
        return Err(Fault::new("a chunk of a plain tensor", found)
            .hint("load it with PyTorch and save it with torch.save, or leave the tensor out")
            .unsupported());
    }
    let (Some(found), None) = (one.tensors.pop(), one.tensors.pop()) else {
        return Err(Fault::new("an archive with one tensor as a chunk", "one with others").corrupt());
    };
    let storage = match found.backing {
        Backing::Storage(storage) if one.files.len() == 1 => one.storages[storage.0 as usize].clone(),
        Backing::Meta => {
            return Err(Fault::new("a chunk with bytes", "one without").hint(SAVE_AGAIN).unsupported());
        }
        _ => {
            let expected = "a chunk whose bytes stand in its archive as they are";
            return Err(Fault::new(expected, "one that was compressed").hint(SAVE_AGAIN).unsupported());
        }
    };
    let layout = found.layout;
    // What is put together of it later looks like any other tensor.
    layout.check_expansion()?;
    if layout.dtype() != tensor.dtype || layout.shape() != &*chunk.size {
        let expected = format!("a chunk {} {:?}, as the metadata say", tensor.dtype, chunk.size);
        let found = format!("{} {:?}", layout.dtype(), layout.shape());
        return Err(Fault::new(expected, found)
            .hint("the files are from different saves; copy the folder again")
            .corrupt());
    }
    // Inside the section, and so inside the file.
    Ok((Storage { start_byte: chunk.bytes.start + storage.start_byte, ..storage }, layout))
}

/// The error of a part of a file, with its place counted from the beginning of the file.
pub(super) fn further(mut error: Error, start_byte: u64) -> Error {
    if let Error::Corrupt(fault) | Error::Unsupported(fault) | Error::Mismatch(fault) = &mut error {
        fault.offset_bytes = fault.offset_bytes.map(|it| it.saturating_add(start_byte));
    }
    error
}

/// Makes a tensor of its chunks: one that holds it whole stays as it is stored, several become extents.
fn put_together(
    metadata: Metadata,
    mut places: Vec<Option<Place>>,
    checkpoint: &mut Checkpoint,
) -> Result<()> {
    for tensor in metadata.tensors {
        let SplitTensor { name, dtype, size, chunks } = tensor;
        let is_whole = |chunk: &Chunk| chunk.size == size && chunk.at.iter().all(|&it| it == 0);
        if let [chunk] = &metadata.chunks[chunks.clone()]
            && is_whole(chunk)
            && let Some((storage, layout)) = places[chunks.start].take()
        {
            checkpoint.tensors.push(Tensor { name, layout, backing: Backing::Storage(storage) });
            continue;
        }
        let layout = Layout::contiguous(dtype, &size).map_err(|error| error.in_tensor(&name))?;
        let first_extent = checkpoint.extents.len();
        for index in chunks {
            let at = metadata.chunks[index].at.clone();
            let place = places[index].take().filter(|(_, layout)| layout.n_elems() > 0);
            checkpoint.extents.extend(place.map(|(storage, layout)| Extent { storage, layout, at }));
        }
        // There are no more extents than chunks, and no more chunks than storages, which have 32-bit numbers.
        let extents = first_extent as u32..checkpoint.extents.len() as u32;
        checkpoint.tensors.push(Tensor { name, layout, backing: Backing::Extents(extents) });
    }
    Ok(())
}
