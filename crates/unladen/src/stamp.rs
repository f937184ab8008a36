//! What identified a file when its header was read; compared again before and after a load. A record that is packed in a
//! file counts as a file of its own.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::PathBuf,
};

/// A path, and what identifies a file's content well enough to notice that it was replaced or written to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileStamp {
    /// The path it was opened by.
    pub path: PathBuf,
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Length; of a packed record, the length after unpacking.
    pub len_bytes: u64,
    /// Time of the last change, since the epoch.
    pub mtime_ns: i128,
    /// `None`: the whole file, as it is. Otherwise one record of it, which is unchanged as long as the file is.
    pub packed: Option<Packed>,
}

/// How a record is packed in a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Packed {
    /// What the file calls it, for messages.
    pub name: Box<str>,
    /// How to unpack it.
    pub encoding: Encoding,
    /// Where the packed bytes start in the file.
    pub start_byte: u64,
    /// How many they are.
    pub len_bytes: u64,
    /// Length of the file.
    pub file_len_bytes: u64,
    /// Of the unpacked bytes; `None`: not computed.
    pub crc32: Option<u32>,
}

/// How bytes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Deflated, without any header, as in zip archives.
    Deflate,
    /// As text in UTF-8, each byte a character of Latin-1: how pickles of protocol 2 hold bytes.
    Latin1,
}

/// Length, distance: no deflated code is shorter than these two bits, and none makes more than this many bytes.
const MAX_RUN_BYTES: u64 = 258;

impl Encoding {
    /// The most that so many packed bytes can unpack to.
    pub fn max_unpacked_bytes(self, packed_bytes: u64) -> u64 {
        match self {
            Encoding::Deflate => packed_bytes.saturating_mul(4 * MAX_RUN_BYTES),
            Encoding::Latin1 => packed_bytes,
        }
    }
}

impl FileStamp {
    /// The stamp of a record that is packed in this file.
    pub fn of_packed(&self, len_bytes: u64, packed: Packed) -> FileStamp {
        FileStamp { len_bytes, packed: Some(packed), ..self.clone() }
    }

    /// True if it is of a record that is packed in the file with that stamp.
    pub fn is_packed_in(&self, file: &FileStamp) -> bool {
        let identity = |it: &FileStamp, len_bytes| (it.dev, it.ino, it.mtime_ns, len_bytes);
        file.packed.is_none()
            && self.path == file.path
            && (self.packed.as_ref())
                .is_some_and(|it| identity(self, it.file_len_bytes) == identity(file, file.len_bytes))
    }
}

/// One number for all files of a checkpoint: what is made for them is for no others.
pub fn fingerprint<'a>(stamps: impl Iterator<Item = &'a FileStamp>) -> u64 {
    let mut hasher = DefaultHasher::new();
    stamps.for_each(|it| it.hash(&mut hasher));
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp() -> FileStamp {
        FileStamp { path: "a.pt".into(), dev: 1, ino: 2, len_bytes: 100, mtime_ns: 3, packed: None }
    }

    fn packed() -> Packed {
        let encoding = Encoding::Deflate;
        Packed {
            name: "x/data/0".into(),
            encoding,
            start_byte: 40,
            len_bytes: 10,
            file_len_bytes: 100,
            crc32: None,
        }
    }

    #[test]
    fn a_packed_record_belongs_to_its_file_and_to_no_other() {
        let (file, record) = (stamp(), stamp().of_packed(4000, packed()));
        assert!(record.is_packed_in(&file));
        assert_eq!(record.len_bytes, 4000);
        for other in [
            FileStamp { ino: 9, ..stamp() },
            FileStamp { len_bytes: 101, ..stamp() },
            FileStamp { mtime_ns: 4, ..stamp() },
            FileStamp { path: "b.pt".into(), ..stamp() },
            record.clone(),
        ] {
            assert!(!record.is_packed_in(&other), "{other:?}");
        }
        assert!(!file.is_packed_in(&file));
    }

    #[test]
    fn what_is_made_for_one_record_is_for_no_other() {
        let of = |stamp: FileStamp| fingerprint([stamp].iter());
        let record = || stamp().of_packed(4000, packed());
        assert_eq!(of(record()), of(record()));
        assert_ne!(of(record()), of(stamp()));
        assert_ne!(of(record()), of(stamp().of_packed(4000, Packed { start_byte: 41, ..packed() })));
        assert_ne!(of(record()), of(FileStamp { mtime_ns: 9, ..record() }));
    }
}
