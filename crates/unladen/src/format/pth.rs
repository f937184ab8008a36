//! Reads the headers of a zip archive that `torch.save` wrote: which records there are, and what its pickle says.

use super::{
    OpenOptions,
    pickle::{self, Arena, Meaning, Value},
    rebuild::{Rebuild, StorageRef, unsigned},
    roots, symbols,
    tree::{self, MAX_WARNINGS},
    zip::{Archive, Entry, Records, show},
};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    dtype::DType,
    error::{Error, Fault, Result},
    source::ReadAt,
    stamp::FileStamp,
    tensor::{FileId, Storage, StorageId},
};

/// Versions of the archive format that PyTorch reads.
const VERSIONS: std::ops::RangeInclusive<u64> = 1..=10;
/// The records `version` and `byteorder` are a word each.
const MAX_WORD_BYTES: u64 = 64;
/// Records that only TorchScript archives have.
const TORCHSCRIPT: [&str; 3] = ["constants.pkl", "model.json", "attributes.pkl"];

/// An archive's pickle, and the storages that it names.
pub(super) struct Contents<'a> {
    pub(super) arena: &'a Arena<'a>,
    pub(super) root: Value,
    pub(super) storages: Vec<Storage>,
    pub(super) refs: Vec<StorageRef>,
    pub(super) warnings: Vec<Warning>,
}

/// Reads an archive from its directory, its small records and its pickle.
pub(super) fn parse(source: &dyn ReadAt, stamp: FileStamp, options: &OpenOptions) -> Result<Checkpoint> {
    with_contents(source, options, |contents| {
        let Contents { arena, root, mut storages, refs, mut warnings } = contents;
        let rebuild = Rebuild { arena, storages: &storages, refs: &refs };
        let mut listing = tree::list(&rebuild, root, &options.limits, &mut warnings)?;
        storages.shrink_to_fit();
        listing.tensors.shrink_to_fit();
        Ok(Checkpoint {
            format: Format::Pth,
            path: stamp.path.clone(),
            files: vec![stamp],
            storages,
            extents: Vec::new(),
            tensors: listing.tensors,
            composites: listing.composites,
            roots: roots::candidates(arena, root),
            warnings,
        })
    })
}

/// Reads everything but the tensors, and passes it to `look`.
pub(super) fn with_contents<T>(
    source: &dyn ReadAt,
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
    warnings.extend(pickle.arena.merge_duplicate_keys(MAX_WARNINGS).into_iter().map(Warning::DuplicateKey));
    symbols::check(&pickle.arena, options.strict, &mut warnings)?;

    let (storages, refs) = storages(&pickle.arena, &records, root, swapped)?;
    // What comes next takes as much again.
    drop(records);
    drop(archive);
    look(Contents { arena: &pickle.arena, root: pickle.root, storages, refs, warnings })
}

/// The folder that every record is in, with its `/`. Its name is free text and never used as a path.
fn root<'a>(archive: &'a Archive, records: &Records<'_>) -> Result<&'a [u8]> {
    let names = || archive.entries.iter().map(|entry| archive.name(entry));
    if records.get(b"MAR-INF/MANIFEST.json").is_some() {
        return Err(Fault::new("a checkpoint", "a TorchServe archive (.mar), which holds one")
            .hint("unzip it and open the model file in it")
            .unsupported());
    }
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
    if let Some(record) = TORCHSCRIPT.iter().find(|it| records.get(&[root, it.as_bytes()].concat()).is_some())
    {
        return Err(Fault::new(
            "a checkpoint of tensors",
            format!("a TorchScript program (record `{record}`)"),
        )
        .hint("load it with torch.jit.load and save its state_dict()")
        .unsupported());
    }
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
            Err(Fault::new(expected, format!("version {version}")).unsupported())
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

/// A small record's content.
fn read(source: &dyn ReadAt, entry: &Entry, name: &str, max_bytes: u64) -> Result<Vec<u8>> {
    if !entry.is_stored() {
        return Err(deflated(name));
    }
    if entry.len_bytes > max_bytes {
        let expected = format!("a record `{name}` of at most {max_bytes} bytes");
        return Err(Fault::new(expected, format!("{} bytes", entry.len_bytes)).unsupported());
    }
    source.read_range(entry.start_byte..entry.start_byte + entry.len_bytes)
}

fn deflated(name: &str) -> Error {
    Fault::new("stored records, as torch.save writes them", format!("record `{name}` deflated"))
        .hint("unzip the file and zip it again without compression (`zip -0`), or save it again with torch.save")
        .unsupported()
}

/// Every storage that the pickle names, each once, and by persistent id which one it is.
fn storages(
    arena: &Arena<'_>,
    records: &Records<'_>,
    root: &[u8],
    swapped: bool,
) -> Result<(Vec<Storage>, Vec<StorageRef>)> {
    let mut storages: Vec<Storage> = Vec::with_capacity(arena.persistent.len().min(records.len()));
    // By position of the record: one lookup finds both.
    let mut ids: Vec<Option<StorageId>> = vec![None; records.len()];
    let mut refs = Vec::with_capacity(arena.persistent.len());
    let prefix = [root, b"data/"].concat();
    let mut name = prefix.clone();
    let mut next_position = 0;
    for &id in &arena.persistent {
        let (meaning, key, n_elems) = persistent_id(arena, id)?;
        name.truncate(prefix.len());
        name.extend_from_slice(key);
        let in_record = |error: Fault| {
            Fault { expected: format!("record `{}` with {}", show(&name), error.expected), ..error }.corrupt()
        };
        let Some((position, entry)) = records.find_near(next_position, &name) else {
            return Err(in_record(Fault::new("the storage's bytes", "no such record")));
        };
        next_position = position + 1;
        if !entry.is_stored() {
            return Err(deflated(&show(&name)));
        }
        let len_bytes = entry.len_bytes;
        let storage = *ids[position].get_or_insert_with(|| {
            storages.push(Storage { file: FileId(0), start_byte: entry.start_byte, len_bytes, swapped });
            StorageId(storages.len() as u32 - 1)
        });
        let elem_bytes = meaning.map_or(1, |dtype| dtype.size_bytes());
        if n_elems.checked_mul(elem_bytes) != Some(len_bytes) {
            let expected = format!("{n_elems} elements of {elem_bytes} bytes");
            return Err(in_record(Fault::new(expected, format!("{len_bytes} bytes"))));
        }
        refs.push(StorageRef { id: storage, dtype: meaning });
    }
    Ok((storages, refs))
}

/// Takes ('storage', class, key, location, number of elements) apart; the location is where the storage was once.
fn persistent_id<'a>(arena: &Arena<'a>, id: Value) -> Result<(Option<DType>, &'a [u8], u64)> {
    let items = arena.sequence(id).unwrap_or_default();
    let &[Value::Str(kind), class, Value::Str(key), Value::Str(_), n_elems] = items else {
        let expected = "a persistent id of a storage, its class, key, location and size";
        return Err(Fault::new(expected, format!("{} other values", items.len())).corrupt());
    };
    if arena.bytes(kind) != b"storage" {
        return Err(Fault::new("a persistent id of a storage", format!("`{}`", arena.text(kind))).corrupt());
    }
    match arena.meaning(class) {
        Meaning::Storage(dtype) => Ok((dtype, arena.bytes(key), unsigned(n_elems)?)),
        _ => {
            let found = match class {
                Value::Symbol(symbol) => arena.symbols[symbol as usize].to_string(),
                _ => "no class".to_owned(),
            };
            Err(Fault::new("a class of storages", found.escape_debug().to_string()).unsupported())
        }
    }
}

#[cfg(test)]
mod tests;
