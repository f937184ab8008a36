//! Packed records in files: every range of them, in every order, over disks that fail; and records that are not what they
//! claim to be.

use super::*;
use crate::{
    memory,
    source::{FileSet, MemorySource, RawRead},
    stamp::Encoding,
};
use flate2::{Compress, Compression, FlushCompress};
use std::{
    io::{self, Write},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

const LEN_BYTES: usize = 300_007;
/// What stands in the file before the record and behind it.
const AROUND_BYTES: usize = 5001;

/// Noise of four bits a byte, which shrinks to a half.
fn bytes(len_bytes: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        0x80 | (state >> 60) as u8
    };
    (0..len_bytes).map(|_| next()).collect()
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; 2 * bytes.len() + 1000];
    let mut deflate = Compress::new(Compression::default(), false);
    deflate.compress(bytes, &mut packed, FlushCompress::Finish).unwrap();
    packed.truncate(deflate.total_out() as usize);
    packed
}

fn packed_as(encoding: Encoding, bytes: &[u8]) -> Vec<u8> {
    match encoding {
        Encoding::Deflate => deflated(bytes),
        Encoding::Latin1 => bytes.iter().map(|&it| char::from(it)).collect::<String>().into_bytes(),
    }
}

/// Counts what comes from a file.
#[derive(Debug)]
struct Counted {
    inner: Box<dyn RawRead>,
    n_bytes: Arc<AtomicU64>,
}

impl RawRead for Counted {
    fn read_at(&self, is_direct: bool, start_byte: u64, target: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read_at(is_direct, start_byte, target)?;
        self.n_bytes.fetch_add(n as u64, Relaxed);
        Ok(n)
    }
}

/// A file with one packed record in it.
struct Case {
    _file: tempfile::NamedTempFile,
    file: Arc<FileSource>,
    stamp: FileStamp,
    n_read: Arc<AtomicU64>,
}

impl Case {
    fn new(encoding: Encoding, packed: &[u8], len_bytes: u64, crc32: Option<u32>) -> Case {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let around = [0x55; AROUND_BYTES];
        [&around, packed, &around].iter().for_each(|it| file.write_all(it).unwrap());
        file.as_file().sync_all().unwrap();
        let n_bytes = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&n_bytes);
        let source = FileSource::open(file.path()).unwrap();
        let source = source.with_raw(|inner| Box::new(Counted { inner, n_bytes: counted }));
        let packed = Packed {
            name: "x/data/0".into(),
            encoding,
            start_byte: AROUND_BYTES as u64,
            len_bytes: packed.len() as u64,
            file_len_bytes: source.stamp().len_bytes,
            crc32,
        };
        let stamp = source.stamp().of_packed(len_bytes, packed);
        Case { _file: file, file: Arc::new(source), stamp, n_read: n_bytes }
    }

    fn good(encoding: Encoding, bytes: &[u8]) -> Case {
        let packed = packed_as(encoding, bytes);
        Case::new(encoding, &packed, bytes.len() as u64, Some(crc32fast::hash(bytes)))
    }

    fn open(&self) -> UnpackSource {
        UnpackSource::new(Arc::clone(&self.file), self.stamp.clone()).unwrap()
    }

    fn packed_bytes(&self) -> u64 {
        self.stamp.packed.as_ref().unwrap().len_bytes
    }

    /// What a whole read gives.
    fn read(&self, path: IoPath) -> Result<Vec<u8>> {
        let source = self.open();
        let mut target = vec![0; source.len_bytes() as usize];
        let len_bytes = target.len();
        source.read_by(path, 0, &mut target, len_bytes)?;
        Ok(target)
    }
}

fn both() -> [Encoding; 2] {
    [Encoding::Deflate, Encoding::Latin1]
}

#[test]
fn every_range_comes_back_in_every_order_by_every_way_to_read() {
    let bytes = bytes(LEN_BYTES);
    for encoding in both() {
        let case = Case::good(encoding, &bytes);
        for path in IoPath::all() {
            memory::evict(case.file.file(), case.file.path()).unwrap();
            let source = case.open();
            let mut target = vec![0; LEN_BYTES + 100];
            let ranges = [
                (0, 1),
                (1, 0),
                (1, 4095),
                (4096, 100_000),
                (104_096, 1),
                (200_000, 50_000),
                (100, 200),
                (LEN_BYTES - 1, 1),
                (0, LEN_BYTES),
                (LEN_BYTES, 0),
                (LEN_BYTES - 70_000, 70_000),
                (5, 10),
                (15, 10),
            ];
            for (start, len) in ranges {
                source.read_by(path, start as u64, &mut target, len).unwrap();
                assert!(target[..len] == bytes[start..start + len], "{encoding:?} {path}: {start} {len}");
            }
            source.read_exact_at(7, &mut target[..9]).unwrap();
            assert_eq!(target[..9], bytes[7..16]);
        }
    }
}

#[test]
fn what_lies_ahead_is_unpacked_once_and_what_lies_behind_once_more() {
    let bytes = bytes(LEN_BYTES);
    for encoding in both() {
        for path in [IoPath::Buffered, IoPath::DropBehind] {
            let case = Case::good(encoding, &bytes);
            let source = case.open();
            assert!(source.is_in_order());
            // Past the page cache come whole pages, before it is known where the first block starts even twice.
            let most = case.packed_bytes() + if path == IoPath::Buffered { 0 } else { 6 * 4096 };
            for start in (0..LEN_BYTES).step_by(10_000) {
                let mut target = [0; 3000];
                let len = target.len().min(LEN_BYTES - start);
                source.read_by(path, start as u64, &mut target, len).unwrap();
            }
            let n_read = case.n_read.swap(0, Relaxed);
            assert!((case.packed_bytes() * 9 / 10..=most).contains(&n_read), "{encoding:?} {path}: {n_read}");
            source.read_by(path, LEN_BYTES as u64 - 1, &mut [0; 1], 1).unwrap();
            source.read_by(path, 0, &mut [0; 1], 1).unwrap();
            assert!(case.n_read.load(Relaxed) <= most + 2 * PACKED_CHUNK_BYTES);
        }
    }
}

#[test]
fn nothing_is_held_after_the_last_byte_and_before_the_first() {
    let bytes = bytes(LEN_BYTES);
    let case = Case::good(Encoding::Deflate, &bytes);
    let source = case.open();
    let is_held = || source.cursor.lock().unwrap().is_some();
    assert!(!is_held());
    source.read_exact_at(0, &mut [0; 10]).unwrap();
    assert!(is_held());
    source.read_exact_at(10, &mut vec![0; LEN_BYTES - 10]).unwrap();
    assert!(!is_held());
}

#[test]
fn a_read_from_a_cold_file_leaves_nothing_in_the_page_cache() {
    let bytes = bytes(4 << 20);
    let case = Case::good(Encoding::Deflate, &bytes);
    memory::evict(case.file.file(), case.file.path()).unwrap();
    if case.file.cached_bytes() != Some(0) {
        return;
    }
    assert!(case.read(IoPath::DropBehind).unwrap() == bytes);
    let cached_bytes = case.file.cached_bytes().unwrap();
    assert!(cached_bytes <= 4 * 4096, "{cached_bytes} of {}", case.packed_bytes());
}

/// The error of a record that claims to be something else. It comes by every way to read, again and again.
fn fault_of(case: &Case) -> Fault {
    let mut faults: Vec<Fault> = IoPath::all()
        .map(|path| match case.read(path).unwrap_err() {
            Error::Corrupt(fault) => *fault,
            other => panic!("{other}"),
        })
        .collect();
    let fault = faults.pop().unwrap();
    assert!(faults.iter().all(|it| *it == fault), "{faults:?}");
    assert_eq!(fault.path, case.stamp.path);
    assert!(fault.expected.contains("`x/data/0`"), "{fault}");
    let at_byte = fault.offset_bytes.unwrap() as usize;
    assert!((AROUND_BYTES..=AROUND_BYTES + case.packed_bytes() as usize).contains(&at_byte), "{fault}");
    fault
}

#[test]
fn a_record_of_another_length_than_it_claims_is_corrupt() {
    let bytes = bytes(LEN_BYTES);
    for encoding in both() {
        let packed = packed_as(encoding, &bytes);
        let with_len = |len: usize| fault_of(&Case::new(encoding, &packed, len as u64, None));
        assert!(with_len(LEN_BYTES + 1).found.contains(&LEN_BYTES.to_string()));
        assert!(with_len(2 * LEN_BYTES).found.contains("its end"));
        assert_eq!(with_len(LEN_BYTES - 1).found, "more");
        assert_eq!(with_len(1).found, "more");
    }
}

#[test]
fn packed_bytes_that_are_cut_off_or_too_many_are_corrupt() {
    let bytes = bytes(LEN_BYTES);
    let packed = deflated(&bytes);
    for len in [0, 1, 2, 1000, 65_536, packed.len() - 2, packed.len() - 1] {
        let fault = fault_of(&Case::new(Encoding::Deflate, &packed[..len], LEN_BYTES as u64, None));
        assert_eq!(fault.found, "none", "{len}: {fault}");
    }
    for more in [1, 100_000] {
        let longer = [&packed[..], &vec![0; more]].concat();
        let fault = fault_of(&Case::new(Encoding::Deflate, &longer, LEN_BYTES as u64, None));
        assert_eq!(fault.found, format!("{more} packed bytes"), "{fault}");
    }
    let text = packed_as(Encoding::Latin1, &bytes);
    for len in [0, 1, 65_536, text.len() - 1] {
        fault_of(&Case::new(Encoding::Latin1, &text[..len], LEN_BYTES as u64, None));
    }
}

#[test]
fn a_wrong_checksum_is_found_at_the_end_and_none_is_not_missed() {
    let bytes = bytes(LEN_BYTES);
    let packed = deflated(&bytes);
    let case = Case::new(Encoding::Deflate, &packed, LEN_BYTES as u64, Some(1));
    assert!(fault_of(&case).expected.contains("00000001"));
    // What comes before the end is not known to be wrong.
    case.open().read_exact_at(0, &mut vec![0; LEN_BYTES - 1]).unwrap();
    // Skipped bytes count too.
    case.open().read_exact_at(LEN_BYTES as u64 - 1, &mut [0]).unwrap_err();
    let good = Case::good(Encoding::Deflate, &bytes);
    good.open().read_exact_at(LEN_BYTES as u64 - 1, &mut [0]).unwrap();
    let unknown = Case::new(Encoding::Deflate, &packed, LEN_BYTES as u64, None);
    assert!(unknown.read(IoPath::Buffered).unwrap() == bytes);
}

#[test]
fn garbage_is_corrupt_or_other_bytes_with_another_checksum() {
    let good = bytes(20_000);
    let packed = deflated(&good);
    for at in (0..packed.len()).step_by(97) {
        for flip in [0x01, 0x80, 0xff] {
            let mut broken = packed.clone();
            broken[at] ^= flip;
            let crc32 = Some(crc32fast::hash(&good));
            fault_of(&Case::new(Encoding::Deflate, &broken, good.len() as u64, crc32));
        }
    }
    for byte in [0x00, 0x07, 0xff] {
        fault_of(&Case::new(Encoding::Deflate, &[byte; 5000], 20_000, None));
    }
}

#[test]
fn a_damaged_record_leaves_the_source_as_good_as_before() {
    let bytes = bytes(LEN_BYTES);
    let mut packed = deflated(&bytes);
    let len = packed.len();
    packed.truncate(len - 1000);
    let case = Case::new(Encoding::Deflate, &packed, LEN_BYTES as u64, None);
    let source = case.open();
    let mut target = vec![0; LEN_BYTES];
    for _ in 0..2 {
        assert!(source.read_exact_at(0, &mut target).is_err());
        source.read_exact_at(1000, &mut target[..100_000]).unwrap();
        assert!(target[..100_000] == bytes[1000..101_000]);
    }
    // Beyond its end there is nothing to be had, and nothing is tried.
    case.n_read.store(0, Relaxed);
    assert!(matches!(source.read_exact_at(1, &mut target).unwrap_err(), Error::Corrupt(_)));
    assert!(source.read_exact_at(u64::MAX, &mut [0]).is_err());
    assert!(source.read_by(IoPath::Buffered, 0, &mut [0], 2).is_err());
    assert_eq!(case.n_read.load(Relaxed), 0);
}

#[test]
fn several_threads_read_from_one_source() {
    let bytes = bytes(LEN_BYTES);
    let case = Case::good(Encoding::Deflate, &bytes);
    let source = case.open();
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (source, bytes) = (&source, &bytes);
            scope.spawn(move || {
                for start in (thread * 7000..LEN_BYTES - 900).step_by(60_000) {
                    let mut target = [0; 900];
                    source.read_exact_at(start as u64, &mut target).unwrap();
                    assert_eq!(target, bytes[start..start + 900]);
                }
            });
        }
    });
}

#[test]
fn a_record_is_changed_if_its_file_is() {
    let case = Case::good(Encoding::Deflate, &bytes(1000));
    let source = case.open();
    source.check_unchanged().unwrap();
    let mut file = std::fs::OpenOptions::new().append(true).open(&case.stamp.path).unwrap();
    file.write_all(b"more").unwrap();
    assert!(matches!(source.check_unchanged().unwrap_err(), Error::Mismatch(_)));
}

#[test]
fn a_set_reads_records_through_the_file_before_them() {
    let contents = bytes(LEN_BYTES);
    let (case, other) = (Case::good(Encoding::Deflate, &contents), Case::good(Encoding::Latin1, b"abc"));
    let mut files = FileSet::default();
    assert!(files.push_packed(case.stamp.clone()).is_err(), "there is no file yet");
    files.push(FileSource::open(&case.stamp.path).unwrap());
    files.push_packed(case.stamp.clone()).unwrap();
    files.push_packed(case.stamp.clone()).unwrap();
    assert!(matches!(files.push_packed(other.stamp.clone()).unwrap_err(), Error::Mismatch(_)));
    files.push_shared(Arc::clone(&other.file));
    files.push_packed(other.stamp.clone()).unwrap();
    assert_eq!(files.len(), 5);
    assert_eq!([0, 1, 2, 3, 4].map(|it| files.position_of_file(it)), [0, 0, 0, 3, 3]);
    let whole = |index: usize| {
        let source = files.get(index).unwrap();
        source.read_range(0..source.len_bytes()).unwrap()
    };
    assert!(whole(1) == contents && whole(2) == contents && whole(4) == b"abc");
    assert_eq!(whole(3).len() as u64, other.file.len_bytes());
    assert_eq!(files.file(4).unwrap().stamp(), other.file.stamp());
    assert_eq!(files.fingerprint(), crate::stamp::fingerprint(files.stamps().iter()));
    let paths = crate::source::io_paths(&files);
    assert!(paths[1] == paths[0].of_packed() && paths[1] == paths[2]);
}

#[test]
fn records_of_more_files_than_stay_open_are_read_and_a_change_is_noticed() {
    let cases: Vec<Case> = (0..150).map(|it| Case::good(Encoding::Deflate, &bytes(it))).collect();
    let mut files = FileSet::default();
    for case in &cases {
        let source = FileSource::open(&case.stamp.path).unwrap();
        files.push_with_packed(source, &[case.file.stamp().clone(), case.stamp.clone()]).unwrap();
    }
    for index in 0..150 {
        let source = files.get(2 * index + 1).unwrap();
        assert!(source.read_range(0..index as u64).unwrap() == bytes(index));
    }
    std::fs::write(&cases[149].stamp.path, [0; 4000]).unwrap();
    assert!(matches!(files.get(299).err(), Some(Error::Mismatch(_))));
}

#[test]
fn a_header_is_unpacked_whole_or_not_at_all() {
    let bytes = bytes(10_000);
    for encoding in both() {
        let packed_bytes = packed_as(encoding, &bytes);
        let source = MemorySource::new("a.pt", packed_bytes.clone());
        let packed = Packed {
            name: "x/data.pkl".into(),
            encoding,
            start_byte: 0,
            len_bytes: packed_bytes.len() as u64,
            file_len_bytes: packed_bytes.len() as u64,
            crc32: None,
        };
        assert!(unpacked(&source, &packed, 10_000).unwrap() == bytes);
        for wrong in [0, 9_999, 10_001] {
            assert!(matches!(unpacked(&source, &packed, wrong).unwrap_err(), Error::Corrupt(_)));
        }
        let beyond = Packed { len_bytes: packed.len_bytes + 1, ..packed.clone() };
        assert!(matches!(unpacked(&source, &beyond, 10_000).unwrap_err(), Error::Corrupt(_)));
        let unknown = Packed { crc32: Some(7), ..packed };
        assert!(unpacked(&source, &unknown, 10_000).is_err());
        // No memory is taken for what no machine has.
        assert!(matches!(unpacked(&source, &unknown, u64::MAX).unwrap_err(), Error::Io { .. }));
    }
    let empty = MemorySource::new("a.pt", vec![3, 0]);
    let packed = Packed {
        name: "x/data/0".into(),
        encoding: Encoding::Deflate,
        start_byte: 0,
        len_bytes: 2,
        file_len_bytes: 2,
        crc32: None,
    };
    assert_eq!(unpacked(&empty, &packed, 0).unwrap(), b"");
}
