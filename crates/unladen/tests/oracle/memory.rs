//! A machine without memory: a typed error that names the file, and a process that goes on and loads something smaller.

use crate::{
    checkpoint::Case,
    run::{Way, assert_loads, error_of, unlimited},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{env, fs, fs::File, io, process::Command};
use unladen::{DType, Error, IoPath, Progress, tensor::Layout};

/// What the process may take beside what it has at its start.
const SPARE_BYTES: u64 = 128 << 20;

const CHILD: &str = "memory::child";

// The sanitizer takes terabytes of addresses for itself, which no limit on addresses allows.
#[cfg_attr(sanitized, ignore = "the sanitizer does not run under a limit on addresses")]
#[test]
fn a_load_that_gets_no_memory_says_so_and_the_next_one_works() {
    let output = Command::new(env::current_exe().unwrap())
        .args([CHILD, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("MALLOC_ARENA_MAX", "1")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    assert!(out.contains("1 passed"), "{out}");
}

#[test]
#[ignore = "the other test starts it, in a process of its own"]
fn child() {
    // A hole of a gibibyte, which takes no room on the disk.
    let mut large = Case::of_files(vec![Vec::new()]);
    File::options().write(true).open(&large.paths[0]).unwrap().set_len(8 * SPARE_BYTES).unwrap();
    large.add_storage(0, 0, 8 * SPARE_BYTES, false);
    large.add_tensor("t", Layout::contiguous(DType::U8, &[8 * SPARE_BYTES]).unwrap(), 0);
    let small = Case::of_bytes(3 << 20);
    let (open, open_small) = (large.open(), small.open());

    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let n_pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    let limit_bytes = n_pages * rustix::param::page_size() as u64 + SPARE_BYTES;
    let maximum = getrlimit(Resource::As).maximum;
    setrlimit(Resource::As, Rlimit { current: Some(limit_bytes), maximum }).unwrap();

    for way in Way::all().filter(|way| *way != Way::CallerMemory) {
        let plan = unlimited(way, &open, IoPath::Buffered);
        let error = error_of(&large, &open, &plan, &Progress::default(), &mut |_| {});
        let Error::Io { path, source, action, .. } = &error else { panic!("{way:?}: {error}") };
        assert_eq!(source.kind(), io::ErrorKind::OutOfMemory, "{way:?}: {error}");
        // What is mapped is a file, what is reserved is for a checkpoint.
        let expected = if action.contains("map") { &large.paths[0] } else { &open.path };
        assert_eq!(path, expected, "{way:?}: {error}");
        assert!(error.hint().contains("stream"), "{}", error.hint());
        assert_loads(&small, &open_small, &unlimited(way, &open_small, IoPath::Buffered));
    }
}
