//! The meter on real memory. The tests take turns, because each measures the whole process.

use std::{
    fs::File,
    hint::black_box,
    io::Write,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};
use unladen::{
    memory::{HostBuffer, Mapping, Measured, Method, Reservation, cached_bytes, evict, measure, warm},
    progress::Progress,
};

static TURN: Mutex<()> = Mutex::new(());

fn my_turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

const MIB: u64 = 1 << 20;

fn assert_near(found_bytes: u64, expected_bytes: u64, measured: &Measured) {
    let difference = found_bytes.abs_diff(expected_bytes);
    assert!(difference <= 2 * MIB, "{found_bytes} instead of {expected_bytes}: {measured:?}");
}

/// A buffer with every page written.
fn touched(len_bytes: u64) -> HostBuffer {
    let mut buffer = HostBuffer::new(Reservation::uncounted(len_bytes), "test".as_ref()).expect("memory");
    buffer.as_mut_slice().iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    buffer
}

#[test]
fn touched_memory_is_the_peak_and_reserved_memory_is_not() {
    let _turn = my_turn();
    for method in [Method::HighWater, Method::Sampled] {
        let (buffers, measured) = measure(method, || {
            let buffers = (
                touched(64 * MIB),
                HostBuffer::new(Reservation::uncounted(256 * MIB), "test".as_ref()).expect("memory"),
            );
            thread::sleep(Duration::from_millis(20));
            buffers
        });
        assert_near(measured.peak_anon_bytes, 64 * MIB, &measured);
        assert_near(measured.peak_rss_bytes, 64 * MIB, &measured);
        assert_near(measured.peak_file_bytes, 0, &measured);
        drop(black_box(buffers));
    }
}

#[test]
fn memory_that_was_freed_shows_in_the_peak() {
    let _turn = my_turn();
    let ((), measured) = measure(Method::HighWater, || drop(black_box(touched(64 * MIB))));
    assert_near(measured.peak_anon_bytes, 64 * MIB, &measured);
    let ((), after) = measure(Method::HighWater, || {});
    assert_near(after.peak_rss_bytes, 0, &after);
}

#[test]
fn heap_memory_counts_as_anonymous() {
    let _turn = my_turn();
    // Large enough to come from the system, whatever the allocator kept from other tests.
    let (heap, measured) = measure(Method::HighWater, || black_box(vec![1u8; 64 << 20]));
    assert_near(measured.peak_anon_bytes, 64 * MIB, &measured);
    drop(heap);
}

#[test]
fn pages_of_a_mapped_file_are_told_apart() {
    let _turn = my_turn();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("file");
    File::create(&path).and_then(|mut file| file.write_all(&vec![1; 64 << 20])).expect("a file");
    let file = File::open(&path).expect("the file");
    let (_kept, measured) = measure(Method::Sampled, || {
        let mapping = Mapping::new(&file, Reservation::uncounted(64 * MIB), &path).expect("a mapping");
        let sum: u64 = mapping.as_slice().iter().step_by(4096).map(|&byte| u64::from(byte)).sum();
        assert_eq!(sum, 16384);
        (mapping, touched(8 * MIB))
    });
    assert_near(measured.peak_file_bytes, 64 * MIB, &measured);
    assert_near(measured.peak_anon_bytes, 8 * MIB, &measured);
    assert_near(measured.peak_rss_bytes, 72 * MIB, &measured);
}

#[test]
fn polling_sees_what_lasts() {
    let _turn = my_turn();
    let (_kept, measured) = measure(Method::HighWater, || {
        let buffer = touched(32 * MIB);
        thread::sleep(Duration::from_millis(400));
        buffer
    });
    assert_near(measured.polled_rss_bytes, 32 * MIB, &measured);
    assert!(measured.polled_rss_bytes <= measured.peak_rss_bytes);
}

#[test]
fn a_panic_in_the_work_ends_the_watcher() {
    let _turn = my_turn();
    let threads = || {
        std::fs::read_dir("/proc/self/task").map_or(0, |it| {
            it.filter(|task| {
                let name =
                    task.as_ref().ok().and_then(|it| std::fs::read_to_string(it.path().join("comm")).ok());
                name.is_some_and(|it| it.trim() == "meter")
            })
            .count()
        })
    };
    let caught = std::panic::catch_unwind(|| measure(Method::Sampled, || panic!("on purpose")));
    assert!(caught.is_err());
    assert_eq!(threads(), 0);
}

#[test]
fn evicting_empties_the_page_cache_and_warming_fills_it() {
    let _turn = my_turn();
    // Not in the system's temporary folder: a file that lives in memory cannot be evicted.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("file");
    let len_bytes = 8 * MIB + 100;
    File::create(&path).and_then(|mut file| file.write_all(&vec![7; len_bytes as usize])).expect("a file");
    let file = File::open(&path).expect("the file");
    assert_eq!(cached_bytes(&file, len_bytes), Some(len_bytes));
    evict(&file, &path).expect("evicted");
    assert!(cached_bytes(&file, len_bytes).is_some_and(|it| it < len_bytes / 2));
    let progress = Progress::default();
    warm(&file, &path, len_bytes, &progress).expect("warmed");
    assert!(cached_bytes(&file, len_bytes).is_some_and(|it| it >= len_bytes - len_bytes / 100));
    assert_eq!(progress.get(), (len_bytes, len_bytes));
}
