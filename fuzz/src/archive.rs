//! Zip archives as `torch.save` writes them, with lies in any field of the directory, the local headers and the end.

use crate::{damage, number, one_in, perhaps_lie, pickle::storage_bytes};
use arbitrary::{Result, Unstructured};
use flate2::{Compression, write::DeflateEncoder};
use std::io::Write as _;

/// A record that is to be written.
pub struct Record {
    pub name: Vec<u8>,
    pub bytes: Vec<u8>,
}

impl Record {
    pub fn new(name: &str, bytes: &[u8]) -> Record {
        Record { name: name.into(), bytes: bytes.into() }
    }
}

/// The records of a checkpoint with this pickle, and four storages of 16 bytes.
pub fn records_of(pickle: Vec<u8>) -> Vec<Record> {
    let mut records = vec![Record { name: b"a/data.pkl".to_vec(), bytes: pickle }];
    records.push(Record::new("a/byteorder", b"little"));
    for key in 0..4u8 {
        records.push(Record::new(&format!("a/data/{key}"), &storage_bytes(key)));
    }
    records.push(Record::new("a/version", b"3\n"));
    records
}

/// An archive that tells the truth.
pub fn honest(records: &[Record]) -> Vec<u8> {
    // Without bytes to choose from, nothing is a lie.
    write(records, &mut Unstructured::new(&[])).unwrap_or_default()
}

/// Other records among those that are there: twins, strangers, names of other formats.
pub fn disturb(u: &mut Unstructured<'_>, records: &mut Vec<Record>) -> Result<()> {
    for _ in 0..u.int_in_range(0..=3)? {
        let at = u.int_in_range(0..=records.len() - 1)?;
        match u.int_in_range(0..=5)? {
            0 => records.swap(0, at),
            1 => records[at].name.make_ascii_uppercase(),
            2 => records[at].bytes = u.arbitrary()?,
            3 => records[at].name = u.choose(NAMES)?.as_bytes().to_vec(),
            4 => {
                let name = u.choose(NAMES)?.as_bytes().to_vec();
                let name = perhaps_lie(u, name)?;
                records.insert(at, Record { name, bytes: b"3\n".to_vec() });
            }
            _ => drop(records.remove(at)),
        }
        if records.is_empty() {
            records.push(Record::new("a/x", b""));
        }
    }
    Ok(())
}

const NAMES: &[&str] = &[
    "a/data.pkl",
    "a/data/0",
    "a/data/00",
    "a/version",
    "a/.data/version",
    "a/byteorder",
    "a/constants.pkl",
    "a/code/x.py",
    "a/.format_version",
    "a/../x",
    "b/data.pkl",
    "data.pkl",
    "/",
    "a/",
];

/// Where a record's parts came to stand, and what is said of it.
struct Entry {
    name: Vec<u8>,
    crc32: u32,
    packed: u32,
    len: u32,
    header_byte: u32,
    flags: u16,
    method: u16,
}

/// Writes an archive, with lies where `u` says so.
pub fn write(records: &[Record], u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Writer { u, may_lie: true, out: Vec::new() }.archive(records)
}

/// Writes an archive in one of the ways that mean the same: records stored or deflated, sizes before or behind them, fields
/// where they are or continued elsewhere.
pub fn write_truly(records: &[Record], u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Writer { u, may_lie: false, out: Vec::new() }.archive(records)
}

struct Writer<'w, 'a> {
    u: &'w mut Unstructured<'a>,
    may_lie: bool,
    out: Vec<u8>,
}

impl<'a> Writer<'_, 'a> {
    fn archive(mut self, records: &[Record]) -> Result<Vec<u8>> {
        let mut entries = Vec::new();
        for record in records {
            let flags = if one_in(self.u, 8)? { 0x0800 } else { 0x0808 };
            let entry = Entry {
                name: record.name.clone(),
                crc32: self.lie(crc32fast::hash(&record.bytes))?,
                packed: self.lie(record.bytes.len() as u32)?,
                len: self.lie(record.bytes.len() as u32)?,
                header_byte: self.lie(self.out.len() as u32)?,
                flags: self.lie(flags)?,
                method: self.method()?,
            };
            let (entry, bytes) = if entry.method == 8 && !self.lies_once_in(16)? {
                let mut bytes = deflate(&record.bytes);
                if self.lies_once_in(16)? {
                    damage(self.u, &mut bytes)?;
                }
                (Entry { packed: self.lie(bytes.len() as u32)?, ..entry }, bytes)
            } else {
                (entry, record.bytes.clone())
            };
            self.local(&entry)?;
            self.out.extend_from_slice(&bytes);
            if entry.flags & 8 != 0 && !bytes.is_empty() {
                self.out.extend_from_slice(b"PK\x07\x08");
                [entry.crc32, entry.packed, entry.len]
                    .iter()
                    .for_each(|it| self.out.extend(it.to_le_bytes()));
            }
            entries.push(entry);
        }
        let directory_byte = self.out.len() as u64;
        for entry in &entries {
            self.central(entry)?;
        }
        let directory_bytes = self.out.len() as u64 - directory_byte;
        self.end([entries.len() as u64, directory_bytes, directory_byte])?;
        Ok(self.out)
    }

    fn method(&mut self) -> Result<u16> {
        Ok(match self.u.int_in_range(0..=63)? {
            0..=47 => 0,
            63 if self.may_lie => 99,
            _ => 8,
        })
    }

    fn lies_once_in(&mut self, n: u32) -> Result<bool> {
        Ok(self.may_lie && one_in(self.u, n)?)
    }

    /// An archive has so many numbers that one lie in two hundred is enough.
    fn lie<T: arbitrary::Arbitrary<'a>>(&mut self, truth: T) -> Result<T> {
        if self.lies_once_in(200)? { self.u.arbitrary() } else { Ok(truth) }
    }

    /// A number of the end record.
    fn lie_of_end(&mut self, truth: u64) -> Result<u64> {
        if self.lies_once_in(24)? { number(self.u) } else { Ok(truth) }
    }

    fn local(&mut self, entry: &Entry) -> Result<()> {
        let start = self.out.len();
        // To the next 64 bytes, as PyTorch pads.
        let name_end = start + 30 + entry.name.len() + 4;
        let padding = (64 - name_end % 64) % 64;
        self.out.extend_from_slice(b"PK\x03\x04");
        let shorts = [0, self.lie(entry.flags)?, self.lie(entry.method)?, 0, 0];
        shorts.iter().for_each(|it: &u16| self.out.extend(it.to_le_bytes()));
        let honest = if entry.flags & 8 != 0 { [0; 3] } else { [entry.crc32, entry.packed, entry.len] };
        for it in honest {
            let it = self.lie(it)?;
            self.out.extend(it.to_le_bytes());
        }
        for it in [entry.name.len() as u16, padding as u16 + 4] {
            let it = self.lie(it)?;
            self.out.extend(it.to_le_bytes());
        }
        self.out.extend_from_slice(&entry.name);
        self.out.extend_from_slice(b"FB");
        self.out.extend((padding as u16).to_le_bytes());
        self.out.extend(std::iter::repeat_n(b'Z', padding));
        Ok(())
    }

    fn central(&mut self, entry: &Entry) -> Result<()> {
        // Some fields are continued in a zip64 extra field.
        let is_wide: [bool; 3] = [one_in(self.u, 16)?, one_in(self.u, 16)?, one_in(self.u, 16)?];
        let fields = [entry.len, entry.packed, entry.header_byte];
        let mut extra = Vec::new();
        for (field, _) in fields.iter().zip(is_wide).filter(|(_, is_wide)| *is_wide) {
            extra.extend(self.lie(u64::from(*field))?.to_le_bytes());
        }
        if !extra.is_empty() {
            let len = self.lie(extra.len() as u16)?;
            extra = [&1u16.to_le_bytes()[..], &len.to_le_bytes(), &extra].concat();
        }
        let [len, packed, header_byte] = [0, 1, 2].map(|it| if is_wide[it] { u32::MAX } else { fields[it] });
        self.out.extend_from_slice(b"PK\x01\x02");
        let shorts = [0, 0, entry.flags, entry.method, 0, 0];
        shorts.iter().for_each(|it: &u16| self.out.extend(it.to_le_bytes()));
        [entry.crc32, packed, len].iter().for_each(|it| self.out.extend(it.to_le_bytes()));
        for it in [entry.name.len() as u16, extra.len() as u16, 0, 0, 0] {
            let it = self.lie(it)?;
            self.out.extend(it.to_le_bytes());
        }
        self.out.extend([0; 4]);
        self.out.extend(header_byte.to_le_bytes());
        self.out.extend_from_slice(&entry.name);
        self.out.extend_from_slice(&extra);
        Ok(())
    }

    /// `place`: how many entries, how many bytes of directory, from where on.
    fn end(&mut self, place: [u64; 3]) -> Result<()> {
        if one_in(self.u, 2)? {
            let at = self.out.len() as u64;
            self.out.extend_from_slice(b"PK\x06\x06");
            let len = self.lie(44u64)?;
            self.out.extend(len.to_le_bytes());
            self.out.extend([0; 12]);
            for it in [place[0], place[0], place[1], place[2]] {
                let it = self.lie(it)?;
                self.out.extend(it.to_le_bytes());
            }
            self.out.extend_from_slice(b"PK\x06\x07\0\0\0\0");
            let at = self.lie(at)?;
            self.out.extend(at.to_le_bytes());
            self.out.extend(1u32.to_le_bytes());
        }
        let comment: &[u8] = if self.lies_once_in(16)? { b"PK\x05\x06 a comment that is none" } else { b"" };
        self.out.extend_from_slice(b"PK\x05\x06\0\0\0\0");
        for it in [place[0], place[0]] {
            let it = self.lie_of_end(it)? as u16;
            self.out.extend(it.to_le_bytes());
        }
        for it in [place[1], place[2]] {
            let it = self.lie_of_end(it)? as u32;
            self.out.extend(it.to_le_bytes());
        }
        let len = self.lie(comment.len() as u16)?;
        self.out.extend(len.to_le_bytes());
        self.out.extend_from_slice(comment);
        Ok(())
    }
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut packed = DeflateEncoder::new(Vec::new(), Compression::default());
    // Vectors take all.
    packed.write_all(bytes).and_then(|()| packed.finish()).unwrap_or_default()
}
