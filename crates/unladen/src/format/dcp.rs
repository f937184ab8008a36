//! Opens distributed checkpoints of PyTorch (DCP): a `.metadata` file that says which tensor is in which chunks, and
//! `.distcp` files, in which the chunks stand one after the other, each as a whole archive that `torch.save` wrote.

mod metadata;

use super::{
    OpenOptions,
    assembly::{Assembly, check_n_files},
    confine::Folder,
    folder::natural,
    pickle,
    tree::MAX_WARNINGS,
};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    error::{Error, Fault, Result},
    source::{FileSet, FileSource, ReadAt as _, Section},
    stamp::FileStamp,
    tensor::{Backing, Extent, Layout, Storage, StorageId, Tensor},
};
use metadata::{Chunk, Metadata, SplitTensor};
use std::{ops::Range, path::Path};

/// The file that makes a folder a distributed checkpoint.
pub(super) const METADATA: &str = ".metadata";

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
    put_together(metadata, places, &mut assembly.checkpoint)?;
    assembly.finish()
}

fn read_metadata(source: &FileSource, options: &OpenOptions) -> Result<Metadata> {
    pickle::check_len(source.len_bytes(), &options.limits)?;
    metadata::read(&source.read_range(0..source.len_bytes())?, options)
}

/// Where the chunks of a folder that was opened before are: in which files, and where there.
pub(super) fn archives(path: &Path, options: &OpenOptions) -> Result<Vec<(String, Range<u64>)>> {
    let source = FileSource::open(&path.join(METADATA))?;
    let metadata = read_metadata(&source, options).map_err(|error| error.in_file(source.path()))?;
    let place = |chunk: &Chunk| (metadata.files[chunk.file as usize].clone(), chunk.bytes.clone());
    Ok(metadata.chunks.iter().map(place).collect())
}

/// Where a chunk's elements are.
type Place = (StorageId, Layout);

/// Opens the files one after the other and reads the headers of every chunk; the places are those of the chunks, by position.
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
    let tensor_of = tensors_by_chunk(metadata);
    let mut chunks: Vec<usize> = (0..metadata.chunks.len()).collect();
    chunks.sort_by_key(|&it| {
        let chunk = &metadata.chunks[it];
        (rank[chunk.file as usize], chunk.bytes.start, chunk.bytes.end)
    });

    let mut places = vec![None; metadata.chunks.len()];
    for of_file in chunks.chunk_by(|a, b| metadata.chunks[*a].file == metadata.chunks[*b].file) {
        let Some(&first) = of_file.first() else { continue };
        let name = &names[metadata.chunks[first].file as usize];
        let source = folder.open(name)?;
        let first_storage = assembly.checkpoint.storages.len() as u32;
        let (mut storages, mut warnings) = (Vec::with_capacity(of_file.len()), Vec::new());
        let mut free_byte = 0;
        for &index in of_file {
            let (chunk, tensor) = (&metadata.chunks[index], &metadata.tensors[tensor_of[index]]);
            let named = |error: Error| error.in_tensor(&tensor.name).in_file(source.path());
            if chunk.bytes.start < free_byte {
                let found = format!("one at bytes {}..{}", chunk.bytes.start, chunk.bytes.end);
                let fault =
                    Fault::new(format!("a chunk from byte {free_byte} on, chunks share no bytes"), found);
                return Err(named(fault.corrupt()));
            }
            free_byte = chunk.bytes.end;
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

/// By position of a chunk the position of its tensor.
fn tensors_by_chunk(metadata: &Metadata) -> Vec<usize> {
    let tensors = metadata.tensors.iter().enumerate();
    tensors.flat_map(|(index, tensor)| tensor.chunks.clone().map(move |_| index)).collect()
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
fn further(mut error: Error, start_byte: u64) -> Error {
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
