//! Cancelling: a load returns after the pieces that are in flight, and whoever watches it hears how it went.

use crate::{
    checkpoint::Case,
    faulty::Fault,
    run::{Way, assert_loads, error_of, unlimited},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};
use unladen::{
    DType, Error, Intent, IoPath, Machine, PlanOptions, Progress, RunOptions, Strategy, tensor::Layout,
};

/// Eight pieces as they are.
fn case() -> Case {
    let mut case = Case::of_files(vec![vec![7; 64 << 20]]);
    case.add_storage(0, 0, 64 << 20, false);
    case.add_tensor("t", Layout::contiguous(DType::U8, &[64 << 20]).unwrap(), 0);
    case
}

/// Many buffers, and one piece.
fn transposed() -> Case {
    let mut case = Case::of_files(vec![vec![7; 16 << 20]]);
    case.add_storage(0, 0, 16 << 20, false);
    case.add_tensor("t", Layout::strided(DType::F32, &[2048, 2048], &[1, 2048], 0).unwrap(), 0);
    case
}

/// Cancels a load in its third read, on slow disks. Returns how many reads began after that.
fn reads_after_a_cancel(case: &Case, n_threads: usize, places_pages: bool, path: IoPath) -> usize {
    let progress = Arc::new(Progress::default());
    let n_after = Arc::new(AtomicUsize::new(0));
    let (cancelled, counted) = (Arc::clone(&progress), Arc::clone(&n_after));
    let before = move |number: usize, _, _| {
        if cancelled.check("".as_ref()).is_err() {
            counted.fetch_add(1, SeqCst);
        }
        if number == 2 {
            cancelled.cancel();
        }
        // The others come to their reads meanwhile, and are in flight when they learn of it.
        thread::sleep(Duration::from_millis(2));
    };
    let open = case.open_with(Fault::Short(usize::MAX), Arc::new(before));
    let options =
        PlanOptions { host_budget_bytes: u64::MAX, n_threads: Some(n_threads), ..PlanOptions::default() };
    let machine = Machine { io: vec![path], places_pages, ..Machine::plain(n_threads, 1) };
    let plan = Way::Strategy(Strategy::Stream).plan(&open, &options, &machine).unwrap();
    let error = error_of(case, &open, &plan, &progress, &mut |_| {});
    assert!(matches!(&error, Error::Cancelled { path } if *path == open.path), "{error}");
    let (done_bytes, total_bytes) = progress.get();
    assert!(done_bytes < total_bytes, "{done_bytes} of {total_bytes}");
    n_after.load(SeqCst)
}

#[test]
fn a_cancelled_load_begins_nothing_but_what_is_in_flight() {
    let case = case();
    for n_threads in [1, 4] {
        for path in [IoPath::Buffered, IoPath::DropBehind, IoPath::Direct] {
            // Each of the others may have taken a piece and not begun to read it.
            let n_after = reads_after_a_cancel(&case, n_threads, false, path);
            assert!(n_after < n_threads, "{n_after} reads, {n_threads} threads, {path}");
        }
        // What is put in place comes in pieces of two mebibytes by reads of an eighth.
        let n_after = reads_after_a_cancel(&case, n_threads, true, IoPath::Buffered);
        assert!(n_after < 8 * n_threads, "{n_after} reads, {n_threads} threads");
    }
}

#[test]
fn a_tensor_that_is_brought_into_order_is_left_between_two_buffers() {
    let case = transposed();
    for path in [IoPath::Buffered, IoPath::Direct] {
        let n_after = reads_after_a_cancel(&case, 2, false, path);
        assert!(n_after <= 1, "{n_after} reads, {path}");
    }
}

#[test]
fn what_was_cancelled_can_be_loaded_again() {
    let case = Case::of_bytes(3 << 20);
    let open = case.open();
    for way in Way::all() {
        let plan = unlimited(way, &open, IoPath::Buffered);
        for stop_after in 0..plan.steps().len() - 1 {
            let progress = Progress::default();
            let mut cancel = |number| {
                if number == stop_after {
                    progress.cancel();
                }
            };
            let error = error_of(&case, &open, &plan, &progress, &mut cancel);
            assert!(matches!(error, Error::Cancelled { .. }), "{way:?}, step {stop_after}: {error}");
        }
        assert_loads(&case, &open, &plan);
    }
}

#[test]
fn whoever_watches_hears_of_the_last_byte() {
    let case = Case::of_bytes(3 << 20);
    for strategy in Strategy::all() {
        let open = case.open();
        for intent in [Intent::Private, Intent::ReadOnly] {
            let plan = open.plan(&PlanOptions { intent, ..PlanOptions::unlimited(strategy) }).unwrap();
            let mut heard = Vec::new();
            let mut hear = |done_bytes, total_bytes| heard.push((done_bytes, total_bytes));
            open.run(&plan, RunOptions { on_progress: Some(&mut hear), ..RunOptions::default() }).unwrap();
            assert_eq!(heard.last(), Some(&(plan.work_bytes(), plan.work_bytes())), "{strategy}");
            assert!(heard.is_sorted(), "{strategy}: {heard:?}");
        }
    }
}

#[test]
fn whoever_watches_can_cancel() {
    let case = case();
    // So slow that it is heard of in between.
    let open =
        case.open_with(Fault::Short(1 << 20), Arc::new(|_, _, _| thread::sleep(Duration::from_millis(10))));
    let plan = unlimited(Way::Strategy(Strategy::Stream), &open, IoPath::Buffered);
    let progress = Progress::default();
    let mut n_calls = 0;
    let mut cancel = |done_bytes, total_bytes| {
        n_calls += 1;
        if done_bytes > 0 && done_bytes < total_bytes {
            progress.cancel();
        }
    };
    let options =
        RunOptions { progress: Some(&progress), on_progress: Some(&mut cancel), ..RunOptions::default() };
    let error = open.run(&plan, options).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert!(n_calls >= 2, "in between, and at the end");
    let (done_bytes, total_bytes) = progress.get();
    assert!(done_bytes < total_bytes);
}
