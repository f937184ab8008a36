//! The members of a tar archive that PyTorch wrote: four regular files, each once, and nothing else.

use crate::{
    error::{Error, Fault, Result},
    source::ReadAt,
};
use std::ops::Range;

const BLOCK_BYTES: u64 = 512;
/// More headers than four members have, extensions counted.
const MAX_HEADERS: usize = 64;
/// The most that an extension of a header may take.
const MAX_EXTENSION_BYTES: u64 = 64 << 10;
const NAMES: [&str; 4] = ["sys_info", "pickle", "tensors", "storages"];

/// Where the members are in the file.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) pickle: Range<u64>,
    pub(super) tensors: Range<u64>,
    pub(super) storages: Range<u64>,
}

/// What an extended header says in place of the next one.
#[derive(Default)]
struct Extended {
    name: Option<Vec<u8>>,
    size_bytes: Option<u64>,
}

impl Members {
    /// Reads the headers.
    ///
    /// Fails with `Unsupported` for the archive of something else, with `Corrupt` for one that is damaged, or that has a
    /// member twice or as a link.
    pub(super) fn find(source: &dyn ReadAt) -> Result<Members> {
        let mut found: [Option<Range<u64>>; 4] = [const { None }; 4];
        let mut extended = Extended::default();
        let mut at_byte = 0;
        for _ in 0..MAX_HEADERS {
            let Some(header) = header_at(source, at_byte)? else { return all_of(found) };
            let size_bytes =
                number(&header[124..136]).filter(|_| has_right_sum(&header)).ok_or_else(|| {
                    Fault::new("a header of the tar archive", "one whose checksum is wrong")
                        .at(at_byte)
                        .corrupt()
                })?;
            let kind = header[156];
            let is_extension = matches!(kind, b'x' | b'g' | b'L' | b'K');
            let size_bytes = extended.size_bytes.filter(|_| !is_extension).unwrap_or(size_bytes);
            let start_byte = at_byte + BLOCK_BYTES;
            let end_byte = start_byte.checked_add(size_bytes).filter(|&it| it <= source.len_bytes());
            let Some(end_byte) = end_byte else {
                let expected = format!("{size_bytes} bytes of a member of the tar archive");
                let found =
                    format!("{} until the end of the file", source.len_bytes().saturating_sub(start_byte));
                let hint = "the file looks truncated; compare its size with the publisher's";
                return Err(Fault::new(expected, found).at(start_byte).hint(hint).corrupt());
            };
            if is_extension {
                extended.read(source, kind, start_byte..end_byte)?;
            } else {
                let name = extended.name.take().unwrap_or_else(|| name_of(&header));
                extended = Extended::default();
                let Some(place) = NAMES.iter().position(|it| it.as_bytes() == name) else {
                    return Err(something_else(&name));
                };
                let name = NAMES[place];
                if !matches!(kind, b'0' | 0 | b'7') {
                    let expected = format!("member `{name}` of the tar archive as a regular file");
                    return Err(Fault::new(expected, "a link, a folder or a device").at(at_byte).corrupt());
                }
                if found[place].replace(start_byte..end_byte).is_some() {
                    let expected = format!("one member `{name}` in the tar archive");
                    let hint = "readers differ in which of the two they take; do not trust this file";
                    return Err(Fault::new(expected, "two of them").at(at_byte).hint(hint).corrupt());
                }
            }
            // The file's length bounds it.
            at_byte = end_byte.next_multiple_of(BLOCK_BYTES);
        }
        Err(something_else(b"more than 60 others"))
    }
}

/// The header at a place; `None` at the end of the archive, which two blocks of zeros or the end of the file mark.
fn header_at(source: &dyn ReadAt, at_byte: u64) -> Result<Option<[u8; 512]>> {
    let left_bytes = source.len_bytes().saturating_sub(at_byte);
    if left_bytes == 0 {
        return Ok(None);
    }
    if left_bytes < BLOCK_BYTES {
        let fault = Fault::new("a header of the tar archive, 512 bytes", format!("{left_bytes} bytes"));
        return Err(fault.at(at_byte).corrupt());
    }
    let mut header = [0; 512];
    source.read_exact_at(at_byte, &mut header)?;
    Ok(header.iter().any(|&it| it != 0).then_some(header))
}

fn all_of(found: [Option<Range<u64>>; 4]) -> Result<Members> {
    match found {
        [Some(_), Some(pickle), Some(tensors), Some(storages)] => Ok(Members { pickle, tensors, storages }),
        [None, None, None, None] => Err(something_else(b"no member")),
        found => {
            let missing = NAMES.iter().zip(&found).find(|(_, it)| it.is_none()).map_or("", |(name, _)| name);
            let expected = format!("member `{missing}` in a checkpoint of PyTorch 0.1.1 to 0.1.9");
            Err(Fault::new(expected, "no such member of the tar archive").corrupt())
        }
    }
}

fn something_else(name: &[u8]) -> Error {
    let shown = String::from_utf8_lossy(&name[..name.len().min(100)]).escape_debug().to_string();
    let found = format!("a tar archive of something else (`{shown}`)");
    Fault::new("a checkpoint of PyTorch 0.1.1 to 0.1.9 in the tar archive", found)
        .hint("unpack it with `tar -x`, and open the checkpoint in it")
        .unsupported()
}

impl Extended {
    fn read(&mut self, source: &dyn ReadAt, kind: u8, range: Range<u64>) -> Result<()> {
        if range.end - range.start > MAX_EXTENSION_BYTES {
            let found = format!("{} bytes", range.end - range.start);
            let expected = format!("an extended header of at most {MAX_EXTENSION_BYTES} bytes");
            return Err(Fault::new(expected, found).at(range.start).unsupported());
        }
        let start_byte = range.start;
        let text = source.read_range(range)?;
        match kind {
            // GNU's long names end with a zero.
            b'L' => self.name = Some(until_zero(&text).to_vec()),
            b'K' => {}
            _ => self.read_records(&text).ok_or_else(|| {
                Fault::new("records of an extended header of the tar archive", "something else")
                    .at(start_byte)
                    .corrupt()
            })?,
        }
        Ok(())
    }

    /// Reads lines of a length, `key=value`.
    fn read_records(&mut self, text: &[u8]) -> Option<()> {
        let mut rest = until_zero(text);
        while !rest.is_empty() {
            let space = rest.iter().position(|&it| it == b' ')?;
            let len: usize = std::str::from_utf8(&rest[..space]).ok()?.parse().ok()?;
            let record = rest.get(space + 1..len)?.strip_suffix(b"\n")?;
            rest = &rest[len..];
            let equals = record.iter().position(|&it| it == b'=')?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.name = Some(value.to_vec()),
                b"size" => self.size_bytes = Some(std::str::from_utf8(value).ok()?.parse().ok()?),
                // Sparse files stand in pieces.
                _ if key.starts_with(b"GNU.sparse") => return None,
                _ => {}
            }
        }
        Some(())
    }
}

/// The name in a header, behind its prefix.
fn name_of(header: &[u8; 512]) -> Vec<u8> {
    let (name, prefix) = (until_zero(&header[..100]), until_zero(&header[345..500]));
    // What GNU writes there is something else.
    if prefix.is_empty() || header[257..263] != *b"ustar\0" {
        return name.to_vec();
    }
    [prefix, b"/", name].concat()
}

fn until_zero(text: &[u8]) -> &[u8] {
    let len = text.iter().position(|&it| it == 0).unwrap_or(text.len());
    &text[..len]
}

/// An octal number, or one to the base of 256 where the first bit says so.
fn number(field: &[u8]) -> Option<u64> {
    if let [first, rest @ ..] = field
        && *first >= 0x80
    {
        // The first byte's other bits are a part of the number, or of its sign.
        let mut value = Some(u64::from(first & 0x7F));
        for &byte in rest {
            value = value.and_then(|it| it.checked_mul(256)?.checked_add(byte.into()));
        }
        return value;
    }
    let digits = until_zero(field).trim_ascii();
    if digits.is_empty() || !digits.iter().all(|it| matches!(it, b'0'..=b'7')) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

/// True if the header's checksum is right; old programs added the bytes up with their signs.
fn has_right_sum(header: &[u8; 512]) -> bool {
    let with_blanks =
        header.iter().enumerate().map(|(at, &it)| if (148..156).contains(&at) { b' ' } else { it });
    let unsigned: i64 = with_blanks.clone().map(i64::from).sum();
    let signed: i64 = with_blanks.map(|it| i64::from(it.cast_signed())).sum();
    let claimed = number(&header[148..156]).and_then(|it| i64::try_from(it).ok());
    claimed == Some(unsigned) || claimed == Some(signed)
}
