//! Reads files to where their bytes belong, several pieces at a time: in place where they can land there, else by way of
//! a staging buffer that each thread has for itself.

use super::{
    Io, Slots, missing,
    split::{Rest, for_each},
    touch::Chooser,
    worker::{Common, Worker},
};
use crate::{
    destination::Arena,
    error::Result,
    io_path::IoPath,
    memory::{HostBuffer, PAGE_BYTES, Placing, staging_bytes},
    plan::{Fresh, PLACED_BYTES, Read, SlotId, Way},
    tensor::FileId,
};

/// What one read brings in place. Several are in flight, so it is no measure of memory.
const READ_BYTES: u64 = 8 << 20;

/// What a thread brings into fresh pages before it looks for more, and for a cancel: two huge pages.
const FRESH_PIECE_BYTES: u64 = 4 << 20;

/// Elements are cut in multiples of so many, whose bytes are whole pages whatever their size.
const CUT_ELEMS: u64 = PAGE_BYTES;

/// A `Step::Stream`.
pub(super) struct Stream<'p> {
    pub(super) staging: &'p [SlotId],
    pub(super) chunk_bytes: u64,
    pub(super) fresh: Option<Fresh>,
    pub(super) reads: &'p [Read],
    /// By file.
    pub(super) paths: &'p [IoPath],
    pub(super) n_threads: usize,
}

impl Stream<'_> {
    pub(super) fn run(&self, slots: &mut Slots<'_>, io: Io<'_>) -> Result<()> {
        // Staging buffers leave their slots while they are in use, so that the targets can be split.
        let mut ring = Vec::with_capacity(self.staging.len());
        for &slot in self.staging {
            match slots[slot.0 as usize].take().ok_or_else(|| missing(slot))? {
                Arena::Owned(buffer) => ring.push(buffer),
                _ => return Err(missing(slot)),
            }
        }
        let result = self.run_with(&mut ring, slots, io);
        for (&slot, buffer) in self.staging.iter().zip(ring) {
            slots[slot.0 as usize] = Some(Arena::Owned(buffer));
        }
        result
    }

    fn run_with(&self, ring: &mut [HostBuffer], slots: &mut Slots<'_>, io: Io<'_>) -> Result<()> {
        let placing = self.fresh.filter(|it| it.is_placed && !ring.is_empty()).and_then(|it| {
            let Some(Arena::Owned(buffer)) = slots[it.slot.0 as usize].as_mut() else { return None };
            let len_bytes = buffer.as_slice().len() as u64;
            Placing::over(buffer, len_bytes)
        });
        let n_workers = if ring.is_empty() { self.n_threads.max(1) } else { ring.len() };
        let mut buffers = ring.iter_mut();
        let source_room = staging_bytes(self.chunk_bytes) as usize;
        let workers = (0..n_workers).map(|_| Worker::new(buffers.next(), source_room)).collect();
        let cutter = Cutter { stream: self, rest: Rest::of(slots), reads: self.reads.iter(), current: None };
        let chooser = Chooser::default();
        let common = Common { paths: self.paths, chunk_bytes: self.chunk_bytes, chooser: &chooser, io };
        for_each(cutter, workers, io, |worker, piece| worker.bring(piece, placing.as_ref(), &common))
    }
}

/// What a thread takes at a time.
pub(super) struct Piece<'s, 'p> {
    pub(super) file: FileId,
    /// Of the file.
    pub(super) start_byte: u64,
    pub(super) len_bytes: u64,
    pub(super) target: &'s mut [u8],
    pub(super) way: &'p Way,
    /// Nobody has touched the target's pages.
    pub(super) is_fresh: bool,
}

/// Cuts reads into pieces while they are taken.
struct Cutter<'s, 'p> {
    stream: &'p Stream<'p>,
    rest: Rest<'s>,
    reads: std::slice::Iter<'p, Read>,
    /// A read that is not taken to its end: bytes of the file that are, and what is left of its target.
    current: Option<(&'p Read, u64, &'s mut [u8])>,
}

impl<'s, 'p> Iterator for Cutter<'s, 'p> {
    type Item = Result<Piece<'s, 'p>>;

    fn next(&mut self) -> Option<Self::Item> {
        let (read, done_bytes, target) = match self.current.take() {
            Some(current) => current,
            None => {
                let read = self.reads.next()?;
                match self.rest.cut(read.target) {
                    Ok(target) => (read, 0, target),
                    Err(error) => return Some(Err(error)),
                }
            }
        };
        let left_bytes = read.len_bytes - done_bytes;
        let start_byte = read.start_byte + done_bytes;
        let is_fresh = self.stream.fresh.is_some_and(|it| it.slot == read.target.slot);
        let is_cached = self.stream.path(read.file).is_mostly_cached();
        let (len_bytes, target_bytes) = match &read.way {
            Way::Plain => {
                // Fresh pages are cut where huge ones begin, the others where the file's blocks do.
                let at = if is_fresh { target.as_ptr().addr() as u64 } else { start_byte };
                let piece_bytes = if is_fresh && is_cached { FRESH_PIECE_BYTES } else { READ_BYTES };
                let to_boundary = (at + 1).next_multiple_of(piece_bytes) - at;
                (to_boundary, to_boundary)
            }
            Way::Elements(change) => {
                let chunk_bytes =
                    self.stream.chunk_bytes.min(if is_cached { PLACED_BYTES } else { u64::MAX });
                let n_elems = (chunk_bytes / change.from.size_bytes()).max(1);
                let n_elems = if n_elems > CUT_ELEMS { n_elems / CUT_ELEMS * CUT_ELEMS } else { n_elems };
                (n_elems * change.from.size_bytes(), n_elems * change.to.size_bytes())
            }
            Way::Parts(_) | Way::Gather(_) => (left_bytes, target.len() as u64),
        };
        let (mine, len_bytes) = if len_bytes >= left_bytes {
            // Whatever room there is behind the last bytes is theirs.
            (target, left_bytes)
        } else {
            let Some((mine, rest)) = target.split_at_mut_checked(target_bytes as usize) else {
                return Some(Err(missing(read.target.slot)));
            };
            self.current = Some((read, done_bytes + len_bytes, rest));
            (mine, len_bytes)
        };
        Some(Ok(Piece { file: read.file, start_byte, len_bytes, target: mine, way: &read.way, is_fresh }))
    }
}

impl Stream<'_> {
    fn path(&self, file: FileId) -> IoPath {
        self.paths.get(file.0 as usize).copied().unwrap_or_default()
    }
}
