//! Bytes that a pickle of protocol 0 to 2 holds as text, a character of Latin-1 for each: they become files of their own,
//! which are read out of the text. How long they are is not counted here, as that would mean to read them all.

use super::{Limits, legacy, window::Window};
use crate::{
    dtype::DType,
    error::{Error, Fault, Result},
    source::{MemorySource, ReadAt, unpacked_head},
    stamp::{Encoding, FileStamp, Packed},
    tensor::{FileId, Storage},
};
use foldhash::{HashMap, HashMapExt as _};
use std::ops::{Range, RangeInclusive};

/// What Python calls the encoding.
const NAMES: [&[u8]; 3] = [b"latin1", b"latin-1", b"iso-8859-1"];

/// The headers of a legacy file with one storage take some hundred bytes.
const HEAD_BYTES: u64 = 64 << 10;

/// True if this is what Python calls the encoding.
pub(super) fn is_name(encoding: &[u8]) -> bool {
    NAMES.iter().any(|it| it.eq_ignore_ascii_case(encoding))
}

/// Bytes as text.
pub(super) struct Letters {
    /// Where the text stands in the file, in UTF-8.
    range: Range<u64>,
    /// How many bytes it can stand for: a character takes one or two.
    lens_bytes: RangeInclusive<u64>,
}

impl Letters {
    /// Of text that is at hand.
    pub(super) fn held(range: Range<u64>, text: &[u8]) -> Letters {
        let n_letters = text.iter().filter(|it| !matches!(it, 0x80..=0xbf)).count() as u64;
        Letters { range, lens_bytes: n_letters..=n_letters }
    }

    /// Of text that was left in the file.
    pub(super) fn in_file(range: Range<u64>) -> Letters {
        let text_bytes = range.end - range.start;
        Letters { range, lens_bytes: text_bytes.div_ceil(2)..=text_bytes }
    }

    /// Where the text starts, which is like no other text.
    pub(super) fn start_byte(&self) -> u64 {
        self.range.start
    }

    fn packed(&self, file_len_bytes: u64) -> Packed {
        Packed {
            name: format!("text at byte {}", self.range.start).into(),
            encoding: Encoding::Latin1,
            start_byte: self.range.start,
            len_bytes: self.range.end - self.range.start,
            file_len_bytes,
            crc32: None,
        }
    }
}

/// The files that such text makes, behind the one in which it stands.
pub(super) struct TextFiles<'f> {
    files: &'f mut Vec<FileStamp>,
    /// By where the text starts: however often a pickle refers to it, it is one file.
    known: HashMap<u64, FileId>,
}

impl<'f> TextFiles<'f> {
    /// `files` starts with the file in which the text stands.
    pub(super) fn new(files: &'f mut Vec<FileStamp>) -> TextFiles<'f> {
        TextFiles { files, known: HashMap::new() }
    }

    /// The file of all the bytes of some text. What it stands for is only known when it is read, and compared then.
    ///
    /// Fails if it cannot be so many bytes.
    pub(super) fn file(&mut self, letters: &Letters, len_bytes: u64) -> Result<FileId> {
        let known = self.known.get(&letters.range.start).copied();
        let lens_bytes = match known {
            Some(file) => self.files[file.0 as usize].len_bytes..=self.files[file.0 as usize].len_bytes,
            None => letters.lens_bytes.clone(),
        };
        if !lens_bytes.contains(&len_bytes) {
            let (least, most) = lens_bytes.into_inner();
            let found = if least == most { format!("{most}") } else { format!("{least} to {most}") };
            return Err(Fault::new(format!("text for {len_bytes} bytes"), found)
                .at(letters.range.start)
                .corrupt());
        }
        if let Some(file) = known {
            return Ok(file);
        }
        let file = FileId(self.files.len() as u32);
        let stamp = self.files[0].of_packed(len_bytes, letters.packed(self.files[0].len_bytes));
        self.files.push(stamp);
        self.known.insert(letters.range.start, file);
        Ok(file)
    }

    /// As [`legacy::storage_inside`], for a legacy file that stands there as text.
    pub(super) fn storage(
        &mut self,
        source: &dyn ReadAt,
        letters: &Letters,
        limits: &Limits,
    ) -> Result<(Storage, Option<DType>)> {
        let head = unpacked_head(source, &letters.packed(source.len_bytes()), HEAD_BYTES)?;
        let head = MemorySource::new(source.path(), head);
        let mut window = Window::new(&head, 0..u64::MAX);
        let inside = legacy::storage_inside(&mut window, *letters.lens_bytes.end(), limits);
        let inside = inside.map_err(|error| in_text(error, letters.range.start))?;
        let file = self.file(letters, inside.end_byte)?;
        Ok((Storage { file, ..inside.storage }, inside.dtype))
    }
}

/// The error of a file that stands in text: its places are not those of the file around it.
fn in_text(mut error: Error, start_byte: u64) -> Error {
    if let Error::Corrupt(fault) | Error::Unsupported(fault) | Error::Mismatch(fault) = &mut error {
        fault.offset_bytes = Some(start_byte);
    }
    error
}
