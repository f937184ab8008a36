//! `unladen verify` as a script sees it: what it prints where, and how it exits.

use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../unladen/tests/fixtures")
}

fn sample(name: &str) -> PathBuf {
    fixtures().join("samples").join(name)
}

fn run(words: &[&str], paths: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unladen"));
    let output = command.arg("verify").args(paths).args(words).stdin(Stdio::null()).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
    output
}

/// What it printed, and the words about it.
fn ends(code: i32, words: &[&str], paths: &[&Path]) -> (String, String) {
    let output = run(words, paths);
    let [stdout, stderr] = [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
    assert_eq!(output.status.code(), Some(code), "{words:?} {paths:?}: {stdout}\n{stderr}");
    (stdout, stderr)
}

fn json(code: i32, paths: &[&Path]) -> Value {
    serde_json::from_str(&ends(code, &["--json"], paths).0).unwrap()
}

#[test]
fn a_whole_file_is_said_to_be_whole() {
    let (stdout, _) = ends(0, &[], &[&sample("state_dict.pt")]);
    assert!(
        stdout.contains("no fault") && stdout.contains("records compared with their checksums"),
        "{stdout}"
    );
    let report = json(0, &[&sample("state_dict.pt")]);
    assert_eq!((&report["is_right"], &report["format"]), (&true.into(), &"pth".into()));
    assert!(report["records"]["compared"].as_u64().unwrap() > 7 && report["bytes"].as_u64().unwrap() > 0);
    let (_, words) = ends(0, &[], &[&sample("unsorted.safetensors")]);
    assert!(words.contains("nothing to compare it with") && words.contains("--manifest"), "{words}");
}

#[test]
fn a_damaged_record_is_named_with_its_tensors() {
    let bad = fixtures().join("hostile/z01_crc_mismatch_data.pt");
    let (stdout, words) = ends(1, &[], &[&bad]);
    assert!(stdout.contains("data/0`: expected CRC-32 ") && stdout.contains("1 fault"), "{stdout}");
    assert!(words.contains("hint: "), "{words}");
    let report = json(1, &[&bad]);
    let fault = &report["faults"][0];
    assert_eq!((&report["is_right"], &fault["kind"]), (&false.into(), &"checksum".into()));
    assert!(!fault["tensors"].as_array().unwrap().is_empty(), "{fault}");
}

#[test]
fn a_manifest_is_written_once_and_finds_what_changed() {
    let folder = TempDir::new().unwrap();
    let manifest = folder.path().join("m.json");
    let (write, read) =
        (["--write-manifest", manifest.to_str().unwrap()], ["--manifest", manifest.to_str().unwrap()]);
    ends(0, &write, &[&sample("state_dict.pt")]);
    ends(0, &read, &[&sample("state_dict.pt")]);
    let (_, words) = ends(1, &write, &[&sample("state_dict.pt")]);
    assert!(words.contains("error: ") && words.contains("--force"), "{words}");
    ends(0, &[write[0], write[1], "--force"], &[&sample("state_dict.pt")]);
    ends(0, &read, &[&sample("rezip_stored.pt")]);
    let (stdout, _) = ends(1, &read, &[&sample("tied.pt")]);
    assert!(
        stdout.contains("found no such tensor") && stdout.contains("expected no such tensor"),
        "{stdout}"
    );
    let (_, words) = ends(1, &read, &[&folder.path().join("nowhere.pt")]);
    assert!(words.contains("nowhere.pt"), "{words}");

    let bad = fixtures().join("hostile/z01_crc_mismatch_data.pt");
    let never = folder.path().join("never.json");
    ends(1, &["--write-manifest", never.to_str().unwrap()], &[&bad]);
    assert!(!never.exists(), "a manifest of a damaged file would lie");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    let input = sample("state_dict.pt");
    ends(1, &["--force", "--write-manifest", input.to_str().unwrap()], &[&input]);
    ends(0, &read, &[&input]);
}

#[test]
fn two_files_are_the_same_or_differ_or_are_unknown() {
    let (stdout, _) = ends(0, &[], &[&sample("state_dict.pt"), &sample("rezip_stored.pt")]);
    assert!(stdout.contains("the same") && stdout.contains("7 tensors in both"), "{stdout}");
    let (stdout, words) = ends(1, &[], &[&sample("state_dict.pt"), &sample("tied.pt")]);
    assert!(stdout.contains("only in ") && !words.contains("error: "), "{stdout} {words}");
    let bad = fixtures().join("hostile/z01_crc_mismatch_data.pt");
    let good = fixtures().join("hostile/00_good.pt");
    let report = json(1, &[&good, &bad]);
    let elements = &report["different"][0]["elements"];
    assert_eq!((&report["same"], &elements["different"]), (&false.into(), &1.into()));
    assert!(
        elements["first_index"].is_array() && elements["values"].as_array().unwrap().len() == 2,
        "{report}"
    );
    let (stdout, words) = ends(2, &[], &[&good, Path::new("nowhere.pt")]);
    assert!(stdout.is_empty() && words.contains("nowhere.pt") && words.contains("hint: "), "{words}");
    ends(2, &["--manifest", "m.json"], &[&good, &bad]);
}

#[test]
fn a_budget_is_kept_or_one_is_named_that_works() {
    let good = sample("state_dict.pt");
    let (_, words) = ends(1, &["--host-budget", "4KiB"], &[&good]);
    assert!(words.contains("--host-budget"), "{words}");
    let (_, words) = ends(2, &["--host-budget", "4KiB"], &[&good, &good]);
    assert!(words.contains("side by side"), "{words}");
    ends(0, &["--host-budget", "4MiB"], &[&good]);
    ends(0, &["--host-budget", "8MiB"], &[&good, &good]);
}

#[test]
fn views_that_claim_more_bytes_than_can_be_counted_are_an_error_and_no_panic() {
    let huge = fixtures().join("hostile/p72_expanded_beyond_64_bits.pt");
    ends(0, &[], &[&huge]);
    let (stdout, _) = ends(1, &["--write-manifest", "never.json"], &[&huge]);
    assert!(stdout.contains("40 faults") && stdout.contains("`w39`"), "{stdout}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_unladen"));
    let output = command.args(["inspect", "--hash", "sha256"]).arg(&huge).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && words.contains("stored bytes"), "{words}");
}
