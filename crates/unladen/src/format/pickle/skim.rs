//! Finds where a pickle in a file ends, and takes it into memory without its long strings: tensors that stand inside a
//! pickle stay in the file until they are loaded. Knows how long opcodes are, and nothing of what they do.

use crate::{
    error::{Error, Fault, Result},
    format::{Limits, window::Window},
};

/// Strings of bytes from this length on stay in the file.
const LONG_BYTES: u64 = 4 << 10;
/// The same for text, which is more often a name or a note than somebody's data.
const LONG_TEXT_BYTES: u64 = 64 << 10;

/// A pickle that was taken out of a file.
#[derive(Debug)]
pub(crate) struct Skeleton {
    pub(super) bytes: Vec<u8>,
    pub(super) holes: Vec<Hole>,
    pub(super) start_byte: u64,
    /// Behind its last opcode, or where it broke off.
    pub(crate) end_byte: u64,
}

/// A string that was left in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hole {
    /// Where it would start in the skeleton.
    pub(super) at: usize,
    /// Where it starts in the file.
    pub(crate) start_byte: u64,
    /// Its length.
    pub(crate) len_bytes: u64,
    /// Lengths of all up to and with this one.
    pub(super) cut_bytes: u64,
    /// Text in UTF-8.
    pub(crate) is_text: bool,
}

/// What comes behind an opcode.
enum Operand {
    /// So many bytes.
    Fixed(usize),
    /// A length of so many bytes, then as many bytes as it says.
    Counted(usize),
    /// So many lines.
    Lines(usize),
    /// No opcode of a pickle.
    Unknown,
}

fn operand(opcode: u8) -> Operand {
    match opcode {
        b'.'
        | b'('
        | b'0'
        | b'1'
        | b'2'
        | b'N'
        | b')'
        | b't'
        | b']'
        | b'l'
        | b'a'
        | b'e'
        | b'}'
        | b'd'
        | b's'
        | b'u'
        | b'R'
        | b'b'
        | b'Q'
        | b'o'
        | 0x81
        | 0x85..=0x89
        | 0x8f..=0x94
        | 0x97
        | 0x98 => Operand::Fixed(0),
        0x80 | b'K' | b'q' | b'h' | 0x82 => Operand::Fixed(1),
        b'M' | 0x83 => Operand::Fixed(2),
        b'J' | b'r' | b'j' | 0x84 => Operand::Fixed(4),
        b'G' | 0x95 => Operand::Fixed(8),
        b'U' | b'C' | 0x8a | 0x8c => Operand::Counted(1),
        b'T' | b'B' | b'X' | 0x8b => Operand::Counted(4),
        0x8d | 0x8e | 0x96 => Operand::Counted(8),
        b'I' | b'L' | b'F' | b'S' | b'V' | b'p' | b'g' | b'P' => Operand::Lines(1),
        b'c' | b'i' => Operand::Lines(2),
        _ => Operand::Unknown,
    }
}

/// As [`skim`], for the pickle that the file is about: it may be as long as the caller allows.
pub(crate) fn skim_object(window: &mut Window<'_>, start_byte: u64, limits: &Limits) -> Result<Skeleton> {
    skim(window, start_byte, limits.pickle_bytes).map_err(|error| match error {
        // Only its length is.
        Error::Unsupported(fault) => fault.over_limit("pickle_bytes"),
        error => error,
    })
}

/// Takes the pickle at `start_byte` into memory.
///
/// What is wrong with it is left to be found when it is read; so is where it ends too early. Fails if it is longer than
/// `max_bytes` without its long strings, or if one of them reaches beyond the window's part of the file.
pub(crate) fn skim(window: &mut Window<'_>, start_byte: u64, max_bytes: u64) -> Result<Skeleton> {
    let mut skeleton = Skeleton { bytes: Vec::new(), holes: Vec::new(), start_byte, end_byte: start_byte };
    let max_bytes = max_bytes.min(u32::MAX.into());
    loop {
        let at_byte = skeleton.end_byte;
        let Some(&opcode) = window.from(at_byte, 9)?.first() else { return Ok(skeleton) };
        match operand(opcode) {
            Operand::Fixed(len) => skeleton.take(window, 1 + len)?,
            Operand::Counted(width) => skeleton.take_counted(window, opcode, width)?,
            Operand::Lines(n_lines) => {
                skeleton.take(window, 1)?;
                (0..n_lines).try_for_each(|_| skeleton.take_line(window, max_bytes))?;
            }
            Operand::Unknown => {
                skeleton.take(window, 1)?;
                return Ok(skeleton);
            }
        }
        if skeleton.bytes.len() as u64 > max_bytes {
            return Err(too_long(max_bytes, start_byte));
        }
        if opcode == b'.' {
            return Ok(skeleton);
        }
    }
}

fn too_long(max_bytes: u64, start_byte: u64) -> Error {
    Fault::new(format!("a pickle of at most {max_bytes} bytes"), "a longer one").at(start_byte).unsupported()
}

impl Skeleton {
    /// Where it starts in the file.
    pub(crate) fn start_byte(&self) -> u64 {
        self.start_byte
    }

    /// Takes the next bytes, as many of them as there are.
    fn take(&mut self, window: &mut Window<'_>, len: usize) -> Result<()> {
        let bytes = window.from(self.end_byte, len)?;
        let bytes = &bytes[..len.min(bytes.len())];
        self.bytes.extend_from_slice(bytes);
        self.end_byte += bytes.len() as u64;
        Ok(())
    }

    fn take_counted(&mut self, window: &mut Window<'_>, opcode: u8, width: usize) -> Result<()> {
        let head = window.from(self.end_byte, 1 + width)?;
        let Some(length) = head.get(1..1 + width) else {
            return self.take(window, 1 + width);
        };
        let mut claimed = [0; 8];
        claimed[..width].copy_from_slice(length);
        let len_bytes = u64::from_le_bytes(claimed);
        self.take(window, 1 + width)?;
        let left_bytes = window.range.end - self.end_byte;
        if len_bytes > left_bytes {
            return Err(Fault::new(
                format!("{len_bytes} more bytes of the pickle"),
                format!("{left_bytes} until the end of what there is"),
            )
            .at(self.end_byte)
            .hint("the file looks truncated; compare its size with the publisher's")
            .corrupt());
        }
        let is_text = matches!(opcode, b'X' | 0x8c | 0x8d);
        let is_number = matches!(opcode, 0x8a | 0x8b);
        let long_bytes = if is_text || is_number { LONG_TEXT_BYTES } else { LONG_BYTES };
        // Whatever is shorter fits into the address space.
        if len_bytes < long_bytes {
            return self.take(window, len_bytes as usize);
        }
        if is_number {
            return Err(too_long(long_bytes, self.end_byte));
        }
        let cut_before = self.holes.last().map_or(0, |it| it.cut_bytes);
        let (at, start_byte) = (self.bytes.len(), self.end_byte);
        self.holes.push(Hole { at, start_byte, len_bytes, cut_bytes: cut_before + len_bytes, is_text });
        self.end_byte += len_bytes;
        Ok(())
    }

    fn take_line(&mut self, window: &mut Window<'_>, max_bytes: u64) -> Result<()> {
        loop {
            let bytes = window.from(self.end_byte, 64)?;
            let end = bytes.iter().position(|&it| it == b'\n');
            let len = end.map_or(bytes.len(), |it| it + 1);
            self.take(window, len)?;
            if end.is_some() || len == 0 {
                return Ok(());
            }
            if self.bytes.len() as u64 > max_bytes {
                return Err(too_long(max_bytes, self.start_byte));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemorySource;

    fn skimmed(bytes: &[u8], start_byte: u64, max_bytes: u64) -> Result<Skeleton> {
        let source = MemorySource::new("x", bytes.to_vec());
        skim(&mut Window::new(&source, 0..u64::MAX), start_byte, max_bytes)
    }

    #[test]
    fn a_pickle_ends_at_its_stop_whatever_follows() {
        for pickle in [
            &b"\x80\x02}(X\x01\0\0\0.U\x01.K.u."[..],
            b"(dp0\nS'.'\nI1\ns.",
            b"\x80\x04\x95\x05\0\0\0\0\0\0\0\x8c\x01.\x94.",
            b"cos.path\njoin.\n.",
        ] {
            let skeleton = skimmed(&[b"??", pickle, b"}.more"].concat(), 2, 100).unwrap();
            assert_eq!((&skeleton.bytes[..], skeleton.end_byte), (pickle, 2 + pickle.len() as u64));
        }
    }

    #[test]
    fn long_strings_stay_in_the_file() {
        let payload = vec![b'.'; 5000];
        let long = [b"B", &5000u32.to_le_bytes()[..], &payload].concat();
        let bytes = [b"\x80\x03]", &long[..], b"aK\x07a", &long, b"a."].concat();
        let skeleton = skimmed(&bytes, 0, 100).unwrap();
        assert_eq!(skeleton.bytes, b"\x80\x03]B\x88\x13\0\0aK\x07aB\x88\x13\0\0a.");
        let starts: Vec<_> = skeleton.holes.iter().map(|it| (it.at, it.start_byte, it.cut_bytes)).collect();
        assert_eq!(starts, [(8, 8, 5000), (17, 5017, 10000)]);
        assert_eq!(skeleton.end_byte, bytes.len() as u64);
    }

    #[test]
    fn claims_beyond_the_file_and_the_limit_are_refused() {
        assert!(matches!(
            skimmed(b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xff", 0, 9),
            Err(Error::Corrupt(_))
        ));
        assert!(matches!(skimmed(&b"(".repeat(10_000), 0, 99), Err(Error::Unsupported(_))));
        assert!(matches!(
            skimmed(&[b"S", &b"x".repeat(10_000)[..]].concat(), 0, 99),
            Err(Error::Unsupported(_))
        ));
        // What broke off is found when it is read.
        assert_eq!(skimmed(b"\x80\x02K", 0, 99).unwrap().bytes, b"\x80\x02K");
        assert_eq!(skimmed(b"S'abc", 0, 99).unwrap().bytes, b"S'abc");
        assert_eq!(skimmed(b"N\xfe...", 0, 99).unwrap().bytes, b"N\xfe");
    }
}
