//! Disks that fail: the error says which file and where, everything is given back, and the next load works.

use crate::{
    checkpoint::Case,
    faulty::Fault,
    run::{Way, assert_loads, error_of, unlimited},
};
use std::{
    panic::panic_any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};
use unladen::{
    Error, IoPath, OpenCheckpoint, Progress, Strategy,
    tensor::{Backing, Dims, Extent, Layout, StorageId, Tensor},
};

/// Large enough for pages of its own, small enough for one byte a read.
const LEN_BYTES: usize = (1 << 20) + 20_123;

/// Every way that reads by system calls, with every way to read.
fn reading() -> impl Iterator<Item = (Way, IoPath)> {
    let mapped = [Way::Strategy(Strategy::Mmap), Way::Strategy(Strategy::MmapCopy)];
    Way::all()
        .filter(move |way| !mapped.contains(way))
        .flat_map(|way| IoPath::all().map(move |path| (way, path)))
}

fn nothing() -> crate::faulty::Before {
    Arc::new(|_, _, _| {})
}

/// The error of a load from a disk with this fault. The same load works afterwards, from a disk without.
fn error_with(case: &Case, open: &OpenCheckpoint, way: Way, path: IoPath) -> Error {
    let plan = unlimited(way, open, path);
    let error = error_of(case, open, &plan, &Progress::default(), &mut |_| {});
    let healthy = case.open();
    assert_loads(case, &healthy, &unlimited(way, &healthy, path));
    error
}

#[test]
fn short_and_interrupted_reads_bring_everything() {
    let case = Case::of_bytes(LEN_BYTES);
    for fault in [Fault::Short(777), Fault::Short(4097), Fault::Interrupted, Fault::DirectRefusedLater] {
        let open = case.open_with(fault, nothing());
        reading().for_each(|(way, path)| assert_loads(&case, &open, &unlimited(way, &open, path)));
    }
}

#[test]
fn one_byte_a_read_brings_everything() {
    // Past the page cache each of them reads its block again.
    let case = Case::of_bytes(9_321);
    let open = case.open_with(Fault::Short(1), nothing());
    reading().for_each(|(way, path)| assert_loads(&case, &open, &unlimited(way, &open, path)));
    // In pages of its own.
    let case = Case::of_bytes(LEN_BYTES);
    let open = case.open_with(Fault::Short(1), nothing());
    for way in [Way::Strategy(Strategy::Stream), Way::CallerMemory] {
        assert_loads(&case, &open, &unlimited(way, &open, IoPath::Buffered));
    }
}

#[test]
fn a_disk_that_fails_is_named_with_the_byte_that_did_not_come() {
    let case = Case::of_bytes(LEN_BYTES);
    for broken_byte in [0, 70_001, LEN_BYTES as u64 - 1] {
        let open = case.open_with(Fault::BrokenAt(broken_byte), nothing());
        for (way, path) in reading() {
            let error = error_with(&case, &open, way, path);
            let Error::Io { path: named, offset_bytes, source, .. } = &error else {
                panic!("{way:?}: {error}")
            };
            assert_eq!(*named, case.paths[0], "{way:?}, {path}");
            assert_eq!(source.raw_os_error(), Some(libc::EIO), "{way:?}, {path}");
            // Pieces behind the broken byte are in flight at the same time, and one of them may fail first.
            assert!(offset_bytes.is_some_and(|it| it >= broken_byte), "{way:?}, {path}: {error}");
        }
    }
}

#[test]
fn one_thread_names_the_first_byte_that_did_not_come() {
    let case = Case::of_bytes(LEN_BYTES);
    let open = case.open_with(Fault::BrokenAt(700_001), nothing());
    for (way, path) in reading() {
        let options = unladen::PlanOptions {
            host_budget_bytes: u64::MAX,
            n_threads: Some(1),
            ..unladen::PlanOptions::default()
        };
        let machine =
            unladen::Machine { io: vec![path], places_pages: true, ..unladen::Machine::plain(1, 1) };
        let plan = way.plan(&open, &options, &machine).unwrap();
        let error = error_of(&case, &open, &plan, &Progress::default(), &mut |_| {});
        let is_exact = matches!(error, Error::Io { offset_bytes: Some(700_001), .. });
        assert!(is_exact, "{way:?}, {path}: {error}");
    }
}

#[test]
fn a_file_that_ends_early_is_corrupt() {
    let case = Case::of_bytes(LEN_BYTES);
    for end_byte in [0, 70_001, LEN_BYTES as u64 - 1] {
        let open = case.open_with(Fault::EndsAt(end_byte), nothing());
        for (way, path) in reading() {
            let error = error_with(&case, &open, way, path);
            let Error::Corrupt(fault) = &error else { panic!("{way:?}, {path}: {error}") };
            assert_eq!(fault.path, case.paths[0]);
            assert!(fault.hint.contains("truncated"), "{error}");
        }
    }
}

#[test]
fn a_panic_in_a_read_is_an_error_with_its_place_and_no_crash() {
    let case = Case::of_bytes(LEN_BYTES);
    let panics = |_, _, start_byte: u64| {
        if start_byte >= 70_000 {
            panic_any("the disk is on fire".to_owned());
        }
    };
    let open = case.open_with(Fault::Short(60_000), Arc::new(panics));
    for (way, path) in reading() {
        let error = error_with(&case, &open, way, path);
        let Error::Panicked { path: named, offset_bytes, message } = &error else {
            panic!("{way:?}: {error}")
        };
        assert_eq!((named, message.as_str()), (&case.paths[0], "the disk is on fire"));
        assert!(offset_bytes.is_some_and(|it| it < LEN_BYTES as u64), "{way:?}, {path}: {error}");
    }
}

#[test]
fn a_panic_over_the_second_file_of_a_tensor_names_that_file() {
    let mut case = Case::of_files(vec![vec![1; 100], vec![2; 100]]);
    case.add_storage(0, 0, 100, false);
    case.add_storage(1, 10, 90, false);
    let half = Layout::contiguous(unladen::DType::U8, &[50]).unwrap();
    let at = |start| Dims::from_slice(&[start]);
    case.extents = vec![
        Extent { storage: StorageId(0), layout: half.clone(), at: at(0) },
        Extent { storage: StorageId(1), layout: half, at: at(50) },
    ];
    let layout = Layout::contiguous(unladen::DType::U8, &[100]).unwrap();
    case.tensors.push(Tensor { name: "t".to_owned(), layout, backing: Backing::Extents(0..2) });
    let panics = |_, _, start_byte: u64| assert!(start_byte != 10, "the disk is on fire");
    let open = case.open_with(Fault::Short(usize::MAX), Arc::new(panics));
    let plan = unlimited(Way::Strategy(Strategy::Stream), &open, IoPath::Buffered);
    let error = error_of(&case, &open, &plan, &Progress::default(), &mut |_| {});
    let is_right =
        matches!(&error, Error::Panicked { path, offset_bytes: Some(10), .. } if *path == case.paths[1]);
    assert!(is_right, "{error}");
}

#[test]
fn a_fault_that_passes_stops_one_load_and_not_the_next() {
    let case = Case::of_bytes(LEN_BYTES);
    let is_healed = Arc::new(AtomicBool::new(false));
    let watched = Arc::clone(&is_healed);
    let open = case.open_with(
        Fault::Short(100_000),
        Arc::new(move |number, _, _| assert!(watched.load(Relaxed) || number < 3, "not yet")),
    );
    let plan = unlimited(Way::Strategy(Strategy::Stream), &open, IoPath::Buffered);
    let error = error_of(&case, &open, &plan, &Progress::default(), &mut |_| {});
    assert!(matches!(error, Error::Panicked { .. }), "{error}");
    is_healed.store(true, Relaxed);
    // The same plan over the same open files.
    assert_loads(&case, &open, &plan);
}
