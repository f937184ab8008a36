//! Reads the headers of a legacy file of PyTorch (before 1.6, or saved without the zip format): five pickles one behind
//! the other, then the storages, each behind its number of elements. Their bytes are passed over, never read.

use super::{
    Limits, OpenOptions, inline,
    persistent::{StorageClaim, storage_claim, text},
    pickle::{self, Arena, PersistentIds, Skeleton, Value, Wide, skim, skim_object},
    rebuild::StorageRef,
    whole::{Contents, Parts, prepare},
    window::Window,
};
use crate::{
    checkpoint::{Format, Warning},
    dtype::DType,
    error::{Fault, Result},
    source::ReadAt,
    stamp::FileStamp,
    tensor::{FileId, Storage, StorageId},
};
use foldhash::HashMap;

/// PyTorch's magic number 0x1950a86a20f9469cfc6c, the least byte first.
const MAGIC: &[u8] = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// The only version of the format that there has been.
const PROTOCOL: i64 = 1001;
/// The most that the magic number, the version and the facts of the machine may take.
const SMALL_BYTES: u64 = 64 << 10;
const TRUNCATED: &str = "the file looks truncated; compare its size with the publisher's";

/// Reads a file's pickles and the numbers in front of its storages, and passes them to `look`.
pub(super) fn with_contents<T>(
    source: &dyn ReadAt,
    stamp: FileStamp,
    options: &OpenOptions,
    look: impl FnOnce(Contents<'_>) -> Result<T>,
) -> Result<T> {
    let limits = &options.limits;
    let mut window = Window::new(source, 0..source.len_bytes());
    let stream = Stream::read(&mut window, limits)?;
    let mut pickle = stream.pickle(limits)?;
    let Found { mut storages, refs, end_byte } =
        find_storages(&pickle.arena, &stream.keys, &mut window, source.len_bytes(), limits)?;
    let mut warnings = Vec::new();
    if end_byte < window.range.end {
        let after = "the last storage";
        warnings.push(Warning::TrailingBytes { after, len_bytes: window.range.end - end_byte });
    }
    drop(window);
    prepare(&mut pickle, options, &mut warnings)?;
    let mut files = vec![stamp];
    let inside = inline::Inside::of(Some(source));
    let given = inline::find(&pickle.arena, inside, &mut files, &mut storages, limits, &mut warnings)?;
    look(Contents {
        format: Format::Legacy,
        files,
        arena: &pickle.arena,
        root: pickle.root,
        parts: Parts { storages, refs, given },
        constants: None,
        warnings,
    })
}

/// The one storage of a legacy file that stands inside another one.
pub(super) struct StorageInside {
    pub(super) storage: Storage,
    /// `None`: untyped bytes.
    pub(super) dtype: Option<DType>,
    /// Where the inner file ends.
    pub(super) end_byte: u64,
}

/// Reads the headers of a whole legacy file that stands inside another one and holds one storage. The window starts with
/// it; it may reach until `max_end_byte`, of which the window need hold no more than the headers.
pub(super) fn storage_inside(
    window: &mut Window<'_>,
    max_end_byte: u64,
    limits: &Limits,
) -> Result<StorageInside> {
    let start_byte = window.range.start;
    let no_storage = |found: &str| {
        Fault::new("a storage in a legacy file inside the pickle", found)
            .at(start_byte)
            .hint("load it with PyTorch and save it again with torch.save, or as safetensors")
            .unsupported()
    };
    if window.from(start_byte, 4)?.starts_with(b"PK\x03\x04") {
        return Err(no_storage("a zip archive"));
    }
    let stream = Stream::read(window, limits)?;
    let pickle = stream.pickle(limits)?;
    let Value::Storage(id) = pickle.root else {
        return Err(no_storage("another object"));
    };
    let found = find_storages(&pickle.arena, &stream.keys, window, max_end_byte, limits)?;
    let StorageRef { id, dtype } = found.refs[id as usize];
    let storage = found.storages[id.0 as usize].clone();
    Ok(StorageInside { storage, dtype, end_byte: found.end_byte })
}

/// The pickles that matter.
struct Stream {
    object: Skeleton,
    /// The keys of the storages, in their order.
    keys: Skeleton,
}

impl Stream {
    /// Reads the pickles at the start of the window.
    fn read(window: &mut Window<'_>, limits: &Limits) -> Result<Stream> {
        let start_byte = window.range.start;
        let magic = skim(window, start_byte, SMALL_BYTES)?;
        let pickle = pickle::read_skeleton(&magic, PersistentIds::Storages, limits)?;
        // Compared as it stands, never computed.
        if !matches!(pickle.root, Value::Long(text) if pickle.arena.bytes(text) == MAGIC) {
            let expected = "the magic number of a legacy file of PyTorch";
            return Err(Fault::new(expected, "something else").at(start_byte).corrupt());
        }
        let protocol = skim(window, magic.end_byte, SMALL_BYTES)?;
        match pickle::read_skeleton(&protocol, PersistentIds::Storages, limits)?.root {
            Value::Int(Wide(PROTOCOL)) => {}
            Value::Int(Wide(other)) => {
                let found = format!("version {other}");
                let fault = Fault::new(format!("a legacy file of version {PROTOCOL}"), found);
                return Err(fault.at(magic.end_byte).unsupported());
            }
            _ => {
                let fault = Fault::new("the version of a legacy file", "something else");
                return Err(fault.at(magic.end_byte).corrupt());
            }
        }
        // Facts of the machine that wrote it. Whatever they say, the storages are little-endian.
        let machine = skim(window, protocol.end_byte, SMALL_BYTES)?;
        pickle::read_skeleton(&machine, PersistentIds::Storages, limits)?;
        let object = skim_object(window, machine.end_byte, limits)?;
        let keys = skim_object(window, object.end_byte, limits)?;
        Ok(Stream { object, keys })
    }

    fn pickle(&self, limits: &Limits) -> Result<pickle::Pickle<'_>> {
        pickle::read_skeleton(&self.object, PersistentIds::StoragesAndClasses, limits)
    }
}

/// The storages of a legacy file.
struct Found {
    storages: Vec<Storage>,
    /// By position in the arena's persistent ids.
    refs: Vec<StorageRef>,
    /// Behind the last one.
    end_byte: u64,
}

/// A storage that stands in the file.
struct Root<'a> {
    key: &'a [u8],
    id: StorageId,
    n_elems: u64,
    len_bytes: u64,
    is_found: bool,
}

/// A part of a storage that is one of its own.
struct View {
    id: StorageId,
    root: usize,
    offset_bytes: u64,
    len_bytes: u64,
}

/// The storages that a pickle names, before it is known where they are.
#[derive(Default)]
struct Table<'a> {
    roots: Vec<Root<'a>>,
    by_key: HashMap<&'a [u8], usize>,
    views: Vec<View>,
    by_view_key: HashMap<&'a [u8], usize>,
    storages: Vec<Storage>,
}

/// Finds the storages, which stand in the order of `keys` behind them and end before `held_bytes`.
fn find_storages(
    arena: &Arena<'_>,
    keys: &Skeleton,
    window: &mut Window<'_>,
    held_bytes: u64,
    limits: &Limits,
) -> Result<Found> {
    let mut table = Table::default();
    let claims = arena.persistent.iter().map(|&id| table.claim(storage_claim(arena, id, true)?));
    let refs = claims.collect::<Result<Vec<StorageRef>>>()?;
    if let Some(key) = table.by_view_key.keys().find(|it| table.by_key.contains_key(*it)) {
        let expected = "keys of parts of storages apart from those of storages";
        return Err(Fault::new(expected, format!("{} as both", shown(key))).corrupt());
    }
    let pickle = pickle::read_skeleton(keys, PersistentIds::Storages, limits)?;
    let Some(listed) = pickle.arena.sequence(pickle.root) else {
        return Err(Fault::new("a list of the storages' keys", "something else")
            .at(keys.start_byte())
            .corrupt());
    };
    let mut at_byte = keys.end_byte;
    for &key in listed {
        let key = text(&pickle.arena, key).ok_or_else(|| {
            Fault::new("keys of storages as text", "something else").at(keys.start_byte()).corrupt()
        })?;
        at_byte = table.locate(key, at_byte, window, held_bytes)?;
    }
    if let Some(root) = table.roots.iter().find(|it| !it.is_found) {
        let expected = format!("storage {}, which the pickle names", shown(root.key));
        return Err(Fault::new(expected, "no such storage").at(at_byte).corrupt());
    }
    for View { id, root, offset_bytes, .. } in table.views {
        let root_start = table.storages[table.roots[root].id.0 as usize].start_byte;
        table.storages[id.0 as usize].start_byte = root_start + offset_bytes;
    }
    Ok(Found { storages: table.storages, refs, end_byte: at_byte })
}

impl<'a> Table<'a> {
    /// Notes what a persistent id says.
    fn claim(&mut self, claim: StorageClaim<'a>) -> Result<StorageRef> {
        let (key, dtype, elem_bytes) = (claim.key, claim.dtype, claim.elem_bytes());
        let Some(len_bytes) = claim.n_elems.checked_mul(elem_bytes) else {
            let expected = format!("storage {} of less than 2^64 bytes", shown(key));
            return Err(Fault::new(expected, format!("{} elements of {elem_bytes}", claim.n_elems)).corrupt());
        };
        let root = match self.by_key.get(key) {
            Some(&root) if self.roots[root].len_bytes == len_bytes => root,
            Some(&root) => {
                let expected = format!("storage {} of {} bytes", shown(key), self.roots[root].len_bytes);
                return Err(Fault::new(expected, format!("another time of {len_bytes}")).corrupt());
            }
            None => {
                let id = self.add(len_bytes);
                let n_elems = claim.n_elems;
                self.roots.push(Root { key, id, n_elems, len_bytes, is_found: false });
                self.by_key.insert(key, self.roots.len() - 1);
                self.roots.len() - 1
            }
        };
        let Some(view) = claim.view else {
            return Ok(StorageRef { id: self.roots[root].id, dtype });
        };
        let end_elems = view.offset_elems.checked_add(view.n_elems);
        if end_elems.is_none_or(|it| it > claim.n_elems) {
            let expected = format!("a part of storage {} with {} elements", shown(key), claim.n_elems);
            let found = format!("{} elements from {} on", view.n_elems, view.offset_elems);
            return Err(Fault::new(expected, found).corrupt());
        }
        // Neither overflows, as the whole storage does not.
        let (offset_bytes, len_bytes) = (view.offset_elems * elem_bytes, view.n_elems * elem_bytes);
        let known = self.by_view_key.get(view.key).map(|&it| &self.views[it]);
        if let Some(known) = known {
            if (known.root, known.offset_bytes, known.len_bytes) == (root, offset_bytes, len_bytes) {
                return Ok(StorageRef { id: known.id, dtype });
            }
            let expected = format!("one part of a storage with key {}", shown(view.key));
            return Err(Fault::new(expected, "two that differ").corrupt());
        }
        let id = self.add(len_bytes);
        self.views.push(View { id, root, offset_bytes, len_bytes });
        self.by_view_key.insert(view.key, self.views.len() - 1);
        Ok(StorageRef { id, dtype })
    }

    /// A storage whose place is found later.
    fn add(&mut self, len_bytes: u64) -> StorageId {
        self.storages.push(Storage { file: FileId(0), start_byte: 0, len_bytes, swapped: false });
        StorageId(self.storages.len() as u32 - 1)
    }

    /// Finds the storage with this key at `at_byte`; returns where the next one is.
    fn locate(&mut self, key: &[u8], at_byte: u64, window: &mut Window<'_>, held_bytes: u64) -> Result<u64> {
        let Some(&root) = self.by_key.get(key) else {
            let fault = Fault::new("storages that the pickle names", format!("one with key {}", shown(key)));
            return Err(fault.at(at_byte).corrupt());
        };
        let root = &mut self.roots[root];
        if root.is_found {
            let fault = Fault::new(format!("one storage with key {}", shown(key)), "two of them");
            return Err(fault.at(at_byte).corrupt());
        }
        let too_short = |end_byte: Option<u64>| {
            let end = end_byte.map_or("more than 2^64".to_owned(), |it| it.to_string());
            let expected = format!("{end} bytes, up to the end of storage {}", shown(key));
            Err(Fault::new(expected, format!("{held_bytes} bytes")).at(at_byte).hint(TRUNCATED).corrupt())
        };
        let Some(n_elems) = window.array(at_byte)?.map(i64::from_le_bytes) else {
            return too_short(at_byte.checked_add(8));
        };
        if u64::try_from(n_elems) != Ok(root.n_elems) {
            let expected = format!("storage {} of {} elements, as the pickle says", shown(key), root.n_elems);
            return Err(Fault::new(expected, format!("{n_elems}")).at(at_byte).corrupt());
        }
        let start_byte = at_byte + 8;
        let end_byte = start_byte.checked_add(root.len_bytes);
        match end_byte {
            Some(end_byte) if end_byte <= held_bytes => {
                root.is_found = true;
                self.storages[root.id.0 as usize].start_byte = start_byte;
                Ok(end_byte)
            }
            _ => too_short(end_byte),
        }
    }
}

/// A key for a message.
fn shown(key: &[u8]) -> String {
    let start = &key[..key.len().min(64)];
    format!("`{}`", String::from_utf8_lossy(start).escape_debug())
}

#[cfg(test)]
mod tests;
