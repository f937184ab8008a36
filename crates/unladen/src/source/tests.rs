//! Every way to read against every fault that a system call can have, and against the plain bytes.

use super::{FileSet, FileSource, RawRead};
use crate::{
    error::Error,
    io_path::IoPath,
    memory::{self, HostBuffer, Reservation},
};
use faulty::{Fault, Faulty};
use std::{
    io::Write,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

#[path = "../../tests/common/faulty.rs"]
mod faulty;

const LEN_BYTES: usize = 300_007;

fn byte_at(at_byte: usize) -> u8 {
    (at_byte * 31 % 253) as u8
}

fn file_in(folder: Option<&Path>) -> (tempfile::NamedTempFile, Vec<u8>) {
    let bytes: Vec<u8> = (0..LEN_BYTES).map(byte_at).collect();
    let mut file = match folder {
        Some(folder) => tempfile::NamedTempFile::new_in(folder).unwrap(),
        None => tempfile::NamedTempFile::new().unwrap(),
    };
    file.write_all(&bytes).unwrap();
    file.as_file().sync_all().unwrap();
    (file, bytes)
}

/// Page-aligned.
fn buffer(len_bytes: usize) -> HostBuffer {
    HostBuffer::new(Reservation::uncounted(len_bytes as u64), "test".as_ref()).unwrap()
}

struct Wrapped {
    source: FileSource,
    n_direct_calls: Arc<AtomicUsize>,
}

fn wrapped(path: &Path, fault: Fault) -> Wrapped {
    let n_direct_calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n_direct_calls);
    let count = move |_, is_direct, _| {
        counted.fetch_add(usize::from(is_direct), Relaxed);
    };
    let source = FileSource::open(path)
        .unwrap()
        .with_raw(|inner| Box::new(Faulty::new(inner, fault, Arc::new(count))));
    Wrapped { source, n_direct_calls }
}

/// Start and length in the file, where in the target, and room behind what is needed.
const RANGES: &[(usize, usize, usize, usize)] = &[
    (0, LEN_BYTES, 0, 8192),
    (0, LEN_BYTES, 0, 0),
    (4096, 8192, 0, 0),
    (4096, 8192, 100, 4096),
    (4096, 8193, 0, 4095),
    (5000, 20_000, 904, 10_000),
    (5000, 20_000, 5000, 0),
    (5001, 20_000, 0, 4096),
    (100, 50, 100, 4000),
    (4095, 2, 4095, 8192),
    (290_000, 10_007, 3280, 5000),
    (LEN_BYTES - 1, 1, 0, 5000),
    (LEN_BYTES, 0, 0, 100),
];

fn reads_every_range(source: &FileSource, bytes: &[u8], path: IoPath) {
    let mut buffer = buffer(LEN_BYTES + 16_384);
    for &(start, len, offset, room) in RANGES {
        let whole = buffer.as_mut_slice();
        whole.fill(0xAB);
        let target = &mut whole[offset..offset + len + room];
        source.read(path, start as u64, target, len).unwrap();
        assert!(target[..len] == bytes[start..start + len], "{path}: {start} {len} {offset} {room}");
        assert!(whole[..offset].iter().chain(&whole[offset + len + room..]).all(|byte| *byte == 0xAB));
    }
}

#[test]
fn every_way_reads_every_range_wherever_it_goes() {
    let shared_memory = Path::new("/dev/shm");
    for folder in [None, Some(shared_memory).filter(|it| it.is_dir())] {
        let (file, bytes) = file_in(folder);
        let source = FileSource::open(file.path()).unwrap();
        for path in IoPath::all() {
            memory::evict(file.as_file(), file.path()).unwrap();
            reads_every_range(&source, &bytes, path);
            reads_every_range(&source, &bytes, path);
        }
    }
}

#[test]
fn every_way_gets_over_short_interrupted_and_refused_reads() {
    let (file, bytes) = file_in(None);
    let faults = [
        Fault::Short(70_000),
        Fault::Short(4097),
        Fault::Short(513),
        Fault::Interrupted,
        Fault::DirectRefused(libc::EINVAL),
        Fault::DirectRefused(libc::EOPNOTSUPP),
        Fault::DirectRefusedLater,
    ];
    for fault in faults {
        for path in IoPath::all() {
            memory::evict(file.as_file(), file.path()).unwrap();
            reads_every_range(&wrapped(file.path(), fault).source, &bytes, path);
        }
    }
}

#[test]
fn every_way_gets_on_by_one_byte_a_read() {
    let (file, bytes) = file_in(None);
    for path in IoPath::all() {
        memory::evict(file.as_file(), file.path()).unwrap();
        let source = wrapped(file.path(), Fault::Short(1)).source;
        let mut buffer = buffer(16_384);
        source.read(path, 8000, buffer.as_mut_slice(), 9001).unwrap();
        assert!(buffer.as_slice()[..9001] == bytes[8000..17_001], "{path}");
        source.read(path, 8192, buffer.as_mut_slice(), 300).unwrap();
        assert!(buffer.as_slice()[..300] == bytes[8192..8492], "{path}");
    }
}

#[test]
fn a_disk_that_fails_is_named_by_the_byte_that_did_not_come() {
    let (file, bytes) = file_in(None);
    for path in IoPath::all() {
        for broken_byte in [9000, 65_536, 100_001] {
            memory::evict(file.as_file(), file.path()).unwrap();
            let source = wrapped(file.path(), Fault::BrokenAt(broken_byte)).source;
            let mut buffer = buffer(LEN_BYTES + 5000);
            let error = source.read(path, 4096, buffer.as_mut_slice(), 200_000).unwrap_err();
            let Error::Io { path: named, offset_bytes, source: cause, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!(named, file.path());
            assert_eq!(*offset_bytes, Some(broken_byte), "{path}");
            assert_eq!(cause.raw_os_error(), Some(libc::EIO));
            // What comes before is there to be read.
            let len = (broken_byte - 4096) as usize;
            source.read(path, 4096, buffer.as_mut_slice(), len).unwrap();
            assert!(buffer.as_slice()[..len] == bytes[4096..4096 + len], "{path}");
        }
    }
}

#[test]
fn a_file_that_ends_early_is_corrupt_and_says_where() {
    let (file, bytes) = file_in(None);
    for path in IoPath::all() {
        for end_byte in [0, 8192, 100_000] {
            memory::evict(file.as_file(), file.path()).unwrap();
            let source = wrapped(file.path(), Fault::EndsAt(end_byte)).source;
            let mut buffer = buffer(LEN_BYTES + 5000);
            let error = source.read(path, 0, buffer.as_mut_slice(), 200_000).unwrap_err();
            let Error::Corrupt(fault) = &error else { panic!("{error}") };
            assert_eq!(fault.found, format!("{end_byte} bytes"), "{path}");
            assert_eq!(fault.expected, "at least 200000 bytes");
            assert_eq!(fault.path, file.path());
            source.read(path, 0, buffer.as_mut_slice(), end_byte as usize).unwrap();
            assert!(buffer.as_slice()[..end_byte as usize] == bytes[..end_byte as usize]);
        }
        // And without anything in between.
        let source = FileSource::open(file.path()).unwrap();
        let mut buffer = buffer(16_384);
        let error = source.read(path, LEN_BYTES as u64 - 100, buffer.as_mut_slice(), 101).unwrap_err();
        assert!(error.to_string().contains(&format!("found {LEN_BYTES} bytes")), "{error}");
        assert!(source.read(path, u64::MAX - 5, buffer.as_mut_slice(), 100).is_err());
    }
}

#[test]
fn a_need_beyond_the_target_is_refused() {
    let (file, _) = file_in(None);
    let source = FileSource::open(file.path()).unwrap();
    for path in IoPath::all() {
        assert!(source.read(path, 0, &mut [0; 10], 11).is_err());
    }
}

#[test]
fn a_file_system_that_refuses_direct_reads_is_asked_once() {
    let (file, bytes) = file_in(None);
    let Wrapped { source, n_direct_calls } = wrapped(file.path(), Fault::DirectRefused(libc::EINVAL));
    for _ in 0..3 {
        reads_every_range(&source, &bytes, IoPath::Direct);
    }
    // None where the file system said so before.
    assert!(n_direct_calls.load(Relaxed) <= 1);
    let source = wrapped(file.path(), Fault::DirectRefused(libc::EOPNOTSUPP)).source;
    assert!(!source.can_read_direct());
}

/// The file, and an open source, if files here can be read directly and their pages counted.
#[allow(clippy::print_stderr)]
fn on_a_disk(test: &str) -> Option<(tempfile::NamedTempFile, FileSource, Vec<u8>)> {
    let (file, bytes) = file_in(None);
    let source = FileSource::open(file.path()).unwrap();
    memory::evict(file.as_file(), file.path()).unwrap();
    let can = source.can_read_direct() && source.cached_bytes() == Some(0);
    if !can {
        eprintln!(
            "NOT TESTED: {test}: no direct reads in the folder for temporary files, or no count of pages"
        );
    }
    can.then_some((file, source, bytes))
}

#[test]
fn direct_and_dropped_reads_leave_nothing_and_buffered_ones_stay() {
    let Some((file, source, bytes)) = on_a_disk("what reads leave in the page cache") else { return };
    let mut target = buffer(LEN_BYTES + 4096);
    for path in [IoPath::Direct, IoPath::DropBehind, IoPath::Mixed] {
        // In pieces that do not end with a page, in order, as a load reads them.
        for (start_byte, piece) in bytes.chunks(50_000).enumerate().map(|(at, piece)| (at * 50_000, piece)) {
            let from = start_byte % 4096;
            source.read(path, start_byte as u64, &mut target.as_mut_slice()[from..], piece.len()).unwrap();
            assert!(target.as_slice()[from..from + piece.len()] == *piece);
        }
        let cached_bytes = source.cached_bytes().unwrap();
        assert!(cached_bytes <= 2 * 4096, "{path} left {cached_bytes} bytes");
        memory::evict(file.as_file(), file.path()).unwrap();
    }
    source.read(IoPath::Buffered, 0, target.as_mut_slice(), LEN_BYTES).unwrap();
    assert_eq!(source.cached_bytes(), Some(LEN_BYTES as u64));
}

#[test]
fn mixed_reads_take_what_is_cached_from_there_and_leave_it() {
    let Some((file, plain, bytes)) = on_a_disk("mixed reads") else { return };
    let Wrapped { source, n_direct_calls } = wrapped(file.path(), Fault::Short(usize::MAX));
    let mut target = buffer(LEN_BYTES + 4096);
    rustix::fs::fadvise(plain.file(), 0, None, rustix::fs::Advice::Random).unwrap();
    plain.read(IoPath::Buffered, 0, target.as_mut_slice(), 65_536).unwrap();
    let cached_bytes = plain.cached_bytes().unwrap();
    assert!((65_536..LEN_BYTES as u64 / 2).contains(&cached_bytes), "{cached_bytes}");

    source.read(IoPath::Mixed, 0, target.as_mut_slice(), 65_536).unwrap();
    assert!(target.as_slice()[..65_536] == bytes[..65_536]);
    assert_eq!(n_direct_calls.load(Relaxed), 0);
    source.read(IoPath::Mixed, 196_608, target.as_mut_slice(), 65_536).unwrap();
    assert!(target.as_slice()[..65_536] == bytes[196_608..196_608 + 65_536]);
    assert_eq!(n_direct_calls.load(Relaxed), 1);
    assert_eq!(plain.cached_bytes(), Some(cached_bytes));
}

#[test]
fn shared_sources_stay_open_with_what_was_put_in_between() {
    let (file, _) = file_in(None);
    let mut files = FileSet::default();
    for _ in 0..200 {
        files.push_shared(Arc::new(wrapped(file.path(), Fault::BrokenAt(10)).source));
    }
    assert_eq!((files.len(), files.stamps().len()), (200, 200));
    let source = files.get(199).unwrap();
    source.read_exact_at(0, &mut [0; 10]).unwrap();
    let error = source.read_exact_at(0, &mut [0; 11]).unwrap_err();
    assert!(matches!(error, Error::Io { offset_bytes: Some(10), .. }), "{error}");
}
