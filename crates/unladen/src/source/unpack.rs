//! A record that is packed in a file, read as if it were a file of its own: unpacked from beginning to end by a cursor,
//! which goes on where it stopped and begins again for what lies behind it. Knows no archive.

use super::{FileSource, ReadAt, decode::Decoder, lead_bytes, memory::ends_early, read_staged, too_short};
use crate::{
    error::{Error, Fault, Result},
    io_path::IoPath,
    memory::{HostBuffer, PACKED_CHUNK_BYTES, Reservation, staging_bytes},
    stamp::{FileStamp, Packed},
};
use crc32fast::Hasher;
use std::{
    fmt,
    io::ErrorKind,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

/// Bytes that nobody asked for are unpacked so many at a time, on the stack.
const SKIP_BYTES: usize = 8 << 10;

/// So many bytes are unpacked, then hashed: the processor's cache holds them.
const PIECE_BYTES: usize = 128 << 10;

/// A packed record of an open file. Takes memory while it is being read, from its beginning to its end.
#[derive(Debug)]
pub struct UnpackSource {
    file: Arc<FileSource>,
    stamp: FileStamp,
    packed: Packed,
    /// Whoever reads takes it out, so that an error or a panic leaves none.
    cursor: Mutex<Option<Cursor>>,
}

impl UnpackSource {
    /// A record that stands in `file`.
    ///
    /// Fails with [`Error::Mismatch`] if the stamp is not of a record of that file.
    pub fn new(file: Arc<FileSource>, stamp: FileStamp) -> Result<UnpackSource> {
        match &stamp.packed {
            Some(packed) if stamp.is_packed_in(file.stamp()) => {
                let packed = packed.clone();
                Ok(UnpackSource { file, stamp, packed, cursor: Mutex::new(None) })
            }
            _ => Err(stray(&stamp)),
        }
    }

    fn unpack(&self, path: IoPath, start_byte: u64, target: &mut [u8]) -> Result<()> {
        let len_bytes = self.stamp.len_bytes;
        let end_byte = start_byte.saturating_add(target.len() as u64);
        if end_byte > len_bytes {
            return Err(ends_early(end_byte, len_bytes).in_file(self.path()));
        }
        if target.is_empty() {
            return Ok(());
        }
        // What comes into the page cache stays there, or does not, as it does for whole files; what is there is taken.
        let path = if path == IoPath::Buffered { path } else { IoPath::Mixed };
        let record = Record { source: &*self.file, path, packed: &self.packed, len_bytes };
        let mut place = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cursor = match place.take().filter(|it| it.at_byte <= start_byte) {
            Some(cursor) => cursor,
            None => Cursor::new(&record)?,
        };
        let result = cursor.skip_to(&record, start_byte).and_then(|()| cursor.read(&record, target));
        result.map_err(|error| error.in_file(self.path()))?;
        // From its end there is nowhere to go on to.
        *place = Some(cursor).filter(|it| it.at_byte < len_bytes);
        Ok(())
    }
}

impl ReadAt for UnpackSource {
    fn len_bytes(&self) -> u64 {
        self.stamp.len_bytes
    }

    fn path(&self) -> &Path {
        &self.stamp.path
    }

    fn read_exact_at(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        self.unpack(IoPath::Buffered, start_byte, target)
    }

    fn read_by(&self, path: IoPath, start_byte: u64, target: &mut [u8], need_bytes: usize) -> Result<()> {
        let needed = target.get_mut(..need_bytes).ok_or_else(|| too_short(self.path(), start_byte))?;
        self.unpack(path, start_byte, needed)
    }

    fn check_unchanged(&self) -> Result<()> {
        self.file.check_unchanged()
    }

    fn is_in_order(&self) -> bool {
        true
    }
}

/// The error for a stamp that is not of a record of the file that it is said to be in.
pub(super) fn stray(stamp: &FileStamp) -> Error {
    let found =
        stamp.packed.as_ref().map_or("no record".to_owned(), |it| format!("`{}`", it.name.escape_debug()));
    Fault::new("a record that is packed in this file", found).mismatch().in_file(&stamp.path)
}

/// A whole record that is packed in `source`, in a buffer of its own: for headers. `len_bytes` is what it shall unpack to,
/// which the caller has checked against a limit.
///
/// Fails with [`Error::Corrupt`] if it unpacks to anything else.
pub fn unpacked(source: &dyn ReadAt, packed: &Packed, len_bytes: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let is_there = usize::try_from(len_bytes).is_ok_and(|it| bytes.try_reserve_exact(it).is_ok());
    if !is_there {
        return Err(Error::io(source.path(), "unpack a record", ErrorKind::OutOfMemory.into()));
    }
    bytes.resize(len_bytes as usize, 0);
    let record = Record { source, path: IoPath::Buffered, packed, len_bytes };
    Cursor::new(&record)?.read(&record, &mut bytes)?;
    Ok(bytes)
}

/// The first bytes of a record that is packed in `source`: so many, or all that there are. Where it ends, and whether as it
/// should, is not looked at.
///
/// Fails with [`Error::Corrupt`] if they cannot be unpacked.
pub fn unpacked_head(source: &dyn ReadAt, packed: &Packed, max_bytes: u64) -> Result<Vec<u8>> {
    let max_bytes = max_bytes.min(packed.encoding.max_unpacked_bytes(packed.len_bytes));
    let record = Record { source, path: IoPath::Buffered, packed, len_bytes: max_bytes };
    let mut cursor = Cursor::new(&record)?;
    let mut bytes = vec![0; max_bytes as usize];
    let mut done = 0;
    while done < bytes.len() {
        match cursor.next(&record, &mut bytes[done..])? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// What a cursor goes along.
struct Record<'a> {
    source: &'a dyn ReadAt,
    path: IoPath,
    packed: &'a Packed,
    /// Unpacked.
    len_bytes: u64,
}

/// How far a record is unpacked.
struct Cursor {
    decoder: Decoder,
    /// The decoder said that nothing follows.
    is_ended: bool,
    /// Bytes that were unpacked, skipped ones too, and their checksum.
    at_byte: u64,
    crc: Hasher,
    /// Packed bytes that were taken from the file.
    taken_bytes: u64,
    buffer: HostBuffer,
    /// Those in the buffer that are not used up.
    left: Range<usize>,
}

impl fmt::Debug for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cursor(after {} bytes)", self.at_byte)
    }
}

impl Cursor {
    fn new(record: &Record<'_>) -> Result<Cursor> {
        let buffer_bytes = staging_bytes(record.packed.len_bytes.min(PACKED_CHUNK_BYTES));
        Ok(Cursor {
            decoder: Decoder::new(record.packed.encoding),
            is_ended: false,
            at_byte: 0,
            crc: Hasher::new(),
            taken_bytes: 0,
            buffer: HostBuffer::new(Reservation::uncounted(buffer_bytes), record.source.path())?,
            left: 0..0,
        })
    }

    fn skip_to(&mut self, record: &Record<'_>, start_byte: u64) -> Result<()> {
        let mut skipped = [0; SKIP_BYTES];
        while self.at_byte < start_byte {
            let n = (start_byte - self.at_byte).min(SKIP_BYTES as u64) as usize;
            self.read(record, &mut skipped[..n])?;
        }
        Ok(())
    }

    /// Fills the target with what comes next. After the last byte the record must end, and its checksum be right.
    fn read(&mut self, record: &Record<'_>, target: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < target.len() {
            let end = target.len().min(done + PIECE_BYTES);
            let piece = &mut target[done..end];
            let n = self.next(record, piece)?;
            if n == 0 {
                let expected = format!("{} bytes", record.len_bytes);
                return Err(self.corrupt(record, &expected, format!("its end after {}", self.at_byte)));
            }
            if record.packed.crc32.is_some() {
                self.crc.update(&piece[..n]);
            }
            self.at_byte += n as u64;
            done += n;
        }
        if self.at_byte == record.len_bytes { self.finish(record) } else { Ok(()) }
    }

    fn finish(&mut self, record: &Record<'_>) -> Result<()> {
        if self.next(record, &mut [0])? > 0 {
            let expected = format!("{} bytes", record.len_bytes);
            return Err(self.corrupt(record, &expected, "more"));
        }
        let after_bytes = record.packed.len_bytes - self.taken_bytes + self.left.len() as u64;
        if after_bytes > 0 {
            return Err(self.corrupt(
                record,
                "nothing behind its end",
                format!("{after_bytes} packed bytes"),
            ));
        }
        match record.packed.crc32 {
            Some(crc32) if crc32 != self.crc.clone().finalize() => {
                let expected = format!("the checksum {crc32:08x}");
                let found = format!("{:08x}", self.crc.clone().finalize());
                Err(self.corrupt(record, &expected, found))
            }
            _ => Ok(()),
        }
    }

    /// Unpacks at least a byte, but where the record ends.
    fn next(&mut self, record: &Record<'_>, target: &mut [u8]) -> Result<usize> {
        while !self.is_ended {
            if self.left.is_empty() && self.taken_bytes < record.packed.len_bytes {
                self.fill(record)?;
            }
            let is_last = self.taken_bytes == record.packed.len_bytes;
            let packed = &self.buffer.as_slice()[self.left.clone()];
            let step = self.decoder.decode(packed, target, is_last);
            let step = step.map_err(|found| self.corrupt(record, "what can be unpacked", found))?;
            self.left.start += step.n_read;
            self.is_ended = step.is_end;
            if step.n_written > 0 {
                return Ok(step.n_written);
            }
            let is_stuck = if is_last { self.left.is_empty() || step.n_read == 0 } else { step.n_read == 0 };
            if is_stuck && !step.is_end {
                return Err(self.corrupt(record, "an end among its packed bytes", "none"));
            }
        }
        Ok(0)
    }

    /// Takes the next packed bytes, which end where a chunk of the file does.
    fn fill(&mut self, record: &Record<'_>) -> Result<()> {
        let packed = record.packed;
        let at_byte = packed.start_byte.saturating_add(self.taken_bytes);
        let to_boundary = PACKED_CHUNK_BYTES - at_byte % PACKED_CHUNK_BYTES;
        let len_bytes = to_boundary.min(packed.len_bytes - self.taken_bytes);
        read_staged(record.source, record.path, at_byte, len_bytes, self.buffer.as_mut_slice())?;
        let start = lead_bytes(record.path, at_byte) as usize;
        self.left = start..start + len_bytes as usize;
        self.taken_bytes += len_bytes;
        Ok(())
    }

    /// What is wrong with the record, found at the packed byte that comes next.
    fn corrupt(&self, record: &Record<'_>, expected: &str, found: impl Into<String>) -> Error {
        let at_byte = self.taken_bytes - self.left.len() as u64;
        let expected = format!("record `{}` with {expected}", record.packed.name.escape_debug());
        Fault::new(expected, found).at(record.packed.start_byte.saturating_add(at_byte)).corrupt()
    }
}

#[cfg(test)]
mod tests;
