//! Reads the headers of a checkpoint of PyTorch 0.1.1 to 0.1.9: a tar archive of four members, read in place.

mod members;

use super::{
    Limits, OpenOptions,
    given::{Given, GivenTensor},
    persistent::{storage_class, text},
    pickle::{self, Arena, Meaning, PersistentIds, Skeleton, Value, Wide, skim, skim_object},
    rebuild::{StorageRef, unsigned},
    whole::{Contents, Parts, prepare},
    window::Window,
};
use crate::{
    checkpoint::Format,
    dtype::DType,
    error::{Error, Fault, Result},
    source::ReadAt,
    stamp::FileStamp,
    tensor::{Dims, FileId, Layout, MAX_DIMS, Storage, StorageId},
};
use foldhash::HashMap;
use members::Members;

/// The most that one of the small pickles between the storages and tensors may take.
const SMALL_BYTES: u64 = 64 << 10;

/// Reads an archive's four members, and passes what they say to `look`.
pub(super) fn with_contents<T>(
    source: &dyn ReadAt,
    stamp: FileStamp,
    options: &OpenOptions,
    look: impl FnOnce(Contents<'_>) -> Result<T>,
) -> Result<T> {
    let limits = &options.limits;
    let members = Members::find(source)?;
    let mut tables = Tables::default();
    tables.read_storages(&mut Table::new(source, &members.storages, "storages", limits))?;
    tables.read_tensors(&mut Table::new(source, &members.tensors, "tensors", limits))?;
    let mut window = Window::new(source, members.pickle.clone());
    let skeleton = skim_object(&mut window, members.pickle.start, limits)?;
    drop(window);
    let mut pickle = pickle::read_skeleton(&skeleton, PersistentIds::Numbers, limits)?;
    let mut warnings = Vec::new();
    prepare(&mut pickle, options, &mut warnings)?;
    let parts = tables.resolve(&pickle.arena)?;
    look(Contents {
        format: Format::Tar,
        files: vec![stamp],
        arena: &pickle.arena,
        root: pickle.root,
        parts,
        constants: None,
        warnings,
    })
}

/// A member that is a row of small pickles and raw numbers.
struct Table<'s> {
    window: Window<'s>,
    at_byte: u64,
    name: &'static str,
    limits: &'s Limits,
}

impl<'s> Table<'s> {
    fn new(
        source: &'s dyn ReadAt,
        range: &std::ops::Range<u64>,
        name: &'static str,
        limits: &'s Limits,
    ) -> Table<'s> {
        Table { window: Window::new(source, range.clone()), at_byte: range.start, name, limits }
    }

    /// The next pickle.
    fn skim(&mut self, max_bytes: u64) -> Result<Skeleton> {
        let skeleton = skim(&mut self.window, self.at_byte, max_bytes)?;
        self.at_byte = skeleton.end_byte;
        Ok(skeleton)
    }

    fn read<'a>(&self, skeleton: &'a Skeleton) -> Result<pickle::Pickle<'a>> {
        pickle::read_skeleton(skeleton, PersistentIds::Storages, self.limits)
    }

    /// The next pickle, a number of entries that may follow.
    fn count(&mut self) -> Result<u64> {
        let at_byte = self.at_byte;
        let skeleton = self.skim(SMALL_BYTES)?;
        let n_entries = unsigned(self.read(&skeleton)?.root)?;
        // Each takes some bytes, so that a number beyond them is a lie.
        if n_entries > self.window.range.end - self.at_byte {
            let expected = format!("as many entries in `{}` as fit", self.name);
            return Err(Fault::new(expected, n_entries.to_string()).at(at_byte).corrupt());
        }
        if n_entries > self.limits.n_tensors as u64 {
            let expected = format!("at most {} entries in `{}`", self.limits.n_tensors, self.name);
            return Err(Fault::new(expected, n_entries.to_string()).at(at_byte).over_limit("n_tensors"));
        }
        Ok(n_entries)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.window.array(self.at_byte)? {
            Some(bytes) => {
                self.at_byte += N as u64;
                Ok(bytes)
            }
            None => Err(self.cut_short(N as u64)),
        }
    }

    fn skip(&mut self, len_bytes: u64) -> Result<()> {
        if len_bytes > self.window.range.end - self.at_byte {
            return Err(self.cut_short(len_bytes));
        }
        self.at_byte += len_bytes;
        Ok(())
    }

    fn number(&mut self) -> Result<i64> {
        Ok(i64::from_le_bytes(self.bytes()?))
    }

    /// Numbers that count something.
    fn counts(&mut self, n_counts: usize) -> Result<Dims> {
        let mut counts = Dims::new();
        for _ in 0..n_counts {
            let at_byte = self.at_byte;
            let number = self.number()?;
            let Ok(count) = u64::try_from(number) else {
                let expected = format!("sizes, strides and offsets in `{}`", self.name);
                return Err(Fault::new(expected, number.to_string()).at(at_byte).corrupt());
            };
            counts.push(count);
        }
        Ok(counts)
    }

    fn cut_short(&self, len_bytes: u64) -> Error {
        let left_bytes = self.window.range.end - self.at_byte;
        let found = format!("{left_bytes} until its end");
        Fault::new(format!("{len_bytes} more bytes in `{}`", self.name), found).at(self.at_byte).corrupt()
    }

    fn malformed(&self, expected: &str, at_byte: u64) -> Error {
        Fault::new(expected, "something else").at(at_byte).corrupt()
    }
}

/// What a number of the archive stands for.
#[derive(Clone, Copy)]
enum Numbered {
    Storage(StorageRef),
    /// Position in [`Tables::tensors`].
    Tensor(usize),
}

#[derive(Default)]
struct Tables {
    storages: Vec<Storage>,
    tensors: Vec<(Layout, Option<StorageId>)>,
    by_number: HashMap<i64, Numbered>,
}

impl Tables {
    /// Reads the member with the storages: their bytes are passed over.
    fn read_storages(&mut self, table: &mut Table<'_>) -> Result<()> {
        for _ in 0..table.count()? {
            let at_byte = table.at_byte;
            let skeleton = table.skim(SMALL_BYTES)?;
            let (number, dtype) = {
                let pickle = table.read(&skeleton)?;
                let Some(&[Value::Int(Wide(number)), _, class]) = pickle.arena.sequence(pickle.root) else {
                    return Err(table.malformed("a storage's number, location and class", at_byte));
                };
                (number, storage_class(&pickle.arena, class)?)
            };
            let elem_bytes = dtype.map_or(1, DType::size_bytes);
            let n_elems = table.number()?;
            let len_bytes = u64::try_from(n_elems).ok().and_then(|it| it.checked_mul(elem_bytes));
            let Some(len_bytes) = len_bytes else {
                let fault = Fault::new("a number of elements", n_elems.to_string());
                return Err(fault.at(table.at_byte - 8).corrupt());
            };
            let start_byte = table.at_byte;
            table.skip(len_bytes)?;
            let id = self.add_storage(start_byte, len_bytes);
            self.insert(number, Numbered::Storage(StorageRef { id, dtype }), at_byte)?;
        }
        let at_byte = table.at_byte;
        let skeleton = table.skim(table.limits.pickle_bytes)?;
        let pickle = table.read(&skeleton)?;
        let Some(views) = pickle.arena.sequence(pickle.root) else {
            return Err(table.malformed("a list of parts of storages", at_byte));
        };
        views.iter().try_for_each(|&view| self.read_view(&pickle.arena, view, at_byte))
    }

    /// Notes a part of a storage that is a storage of its own.
    fn read_view(&mut self, arena: &Arena<'_>, view: Value, at_byte: u64) -> Result<()> {
        let Some(&[Value::Int(Wide(number)), Value::Int(Wide(root)), offset, n_elems]) = arena.sequence(view)
        else {
            let expected = "a part of a storage: its number, the storage's, offset and size";
            return Err(Fault::new(expected, "something else").at(at_byte).corrupt());
        };
        let Some(&Numbered::Storage(StorageRef { id: root, dtype })) = self.by_number.get(&root) else {
            return Err(Fault::new(format!("storage {root}"), "no such storage").at(at_byte).corrupt());
        };
        let Storage { start_byte, len_bytes, .. } = self.storages[root.0 as usize];
        let elem_bytes = dtype.map_or(1, DType::size_bytes);
        let (offset, n_elems) = (unsigned(offset)?, unsigned(n_elems)?);
        let end_elems = offset.checked_add(n_elems);
        if end_elems.is_none_or(|it| it > len_bytes / elem_bytes) {
            let expected = format!("a part of a storage of {} elements", len_bytes / elem_bytes);
            let found = format!("{n_elems} elements from {offset} on");
            return Err(Fault::new(expected, found).at(at_byte).corrupt());
        }
        let id = self.add_storage(start_byte + offset * elem_bytes, n_elems * elem_bytes);
        self.insert(number, Numbered::Storage(StorageRef { id, dtype }), at_byte)
    }

    fn read_tensors(&mut self, table: &mut Table<'_>) -> Result<()> {
        for _ in 0..table.count()? {
            let at_byte = table.at_byte;
            let skeleton = table.skim(SMALL_BYTES)?;
            let (number, storage, meaning) = {
                let pickle = table.read(&skeleton)?;
                let Some(&[Value::Int(Wide(number)), storage, class]) = pickle.arena.sequence(pickle.root)
                else {
                    return Err(table.malformed("a tensor's number, storage and class", at_byte));
                };
                (number, storage, pickle.arena.meaning(class))
            };
            // The number of dimensions took 8 bytes once, and 4 of them count.
            let n_dims = i32::from_le_bytes(table.bytes()?);
            table.bytes::<4>()?;
            let Some(n_dims) = usize::try_from(n_dims).ok().filter(|&it| it <= MAX_DIMS) else {
                let fault = Fault::new(format!("at most {MAX_DIMS} dimensions"), n_dims.to_string());
                return Err(fault.at(at_byte).corrupt());
            };
            let (shape, stride) = (table.counts(n_dims)?, table.counts(n_dims)?);
            let offset = table.counts(1)?[0];
            let (storage, dtype) = self.storage_of_tensor(storage, meaning, at_byte)?;
            let len_bytes = storage.map_or(0, |it| self.storages[it.0 as usize].len_bytes);
            // There were no tensors without dimensions: such a one is empty.
            let layout = match (&shape[..], len_bytes) {
                ([], 0) => Layout::contiguous(dtype, &[0])?,
                _ => Layout::strided(dtype, &shape, &stride, offset)?,
            };
            let end_byte = layout.stored_bytes().end;
            if end_byte > len_bytes {
                let expected = format!("a view of {len_bytes} bytes of storage");
                let found = format!("one that ends at byte {end_byte}");
                return Err(Fault::new(expected, found).at(at_byte).corrupt());
            }
            self.tensors.push((layout, storage));
            self.insert(number, Numbered::Tensor(self.tensors.len() - 1), at_byte)?;
        }
        Ok(())
    }

    /// A tensor's storage, if it has one, and its type.
    fn storage_of_tensor(
        &self,
        storage: Value,
        class: Meaning,
        at_byte: u64,
    ) -> Result<(Option<StorageId>, DType)> {
        let (storage, dtype) = match (storage, class) {
            (Value::None, Meaning::OldTensor(dtype)) => (None, dtype),
            (Value::Int(Wide(number)), _) => match self.by_number.get(&number) {
                Some(&Numbered::Storage(StorageRef { id, dtype: Some(dtype) })) => (Some(id), dtype),
                _ => {
                    let fault = Fault::new(format!("storage {number} of a tensor"), "no such storage");
                    return Err(fault.at(at_byte).corrupt());
                }
            },
            _ => return Err(Fault::new("a tensor's storage", "something else").at(at_byte).corrupt()),
        };
        if !matches!(class, Meaning::OldTensor(it) if it == dtype) {
            let fault = Fault::new(format!("a class of tensors of {dtype}"), "another class");
            return Err(fault.at(at_byte).corrupt());
        }
        Ok((storage, dtype))
    }

    fn add_storage(&mut self, start_byte: u64, len_bytes: u64) -> StorageId {
        self.storages.push(Storage { file: FileId(0), start_byte, len_bytes, swapped: false });
        StorageId(self.storages.len() as u32 - 1)
    }

    fn insert(&mut self, number: i64, what: Numbered, at_byte: u64) -> Result<()> {
        if self.by_number.insert(number, what).is_some() {
            let fault = Fault::new(format!("one storage or tensor with number {number}"), "two of them");
            return Err(fault.at(at_byte).corrupt());
        }
        Ok(())
    }

    /// What the persistent ids of the object's pickle stand for.
    fn resolve(self, arena: &Arena<'_>) -> Result<Parts> {
        let mut given = Given::default();
        let mut refs = Vec::with_capacity(arena.persistent.len());
        for (position, &id) in arena.persistent.iter().enumerate() {
            let number = match id {
                Value::Int(Wide(number)) => Some(number),
                id => text(arena, id).and_then(|it| std::str::from_utf8(it).ok()?.parse().ok()),
            };
            let numbered = number.and_then(|it: i64| self.by_number.get(&it));
            refs.push(match numbered {
                Some(Numbered::Storage(storage)) => *storage,
                Some(&Numbered::Tensor(tensor)) => {
                    let (layout, storage) = self.tensors[tensor].clone();
                    given.tensors.insert(position as u32, GivenTensor { layout, storage });
                    // Not used: what is given comes first.
                    StorageRef { id: StorageId(0), dtype: None }
                }
                None => {
                    let found = number.map_or("something else".to_owned(), |it| it.to_string());
                    return Err(Fault::new("the number of a tensor or storage", found).corrupt());
                }
            });
        }
        Ok(Parts { storages: self.storages, refs, given })
    }
}

#[cfg(test)]
mod tests;
