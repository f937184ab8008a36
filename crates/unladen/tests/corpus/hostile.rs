//! Bad files: each must end as it should, in little memory.

use super::{expected, roots};
use std::path::Path;
use unladen::{Error, Progress, Strategy, open, verify::digest_of};

/// Opens a file, loads it by every strategy, and touches every byte.
fn load(path: &Path) -> Result<(), Error> {
    let checkpoint = open(path)?;
    for strategy in Strategy::all() {
        let loaded = checkpoint.load(strategy)?;
        digest_of(&loaded.state, path, &Progress::default())?;
    }
    Ok(())
}

/// Loads each file of a root with `run`, and returns a line for each that ends otherwise than it should.
fn wrong_ends(root: &Path, run: impl Fn(&Path) -> Result<(), Error>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, outcome) in expected(&root.join("hostile")) {
        // Said before, so that the last line names the file that aborts.
        eprint!("{} ", path.file_name().unwrap().display());
        let result = run(&path);
        let text = match &result {
            Ok(()) => "load".to_owned(),
            Err(error) => format!("error: {error}\n    hint: {}", error.hint()),
        };
        eprintln!("{text}");
        let outcome = outcome.as_str().unwrap();
        let right = matches!((outcome, &result), ("either", _) | ("load", Ok(())) | ("error", Err(_)));
        if !right {
            wrong.push(format!("{} should be {outcome}, is {text}", path.display()));
        }
    }
    wrong
}

#[test]
fn every_hostile_file_ends_as_it_should() {
    for root in roots() {
        let wrong = wrong_ends(&root, load);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

#[cfg(target_os = "linux")]
mod in_little_memory {
    use super::*;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use std::{env, fs, process::Command};
    use unladen::memory::{Method, measure};

    /// What a hostile file may make the process take, over what it has at its start.
    const LIMIT_BYTES: u64 = 256 << 20;
    /// Tells the child which root to load.
    const ROOT: &str = "UNLADEN_HOSTILE_ROOT";
    const CHILD: &str = "hostile::in_little_memory::child";

    #[test]
    fn every_hostile_file_ends_as_it_should_in_256_mib() {
        for root in roots() {
            let output = Command::new(env::current_exe().unwrap())
                .args([CHILD, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
                .env(ROOT, &root)
                // Each thread's own heap would reserve 64 MiB of addresses.
                .env("MALLOC_ARENA_MAX", "1")
                .output()
                .unwrap();
            let (out, err) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
            assert!(out.contains("1 passed"), "{out}");
        }
    }

    #[test]
    #[ignore = "the other test starts it, in a process of its own"]
    fn child() {
        let root = env::var_os(ROOT).expect("a root");
        limit_address_space();
        let wrong = wrong_ends(Path::new(&root), |path| {
            let (result, measured) = measure(Method::HighWater, || load(path));
            assert!(measured.peak_rss_bytes < LIMIT_BYTES, "{measured:?}");
            result
        });
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// From here on an allocation that takes the process over the limit fails, and Rust aborts.
    fn limit_address_space() {
        let statm = fs::read_to_string("/proc/self/statm").unwrap();
        let n_pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let limit_bytes = n_pages * rustix::param::page_size() as u64 + LIMIT_BYTES;
        let maximum = getrlimit(Resource::As).maximum;
        setrlimit(Resource::As, Rlimit { current: Some(limit_bytes), maximum }).unwrap();
        assert!(Vec::<u8>::new().try_reserve_exact(LIMIT_BYTES as usize).is_err(), "the limit does not hold");
    }
}
