//! Reads the headers of a zip archive that `torch.save` wrote: which records there are, and what its pickle says.

use super::{
    OpenOptions, exported, inline,
    persistent::storage_claim,
    pickle::{self, Arena},
    rebuild::StorageRef,
    record::{self, read},
    torchscript,
    whole::{Contents, Parts, prepare},
    zip::{Archive, Entry, Records, show},
};
use crate::{
    checkpoint::{Format, Warning},
    error::{Fault, Result},
    source::ReadAt,
    stamp::FileStamp,
    tensor::{FileId, Storage, StorageId},
};

/// Versions of the archive format that PyTorch reads.
const VERSIONS: std::ops::RangeInclusive<u64> = 1..=10;
/// The records `version` and `byteorder` are a word each.
const MAX_WORD_BYTES: u64 = 64;

/// Reads an archive's directory, its small records and its pickle, and passes them to `look`.
pub(super) fn with_contents<T>(
    source: &dyn ReadAt,
    stamp: FileStamp,
    options: &OpenOptions,
    look: impl FnOnce(Contents<'_>) -> Result<T>,
) -> Result<T> {
    let limits = &options.limits;
    let archive = Archive::read(source, limits)?;
    let records = archive.by_name()?;
    let root = &*root(&archive, &records)?.to_vec();
    let mut warnings = Vec::new();
    if archive.trailing_bytes > 0 {
        let after = "the end of the zip archive";
        warnings.push(Warning::TrailingBytes { after, len_bytes: archive.trailing_bytes });
    }
    let pickle_entry = find_pickle(&archive, &records, root)?;
    check_version(source, &records, root, &mut warnings)?;
    let swapped = is_big_endian(source, &records, root)?;

    pickle::check_len(pickle_entry.len_bytes, limits)?;
    let pickle_bytes = read(source, pickle_entry, "data.pkl", limits.pickle_bytes)?;
    if pickle_entry.crc32 != 0 && crc32fast::hash(&pickle_bytes) != pickle_entry.crc32 {
        return Err(Fault::new("data.pkl as it was written", "another checksum")
            .at(pickle_entry.start_byte)
            .corrupt());
    }
    let mut pickle = pickle::read(&pickle_bytes, pickle_entry.start_byte, limits)?;
    if pickle.trailing_bytes > 0 {
        let after = "the end of the pickle";
        warnings.push(Warning::TrailingBytes { after, len_bytes: pickle.trailing_bytes });
    }
    prepare(&mut pickle, options, &mut warnings)?;

    let mut files = vec![stamp];
    let data = [root, b"data/"].concat();
    let (mut storages, refs) = storages(&pickle.arena, &records, &data, &mut files, swapped)?;
    let inside = inline::Inside::of(Some(source).filter(|_| pickle_entry.is_stored()));
    let given = inline::find(&pickle.arena, inside, &mut files, &mut storages, limits, &mut warnings)?;
    let constants =
        torchscript::constants(source, &records, root, swapped, options, &mut files, &mut warnings)?;
    // What comes next takes as much again.
    drop(records);
    drop(archive);
    let format = if constants.is_some() { Format::TorchScript } else { Format::Pth };
    let parts = Parts { storages, refs, given };
    look(Contents { format, files, arena: &pickle.arena, root: pickle.root, parts, constants, warnings })
}

/// The folder that every record is in, with its `/`. Its name is free text and never used as a path.
fn root<'a>(archive: &'a Archive, records: &Records<'_>) -> Result<&'a [u8]> {
    let names = || archive.entries.iter().map(|entry| archive.name(entry));
    if records.get(b"MAR-INF/MANIFEST.json").is_some() {
        return Err(Fault::new("a checkpoint", "a TorchServe archive (.mar), which holds one")
            .hint("unzip it and open the model file in it")
            .unsupported());
    }
    exported::refuse_old(records)?;
    let first = names().next().unwrap_or_default();
    let Some(root_bytes) = first.iter().position(|&it| it == b'/') else {
        let is_numpy = names().all(|it| it.ends_with(b".npy"));
        let found = if is_numpy { "arrays of NumPy (.npz)".into() } else { format!("`{}`", show(first)) };
        return Err(Fault::new("records in one folder of the zip archive", found)
            .hint("this zip archive was not written by torch.save")
            .corrupt());
    };
    let root = &first[..=root_bytes];
    match names().find(|it| !it.starts_with(root)) {
        None => Ok(root),
        Some(stray) => {
            let found = format!("`{}`", show(stray));
            Err(Fault::new(format!("every record in `{}`", show(root)), found)
                .hint("something was added to the archive; do not trust it")
                .corrupt())
        }
    }
}

fn find_pickle<'a>(archive: &Archive, records: &Records<'a>, root: &[u8]) -> Result<&'a Entry> {
    torchscript::refuse_old(records, root)?;
    exported::refuse(archive, records, root)?;
    records.get(&[root, b"data.pkl"].concat()).ok_or_else(|| {
        let found = format!("{} other records", archive.entries.len());
        Fault::new(format!("record `{}data.pkl`", show(root)), found)
            .hint("this zip archive was not written by torch.save")
            .corrupt()
    })
}

fn check_version(
    source: &dyn ReadAt,
    records: &Records<'_>,
    root: &[u8],
    warnings: &mut Vec<Warning>,
) -> Result<()> {
    let entry =
        ["version", ".data/version"].iter().find_map(|it| records.get(&[root, it.as_bytes()].concat()));
    let Some(entry) = entry else {
        warnings.push(Warning::MissingRecord("version"));
        return Ok(());
    };
    let text = read(source, entry, "version", MAX_WORD_BYTES)?;
    let version = std::str::from_utf8(&text).ok().and_then(|it| it.trim().parse::<u64>().ok());
    match version {
        Some(version) if VERSIONS.contains(&version) => Ok(()),
        Some(version) => {
            let expected = format!("an archive of version {} to {}", VERSIONS.start(), VERSIONS.end());
            Err(Fault::new(expected, format!("version {version}"))
                .hint("a PyTorch newer than this program may have written it; save it as safetensors there")
                .unsupported())
        }
        None => Err(Fault::new("a number as the archive's version", format!("`{}`", show(&text))).corrupt()),
    }
}

fn is_big_endian(source: &dyn ReadAt, records: &Records<'_>, root: &[u8]) -> Result<bool> {
    // Files from before the record existed were written by little-endian machines, nearly all of them.
    let Some(entry) = records.get(&[root, b"byteorder"].concat()) else { return Ok(false) };
    match &*read(source, entry, "byteorder", MAX_WORD_BYTES)? {
        b"little" => Ok(false),
        b"big" => Ok(true),
        other => Err(Fault::new("byte order `little` or `big`", format!("`{}`", show(other))).corrupt()),
    }
}

/// Every storage that the pickle names, each once, and by persistent id which one it is. The names of their records
/// start with `prefix`. `files` starts with the archive; records in it that are deflated come behind.
pub(super) fn storages(
    arena: &Arena<'_>,
    records: &Records<'_>,
    prefix: &[u8],
    files: &mut Vec<FileStamp>,
    swapped: bool,
) -> Result<(Vec<Storage>, Vec<StorageRef>)> {
    let mut storages: Vec<Storage> = Vec::with_capacity(arena.persistent.len().min(records.len()));
    // By position of the record: one lookup finds both.
    let mut ids: Vec<Option<StorageId>> = vec![None; records.len()];
    let mut refs = Vec::with_capacity(arena.persistent.len());
    let mut name = prefix.to_vec();
    let mut next_position = 0;
    for &id in &arena.persistent {
        let claim = storage_claim(arena, id, false)?;
        name.truncate(prefix.len());
        name.extend_from_slice(claim.key);
        let in_record = |error: Fault| {
            Fault { expected: format!("record `{}` with {}", show(&name), error.expected), ..error }.corrupt()
        };
        let Some((position, entry)) = records.find_near(next_position, &name) else {
            return Err(in_record(Fault::new("the storage's bytes", "no such record")));
        };
        next_position = position + 1;
        let len_bytes = entry.len_bytes;
        let storage = *ids[position].get_or_insert_with(|| {
            let (file, start_byte) = match entry.is_stored() {
                true => (FileId(0), entry.start_byte),
                // Its bytes are those of a file of its own.
                false => {
                    files.push(record::stamp(&files[0], entry, &name));
                    (FileId(files.len() as u32 - 1), 0)
                }
            };
            storages.push(Storage { file, start_byte, len_bytes, swapped });
            StorageId(storages.len() as u32 - 1)
        });
        let (n_elems, elem_bytes) = (claim.n_elems, claim.elem_bytes());
        if n_elems.checked_mul(elem_bytes) != Some(len_bytes) {
            let expected = format!("{n_elems} elements of {elem_bytes} bytes");
            return Err(in_record(Fault::new(expected, format!("{len_bytes} bytes"))));
        }
        refs.push(StorageRef { id: storage, dtype: claim.dtype });
    }
    Ok((storages, refs))
}

#[cfg(test)]
mod deflated;
#[cfg(test)]
mod multiplied;
#[cfg(test)]
mod odd;
#[cfg(test)]
mod tests;
