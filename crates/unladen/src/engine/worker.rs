//! What one thread does with a piece of a file: reads it, changes it, puts it where it belongs.

use super::{
    Io,
    split::State,
    stream::Piece,
    touch::{Chooser, Touch},
};
use crate::{
    cast::cast,
    error::{Error, Fault, Result},
    io_path::IoPath,
    memory::{HostBuffer, Placing, advise_huge},
    plan::{Change, Gather, PLACED_BYTES, Part, Way},
    source::{ReadAt, lead_bytes, read_staged},
    tensor::{FileId, Side},
};
use std::{sync::Arc, time::Instant};

/// What every worker looks at.
pub(super) struct Common<'r> {
    /// By file.
    pub(super) paths: &'r [IoPath],
    pub(super) chunk_bytes: u64,
    pub(super) chooser: &'r Chooser,
    pub(super) io: Io<'r>,
}

/// What one thread has for itself.
pub(super) struct Worker<'s> {
    staging: Staging<'s>,
    files: Files,
}

impl State for Worker<'_> {
    fn reading(&self) -> Option<(FileId, u64)> {
        self.files.reading
    }
}

/// What one thread reads.
#[derive(Default)]
pub(super) struct Files {
    open: Option<(FileId, Arc<dyn ReadAt>)>,
    /// What it is about, should it panic.
    reading: Option<(FileId, u64)>,
}

impl State for Files {
    fn reading(&self) -> Option<(FileId, u64)> {
        self.reading
    }
}

impl Files {
    /// A file that is to be read from some byte on, kept until another is asked for.
    pub(super) fn open(
        &mut self,
        file: FileId,
        at_byte: u64,
        common: &Common<'_>,
    ) -> Result<Arc<dyn ReadAt>> {
        self.reading = Some((file, at_byte));
        if let Some((open, source)) = &self.open
            && *open == file
        {
            return Ok(Arc::clone(source));
        }
        let source = common.io.files.get(file.0 as usize)?;
        self.open = Some((file, Arc::clone(&source)));
        Ok(source)
    }
}

/// A staging buffer.
pub(super) struct Staging<'s> {
    /// For bytes as the file has them. Starts at a page.
    pub(super) source: &'s mut [u8],
    /// For elements that were cast. Starts at a page.
    pub(super) cast: &'s mut [u8],
}

impl<'s> Worker<'s> {
    /// `source_room`: how much of the buffer is for bytes as the file has them.
    pub(super) fn new(buffer: Option<&'s mut HostBuffer>, source_room: usize) -> Worker<'s> {
        let bytes = buffer.map(HostBuffer::as_mut_slice).unwrap_or_default();
        let (source, cast) = bytes.split_at_mut(source_room.min(bytes.len()));
        Worker { staging: Staging { source, cast }, files: Files::default() }
    }

    /// Brings a piece to its target. `placing`: fresh pages must not be touched.
    pub(super) fn bring(
        &mut self,
        piece: Piece<'_, '_>,
        placing: Option<&Placing>,
        common: &Common<'_>,
    ) -> Result<()> {
        let Piece { file, start_byte, len_bytes, target, way, is_fresh } = piece;
        let placing = placing.filter(|_| is_fresh);
        let source = self.files.open(file, start_byte, common)?;
        let place = Read { file: source, path: common.path(file), start_byte, len_bytes };
        match way {
            Way::Plain if is_fresh => self.fresh(&place, target, placing, common)?,
            Way::Plain => place.file.read_by(place.path, start_byte, target, len_bytes as usize)?,
            Way::Elements(change) => self.staging.elements(&place, change, target, placing)?,
            Way::Parts(parts) => self.staging.parts(&place, parts, target)?,
            Way::Gather(gathers) => return self.staging.gathers(&mut self.files, gathers, target, common),
            Way::Boxes(gather) => {
                return self.staging.gathers(&mut self.files, std::slice::from_ref(gather), target, common);
            }
        }
        common.io.progress.add(len_bytes);
        // Files of a large folder do not stay open until the end of the load.
        place.file.check_unchanged()
    }

    /// Bytes as they are, to fresh pages by whichever way is the faster one now.
    fn fresh(
        &mut self,
        read: &Read,
        target: &mut [u8],
        placing: Option<&Placing>,
        common: &Common<'_>,
    ) -> Result<()> {
        let in_place = |target: &mut [u8]| {
            read.file.read_by(read.path, read.start_byte, target, read.len_bytes as usize)
        };
        let (began, way) = (Instant::now(), common.chooser.next());
        match (way, placing) {
            (Touch::Small, Some(placing)) => self.staging.plain(read, target, placing, common)?,
            (Touch::Small, None) => in_place(target)?,
            (Touch::Huge, placing) => {
                let left = placing.map_or(Ok(()), |it| it.leave(target));
                left.map_err(|error| Error::io(read.file.path(), "take fresh memory", error))?;
                advise_huge(target);
                in_place(target)?;
            }
        }
        common.chooser.learn(way, read.len_bytes, began.elapsed());
        Ok(())
    }
}

impl Common<'_> {
    pub(super) fn path(&self, file: FileId) -> IoPath {
        self.paths.get(file.0 as usize).copied().unwrap_or_default()
    }
}

/// Bytes of a file, and how to read them.
pub(super) struct Read {
    pub(super) file: Arc<dyn ReadAt>,
    pub(super) path: IoPath,
    pub(super) start_byte: u64,
    pub(super) len_bytes: u64,
}

impl Read {
    /// Bytes of a staging buffer before those that were asked for.
    pub(super) fn lead_bytes(&self) -> u64 {
        lead_bytes(self.path, self.start_byte)
    }
}

impl Staging<'_> {
    /// Bytes as they are, to pages that nobody has touched.
    fn plain(
        &mut self,
        read: &Read,
        target: &mut [u8],
        placing: &Placing,
        common: &Common<'_>,
    ) -> Result<()> {
        let mut left_bytes = read.len_bytes as usize;
        let mut start_byte = read.start_byte;
        // The size of a processor's cache: what was read is still in it when it is put in place. A small budget has smaller
        // buffers.
        for target in target.chunks_mut(PLACED_BYTES.min(common.chunk_bytes) as usize) {
            common.io.progress.check(common.io.path)?;
            let len_bytes = left_bytes.min(target.len());
            let source = self.source.get_mut(..target.len()).ok_or_else(too_small)?;
            read.file.read_by(read.path, start_byte, source, len_bytes)?;
            source[len_bytes..].fill(0);
            place(placing, target, source, read)?;
            left_bytes -= len_bytes;
            start_byte += len_bytes as u64;
        }
        Ok(())
    }

    /// Whole elements of one tensor.
    fn elements(
        &mut self,
        read: &Read,
        change: &Change,
        target: &mut [u8],
        placing: Option<&Placing>,
    ) -> Result<()> {
        let source = fill(self.source, read)?;
        change.resolve.apply(change.from, source);
        let len_bytes = change.target_bytes(read.len_bytes) as usize;
        let Some(placing) = placing else {
            let (target, _) = target.split_at_mut_checked(len_bytes).ok_or_else(too_small)?;
            convert(change, source, target);
            return Ok(());
        };
        let room_bytes = target.len();
        let placed = if change.from == change.to {
            // What is placed starts a page, and staging has pages to spare.
            let lead_bytes = read.lead_bytes() as usize;
            self.source.copy_within(lead_bytes..lead_bytes + len_bytes, 0);
            self.source.get_mut(..room_bytes)
        } else {
            let cast = self.cast.get_mut(..room_bytes).ok_or_else(too_small)?;
            convert(change, source, &mut cast[..len_bytes]);
            Some(cast)
        };
        let placed = placed.ok_or_else(too_small)?;
        placed[len_bytes..].fill(0);
        place(placing, target, placed, read)
    }

    /// Several small tensors.
    pub(super) fn parts(&mut self, read: &Read, parts: &[Part], target: &mut [u8]) -> Result<()> {
        let bytes = fill(self.source, read)?;
        for part in parts {
            let source = bytes.get_mut(part.source_byte as usize..).ok_or_else(too_small)?;
            let source = source.get_mut(..part.len_bytes as usize).ok_or_else(too_small)?;
            let len_bytes = part.change.target_bytes(u64::from(part.len_bytes)) as usize;
            let target = target.get_mut(part.target_byte as usize..).ok_or_else(too_small)?;
            let target = target.get_mut(..len_bytes).ok_or_else(too_small)?;
            part.change.resolve.apply(part.change.from, source);
            convert(&part.change, source, target);
        }
        Ok(())
    }

    /// Boxes of elements from one file or several, brought into order.
    pub(super) fn gathers(
        &mut self,
        files: &mut Files,
        gathers: &[Gather],
        target: &mut [u8],
        common: &Common<'_>,
    ) -> Result<()> {
        for gather in gathers {
            let file = files.open(gather.file, gather.start_byte, common)?;
            self.gather(&file, gather, target, common)?;
            file.check_unchanged()?;
        }
        Ok(())
    }

    fn gather(
        &mut self,
        file: &Arc<dyn ReadAt>,
        gather: &Gather,
        target: &mut [u8],
        common: &Common<'_>,
    ) -> Result<()> {
        let Gather { block, change, .. } = gather;
        let path = common.path(gather.file);
        let chunk_bytes = change.target_bytes(common.chunk_bytes);
        let limit_bytes = match file.is_in_order() {
            true => chunk_bytes,
            false => block.read_limit(chunk_bytes, path.is_past_cache()),
        };
        for mut part in block.clone().split(Side::Source, limit_bytes) {
            common.io.progress.check(common.io.path)?;
            let read = Read {
                file: Arc::clone(file),
                path,
                start_byte: gather.start_byte + change.source_bytes(part.source_byte),
                len_bytes: change.source_bytes(part.span_bytes(Side::Source)),
            };
            let source = fill(self.source, &read)?;
            change.resolve.apply(change.from, source);
            part.source_byte = 0;
            if change.from == change.to {
                part.gather(source, target);
            } else {
                let len_bytes = change.target_bytes(read.len_bytes) as usize;
                let cast = self.cast.get_mut(..len_bytes).ok_or_else(too_small)?;
                convert(change, source, cast);
                part.gather(cast, target);
            }
            common.io.progress.add(change.source_bytes(part.len_bytes()));
        }
        Ok(())
    }
}

/// Reads into a staging buffer; returns the bytes that were asked for.
pub(super) fn fill<'b>(buffer: &'b mut [u8], read: &Read) -> Result<&'b mut [u8]> {
    read_staged(&*read.file, read.path, read.start_byte, read.len_bytes, buffer)
}

/// Casts, or copies what is not cast.
pub(super) fn convert(change: &Change, source: &[u8], target: &mut [u8]) {
    match change.from == change.to {
        true => target.copy_from_slice(source),
        false => cast(change.from, change.to, source, target),
    }
}

fn place(placing: &Placing, target: &mut [u8], source: &[u8], read: &Read) -> Result<()> {
    let placed = placing.place(target, source);
    placed
        .map_err(|error| Error::io_at(read.file.path(), "put in place what was read", read.start_byte, error))
}

/// A plan that contradicts itself.
pub(super) fn too_small() -> Error {
    Fault::new("a plan whose staging and targets hold what it reads", "less").mismatch()
}
