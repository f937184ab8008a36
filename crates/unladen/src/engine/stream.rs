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
use smallvec::SmallVec;

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
        for_each(cutter, workers, io, |worker, job| match job {
            Job::Piece(piece) => worker.bring(piece, placing.as_ref(), &common),
            Job::InOrder(cuts) => cuts.into_iter().try_for_each(|cut| {
                let mut left = Some(cut);
                while let Some(cut) = left.take() {
                    io.progress.check(io.path)?;
                    let (piece, rest) = self.cut(cut)?;
                    worker.bring(piece, placing.as_ref(), &common)?;
                    left = rest;
                }
                Ok(())
            }),
        })
    }
}

/// What a thread takes at a time.
enum Job<'s, 'p> {
    Piece(Piece<'s, 'p>),
    /// Reads of a packed record, of which nothing can be had but one piece after the other.
    InOrder(SmallVec<[Cut<'s, 'p>; 1]>),
}

/// What a thread brings at a time.
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
    /// A read that is not taken to its end.
    current: Option<Cut<'s, 'p>>,
}

/// A read of which the first bytes are taken: how many, and what is left of its target.
struct Cut<'s, 'p> {
    read: &'p Read,
    done_bytes: u64,
    target: &'s mut [u8],
}

impl<'s, 'p> Iterator for Cutter<'s, 'p> {
    type Item = Result<Job<'s, 'p>>;

    fn next(&mut self) -> Option<Self::Item> {
        let cut = match self.current.take() {
            Some(cut) => cut,
            None => match self.begin()? {
                Ok(cut) => cut,
                Err(error) => return Some(Err(error)),
            },
        };
        if cut.read.is_in_order {
            return Some(self.in_order(cut));
        }
        let piece = self.stream.cut(cut).map(|(piece, rest)| {
            self.current = rest;
            Job::Piece(piece)
        });
        Some(piece)
    }
}

impl<'s, 'p> Cutter<'s, 'p> {
    /// The next read.
    fn begin(&mut self) -> Option<Result<Cut<'s, 'p>>> {
        let read = self.reads.next()?;
        Some(self.rest.cut(read.target).map(|target| Cut { read, done_bytes: 0, target }))
    }

    /// A read with all that go with it.
    fn in_order(&mut self, first: Cut<'s, 'p>) -> Result<Job<'s, 'p>> {
        let read = first.read;
        let mut cuts = SmallVec::from_buf([first]);
        while self.reads.as_slice().first().is_some_and(|next| read.goes_with(next)) {
            cuts.extend(self.begin().transpose()?);
        }
        Ok(Job::InOrder(cuts))
    }
}

impl<'p> Stream<'p> {
    /// The next piece of a read, and what is left of it.
    fn cut<'s>(&self, cut: Cut<'s, 'p>) -> Result<(Piece<'s, 'p>, Option<Cut<'s, 'p>>)> {
        let Cut { read, done_bytes, target } = cut;
        let left_bytes = read.len_bytes - done_bytes;
        let start_byte = read.start_byte + done_bytes;
        let is_fresh = self.fresh.is_some_and(|it| it.slot == read.target.slot);
        let is_cached = self.path(read.file).is_mostly_cached();
        let (len_bytes, target_bytes) = match &read.way {
            Way::Plain => {
                // Fresh pages are cut where huge ones begin, the others where the file's blocks do.
                let at = if is_fresh { target.as_ptr().addr() as u64 } else { start_byte };
                let piece_bytes = if is_fresh && is_cached { FRESH_PIECE_BYTES } else { READ_BYTES };
                let to_boundary = (at + 1).next_multiple_of(piece_bytes) - at;
                (to_boundary, to_boundary)
            }
            Way::Elements(change) => {
                let chunk_bytes = self.chunk_bytes.min(if is_cached { PLACED_BYTES } else { u64::MAX });
                let n_elems = (chunk_bytes / change.from.size_bytes()).max(1);
                let n_elems = if n_elems > CUT_ELEMS { n_elems / CUT_ELEMS * CUT_ELEMS } else { n_elems };
                (n_elems * change.from.size_bytes(), n_elems * change.to.size_bytes())
            }
            Way::Parts(_) | Way::Gather(_) | Way::Boxes(_) => (left_bytes, target.len() as u64),
        };
        let (mine, len_bytes, rest) = if len_bytes >= left_bytes {
            // Whatever room there is behind the last bytes is theirs.
            (target, left_bytes, None)
        } else {
            let split = target.split_at_mut_checked(target_bytes as usize);
            let (mine, rest) = split.ok_or_else(|| missing(read.target.slot))?;
            (mine, len_bytes, Some(Cut { read, done_bytes: done_bytes + len_bytes, target: rest }))
        };
        let piece = Piece { file: read.file, start_byte, len_bytes, target: mine, way: &read.way, is_fresh };
        Ok((piece, rest))
    }

    fn path(&self, file: FileId) -> IoPath {
        self.paths.get(file.0 as usize).copied().unwrap_or_default()
    }
}
