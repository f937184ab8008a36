//! Programs over the fake driver, which has to be there before a process starts. So a test runs in two processes: the one
//! that the test runner starts starts the other and looks at what is left behind, the other has the driver.
// Not every test that shares this needs all of it.
#![allow(dead_code)]

use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsString,
    fs, panic,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    thread,
    time::Duration,
};
use tempfile::TempDir;

/// The name of the test that the second process is for.
const TEST: &str = "UNLADEN_TEST_OVER_FAKE_CUDA";
const CONTROL: &str = "FAKE_CUDA_CONTROL";
const REPORT: &str = "FAKE_CUDA_REPORT";

/// A second process takes seconds, on a slow machine minutes. One that takes longer waits for what never comes.
const HANGS: Duration = Duration::from_secs(900);

/// A fake driver, and a folder to talk to it by.
pub(crate) struct Fake {
    control: PathBuf,
    report: PathBuf,
    library: Option<PathBuf>,
    _folder: Option<TempDir>,
}

impl Fake {
    /// For programs to be started. `None`, said loudly, where it cannot be built.
    #[allow(clippy::print_stderr)]
    pub(crate) fn new() -> Option<Fake> {
        let Some(library) = built() else {
            eprintln!(
                "NOT TESTED: there is no C++ compiler (`c++`, or what CXX names), and without one no fake driver"
            );
            return None;
        };
        // The report is written after every call: to memory, where there is such a folder.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.unwrap();
        let (control, report) = (folder.path().join("control"), folder.path().join("report.json"));
        Some(Fake { control, report, library: Some(library), _folder: Some(folder) })
    }

    /// In the second process of the test of this name: the driver that it is over. In the first: `None`, after the second
    /// has run well, and `look` has seen what it left.
    pub(crate) fn over(test: &str, look: impl FnOnce(&Report)) -> Option<Fake> {
        if env::var_os(TEST).is_some_and(|it| it == test) {
            let path = |name| PathBuf::from(env::var_os(name).unwrap());
            let fake = Fake { control: path(CONTROL), report: path(REPORT), library: None, _folder: None };
            fake.end_in_any_case(test);
            return Some(fake);
        }
        let fake = Fake::new()?;
        run_again(test, fake.set_up(&mut Command::new(env::current_exe().unwrap())));
        look(&fake.report());
        None
    }

    /// A test that fails does so in words, and does not wait for ever, for work that the driver was told to hold, or for what
    /// the code under test forgot.
    #[allow(clippy::print_stderr)]
    fn end_in_any_case(&self, test: &str) {
        let (control, test) = (self.control.clone(), test.to_owned());
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            print(panic);
            let _ = fs::write(&control, "");
        }));
        thread::spawn(move || {
            thread::sleep(HANGS);
            eprintln!("{test} hangs");
            process::abort();
        });
    }

    /// Has a program find the driver.
    pub(crate) fn set_up<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        let mut path = OsString::from(self.library.as_ref().unwrap());
        if let Some(others) = env::var_os("LD_LIBRARY_PATH") {
            path.push(":");
            path.push(others);
        }
        command.env("LD_LIBRARY_PATH", path).env(CONTROL, &self.control).env(REPORT, &self.report)
    }

    /// Tells the driver, from the next call on, what `tests/fake_cuda/README.md` has words for.
    pub(crate) fn tell(&self, words: &str) {
        let part = self.control.with_extension("part");
        fs::write(&part, words).unwrap();
        fs::rename(part, &self.control).unwrap();
    }

    /// True once the driver was called.
    pub(crate) fn has_report(&self) -> bool {
        self.report.exists()
    }

    /// What the driver says of itself.
    pub(crate) fn report(&self) -> Report {
        Report(serde_json::from_slice(&fs::read(&self.report).unwrap()).unwrap())
    }
}

/// Runs one test of this program again, in a process where it knows that it is the second.
pub(crate) fn run_again(test: &str, command: &mut Command) {
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(TEST, test).stdin(Stdio::null());
    let output = command.output().unwrap();
    let [out, err] = [&output.stdout, &output.stderr].map(|it| String::from_utf8_lossy(it));
    assert!(output.status.success() && out.contains("1 passed"), "{}\n{out}\n{err}", output.status);
}

/// True in the process that [`run_again`] started for this test.
pub(crate) fn is_second(test: &str) -> bool {
    env::var_os(TEST).is_some_and(|it| it == test)
}

/// Of so many calls the first, one in the middle, and the last.
pub(crate) fn first_middle_last(n_calls: u64) -> BTreeSet<u64> {
    [1, n_calls.div_ceil(2), n_calls].into_iter().filter(|it| (1..=n_calls).contains(it)).collect()
}

/// What the driver counted.
pub(crate) struct Report(pub(crate) Value);

impl Report {
    /// Calls of a function.
    pub(crate) fn n_calls(&self, function: &str) -> u64 {
        self.0["calls"][function].as_u64().unwrap_or(0)
    }

    /// Calls of a function that failed because they were to.
    pub(crate) fn n_told_to_fail(&self, function: &str) -> u64 {
        self.0["told_to_fail"][function].as_u64().unwrap_or(0)
    }

    /// Numbers by name: `calls` and `told_to_fail` by function, what is `live` by kind.
    pub(crate) fn counted(&self, part: &str) -> BTreeMap<String, u64> {
        serde_json::from_value(self.0[part].clone()).unwrap()
    }

    /// Calls of each function since an earlier report.
    pub(crate) fn calls_since(&self, before: &Report) -> BTreeMap<String, u64> {
        let since = |(function, n): (String, u64)| (n - before.n_calls(&function), function);
        let calls = self.counted("calls").into_iter().map(since);
        calls.filter(|(n, _)| *n > 0).map(|(n, function)| (function, n)).collect()
    }

    /// What of a kind is not given back: `memory`, `registrations`, `streams`, `events`, `contexts`.
    pub(crate) fn live(&self, kind: &str) -> u64 {
        self.0["live"][kind].as_u64().unwrap_or_else(|| panic!("{kind}? {}", self.0))
    }

    /// Nothing was done that a right program would not do, and the caller's current context is what it was.
    pub(crate) fn assert_right(&self) {
        assert_eq!(self.0["violations"], Value::Array(Vec::new()), "{}", self.0);
        let [pushed, popped] = ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"]
            .map(|it| self.n_calls(it) - self.n_told_to_fail(it));
        assert_eq!(pushed, popped, "{}", self.0);
    }

    /// And everything was given back.
    pub(crate) fn assert_clean(&self) {
        self.assert_right();
        let live = self.0["live"].as_object().unwrap();
        assert!(live.values().all(|it| *it == 0), "{}", self.0);
    }
}

/// The folder with the library. The script compiles what changed, and knows that tests run at once.
fn built() -> Option<PathBuf> {
    let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
    Command::new(compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake_cuda");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/fake-cuda");
    let output = Command::new(script).arg(&folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(folder)
}
