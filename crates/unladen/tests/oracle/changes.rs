//! Files that change while they are loaded: a typed error, or the bytes of the file that was opened. Never a mixture.

use crate::{
    checkpoint::Case,
    faulty::Fault,
    run::{Way, assert_loads, error_of, unlimited},
};
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::Path,
    sync::{Arc, Mutex},
};
use unladen::{
    DType, Error, IoPath, OpenCheckpoint, Progress, Strategy,
    plan::{LoadPlan, Step},
    tensor::Layout,
};

const LEN_BYTES: usize = 3 << 20;

/// Something that happens to a file while it is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Shortened,
    Emptied,
    Grown,
    Overwritten,
    /// Another file has taken its name.
    Replaced,
}

const CHANGES: [Change; 5] =
    [Change::Shortened, Change::Emptied, Change::Grown, Change::Overwritten, Change::Replaced];

fn change(path: &Path, change: Change) {
    let write = || OpenOptions::new().write(true).open(path).unwrap();
    match change {
        Change::Shortened => write().set_len(LEN_BYTES as u64 / 2).unwrap(),
        Change::Emptied => write().set_len(0).unwrap(),
        Change::Grown => OpenOptions::new().append(true).open(path).unwrap().write_all(b"more").unwrap(),
        Change::Overwritten => {
            // The clock that files are stamped with ticks every few milliseconds.
            let before = fs::metadata(path).unwrap().modified().unwrap();
            while fs::metadata(path).unwrap().modified().unwrap() == before {
                write().write_all(&[0; 4096]).unwrap();
            }
        }
        Change::Replaced => {
            let other = path.with_extension("new");
            fs::write(&other, vec![0; LEN_BYTES]).unwrap();
            fs::rename(other, path).unwrap();
        }
    }
}

/// Touching what is mapped and no longer there kills the process: these read by system calls alone.
fn reading() -> impl Iterator<Item = Way> {
    Way::all().filter(|way| !matches!(way, Way::Strategy(Strategy::Mmap | Strategy::MmapCopy)))
}

/// What a load gives over whose files something happens: nothing of another file than the one that was opened.
fn assert_noticed(
    case: &Case,
    open: &OpenCheckpoint,
    plan: &LoadPlan,
    change: Change,
    after_step: &mut dyn FnMut(usize),
) {
    let error = error_of(case, open, plan, &Progress::default(), after_step);
    let (Error::Mismatch(fault) | Error::Corrupt(fault)) = &error else { panic!("{change:?}: {error}") };
    assert_eq!(fault.path, case.paths[0], "{change:?}: {error}");
}

#[test]
fn a_change_in_the_middle_of_a_read_is_noticed() {
    for kind in CHANGES.into_iter().filter(|it| *it != Change::Replaced) {
        for path in IoPath::all() {
            for way in reading() {
                let case = Case::of_bytes(LEN_BYTES);
                let file = case.paths[0].clone();
                let before = move |number, _, _| {
                    if number == 2 {
                        change(&file, kind);
                    }
                };
                let open = case.open_with(Fault::Short(300_000), Arc::new(before));
                assert_noticed(&case, &open, &unlimited(way, &open, path), kind, &mut |_| {});
                // As it should be again, it loads.
                fs::write(&case.paths[0], &case.bytes[0]).unwrap();
                let open = case.open();
                assert_loads(&case, &open, &unlimited(way, &open, path));
            }
        }
    }
}

#[test]
fn a_change_between_two_steps_is_noticed() {
    for kind in CHANGES.into_iter().filter(|it| *it != Change::Replaced) {
        for way in reading() {
            for first_or_last in [true, false] {
                let case = Case::of_bytes(LEN_BYTES);
                let open = case.open();
                let plan = unlimited(way, &open, IoPath::Buffered);
                let at = if first_or_last { 0 } else { plan.steps().len() - 1 };
                let mut after_step = |number| {
                    if number == at {
                        change(&case.paths[0], kind);
                    }
                };
                assert_noticed(&case, &open, &plan, kind, &mut after_step);
            }
        }
    }
}

#[test]
fn a_file_that_loses_its_name_is_loaded_to_its_end() {
    for way in Way::all() {
        let case = Case::of_bytes(LEN_BYTES);
        let file = Mutex::new(Some(case.paths[0].clone()));
        let before = move |_, _, _| {
            if let Some(file) = file.lock().unwrap().take() {
                change(&file, Change::Replaced);
            }
        };
        let open = case.open_with(Fault::Short(300_000), Arc::new(before));
        // Past the page cache, too: the file is opened once more for that, and must be the same.
        for path in IoPath::all() {
            assert_loads(&case, &open, &unlimited(way, &open, path));
        }
    }
}

#[test]
fn what_is_gone_from_a_mapping_is_an_error_where_it_is_brought_in() {
    for kind in [Change::Shortened, Change::Emptied] {
        let case = Case::of_bytes(LEN_BYTES);
        let open = case.open();
        let plan = unlimited(Way::Strategy(Strategy::Mmap), &open, IoPath::Buffered);
        let mut after_step = |number: usize| {
            if matches!(plan.steps()[number], Step::Map { .. }) {
                change(&case.paths[0], kind);
            }
        };
        assert_noticed(&case, &open, &plan, kind, &mut after_step);
    }
}

#[test]
fn a_mapped_file_that_changes_before_the_end_is_noticed() {
    for kind in [Change::Grown, Change::Overwritten] {
        for strategy in [Strategy::Mmap, Strategy::MmapCopy] {
            let case = Case::of_bytes(LEN_BYTES);
            let open = case.open();
            let plan = unlimited(Way::Strategy(strategy), &open, IoPath::Buffered);
            let mut after_step = |number: usize| {
                if matches!(plan.steps()[number], Step::Map { .. }) {
                    change(&case.paths[0], kind);
                }
            };
            assert_noticed(&case, &open, &plan, kind, &mut after_step);
        }
    }
}

#[test]
fn one_of_many_files_that_is_replaced_is_never_taken_for_the_other() {
    // More than stay open: the last are opened when they are read.
    let n_files = 200u32;
    let mut case = Case::of_files((0..n_files).map(|it| vec![it as u8; 100]).collect());
    for file in 0..n_files {
        case.add_storage(file, 0, 100, false);
        case.add_tensor(&format!("t{file}"), Layout::contiguous(DType::U8, &[100]).unwrap(), file);
    }
    let open = case.open();
    for way in Way::all() {
        let plan = unlimited(way, &open, IoPath::Buffered);
        let last = &case.paths[n_files as usize - 1];
        let mut after_step = |number| {
            if number == 0 {
                let other = last.with_extension("new");
                File::create(&other).unwrap().write_all(&[0; 100]).unwrap();
                fs::rename(other, last).unwrap();
            }
        };
        let error = error_of(&case, &open, &plan, &Progress::default(), &mut after_step);
        assert!(matches!(&error, Error::Mismatch(fault) if fault.path == *last), "{way:?}: {error}");
    }
}
