//! The records of a checkpoint's archives, with the files out of which their bytes are read: a packed one is a file of its
//! own, whether a tensor is in it or not.

use crate::{
    checkpoint::Checkpoint,
    error::Result,
    format::{Limits, Record, records_of},
    memory::UNPACKING_BYTES,
    source::{FileSet, ReadAt, UnpackSource},
    stamp::{FileStamp, Packed},
    tensor::FileId,
};
use std::{collections::HashMap, ops::Range, path::Path, sync::Arc};

/// A record and its bytes.
pub(super) struct Place {
    pub(super) record: Record,
    pub(super) file: FileId,
    pub(super) range: Range<u64>,
}

/// The records of all files.
pub(super) struct Archives<'f> {
    files: &'f FileSet,
    pub(super) places: Vec<Place>,
    /// Packed records in which no tensor is, with the positions of their archives. They are numbered behind the files.
    others: Vec<(usize, FileStamp)>,
}

impl<'f> Archives<'f> {
    pub(super) fn read(checkpoint: &Checkpoint, files: &'f FileSet, limits: &Limits) -> Result<Archives<'f>> {
        let packed = |index: &usize| files.stamp(*index).and_then(|it| it.packed.as_ref());
        let start = |index: usize| Some((files.position_of_file(index), packed(&index)?.start_byte));
        let known: HashMap<(usize, u64), usize> =
            (0..files.len()).filter_map(|it| Some((start(it)?, it))).collect();
        let mut archives = Archives { files, places: Vec::new(), others: Vec::new() };
        for (archive, mut record) in records_of(checkpoint, files, limits)? {
            let index = archive.0 as usize;
            let (file, range) = match (record.range.clone(), record.packed.take()) {
                (Some(range), _) => (archive, range),
                (None, Some(packed)) => {
                    let known = known.get(&(index, packed.start_byte)).copied();
                    let file = known.unwrap_or_else(|| archives.add(index, record.len_bytes, packed));
                    (FileId(file as u32), 0..record.len_bytes)
                }
                (None, None) => continue,
            };
            archives.places.push(Place { record, file, range });
        }
        Ok(archives)
    }

    /// The number of a packed record that is no file yet.
    fn add(&mut self, archive: usize, len_bytes: u64, packed: Packed) -> usize {
        let stamp = self.files.stamp(archive).map(|it| it.of_packed(len_bytes, packed));
        self.others.extend(stamp.map(|it| (archive, it)));
        self.files.len() + self.others.len() - 1
    }

    /// Opens a file, or a packed record as one. Whoever reads a record compares its checksum: it is told apart from what
    /// cannot be unpacked.
    pub(super) fn open(&self, file: FileId) -> Result<Arc<dyn ReadAt>> {
        let index = file.0 as usize;
        let (archive, stamp) = match index.checked_sub(self.files.len()) {
            Some(other) => (self.others[other].0, Some(&self.others[other].1)),
            None => (index, self.files.stamp(index)),
        };
        match stamp.and_then(|stamp| Some((stamp, stamp.packed.as_ref()?))) {
            None => self.files.get(index),
            Some((stamp, packed)) => {
                let packed = Packed { crc32: None, ..packed.clone() };
                let stamp = FileStamp { packed: Some(packed), ..stamp.clone() };
                Ok(Arc::new(UnpackSource::new(self.files.file(archive)?, stamp)?))
            }
        }
    }

    /// The file's path, or that of the archive.
    pub(super) fn path(&self, file: FileId) -> &Path {
        let other = (file.0 as usize).checked_sub(self.files.len()).map(|it| &*self.others[it].1.path);
        other.or_else(|| self.files.path(file.0 as usize)).unwrap_or(Path::new(""))
    }

    /// What is held for them, besides what the plan for the checkpoint counts: on so many threads.
    pub(super) fn held_bytes(&self, max_threads: usize) -> u64 {
        let each = |it: &Place| (size_of::<Place>() + it.record.name.capacity() + 16) as u64;
        let stamps = |(_, it): &(usize, FileStamp)| {
            let name_bytes = it.packed.as_ref().map_or(0, |it| it.name.len());
            (size_of_val(it) + it.path.as_os_str().len() + name_bytes + 48) as u64
        };
        let lists: u64 = self.places.iter().map(each).chain(self.others.iter().map(stamps)).sum();
        lists + self.others.len().min(max_threads) as u64 * UNPACKING_BYTES
    }

    /// How many records there are of a kind.
    pub(super) fn count(&self, is_meant: impl Fn(&Record) -> bool) -> u64 {
        self.places.iter().filter(|it| is_meant(&it.record)).count() as u64
    }
}
