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
    let (_, words) = ends(2, &write, &[&sample("state_dict.pt")]);
    assert!(words.contains("error: ") && words.contains("--force"), "{words}");
    ends(0, &[write[0], write[1], "--force"], &[&sample("state_dict.pt")]);
    ends(0, &read, &[&sample("rezip_stored.pt")]);
    let (stdout, _) = ends(1, &read, &[&sample("tied.pt")]);
    assert!(
        stdout.contains("found no such tensor") && stdout.contains("expected no such tensor"),
        "{stdout}"
    );
    let (_, words) = ends(2, &read, &[&folder.path().join("nowhere.pt")]);
    assert!(words.contains("nowhere.pt"), "{words}");

    let bad = fixtures().join("hostile/z01_crc_mismatch_data.pt");
    let never = folder.path().join("never.json");
    ends(1, &["--write-manifest", never.to_str().unwrap()], &[&bad]);
    assert!(!never.exists(), "a manifest of a damaged file would lie");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
    let input = sample("state_dict.pt");
    ends(2, &["--force", "--write-manifest", input.to_str().unwrap()], &[&input]);
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
    let (_, words) = ends(2, &["--host-budget", "4KiB"], &[&good]);
    // The number that the hint names works, as it stands.
    let (_, bytes) = words.trim_end().rsplit_once(": --host-budget ").unwrap();
    ends(0, &["--host-budget", bytes], &[&good]);
    assert!(!words.contains("strateg"), "{words}");
    let (_, words) = ends(2, &["--host-budget", "4KiB"], &[&good, &good]);
    assert!(words.contains("side by side"), "{words}");
    ends(0, &["--host-budget", "4MiB"], &[&good]);
    ends(0, &["--host-budget", "8MiB"], &[&good, &good]);
}

#[test]
fn the_exit_code_says_whether_something_is_wrong_or_cannot_be_told() {
    let folder = TempDir::new().unwrap();
    let manifest = folder.path().join("m.json");
    let manifest = manifest.to_str().unwrap();
    let (good, nowhere) = (sample("state_dict.pt"), folder.path().join("nowhere.pt"));
    ends(0, &["--write-manifest", manifest], &[&good]);
    let damaged = folder.path().join("damaged.pt");
    let bytes = fs::read(&good).unwrap();
    fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
    let page = folder.path().join("page.pt");
    fs::write(&page, "<!DOCTYPE html><html></html>").unwrap();
    for (code, bad) in [(2, &nowhere), (1, &damaged), (2, &page)] {
        for (words, paths) in [
            (&[][..], &[&**bad][..]),
            (&[], &[&good, bad]),
            (&[], &[bad, &good]),
            (&["--manifest", manifest], &[&**bad]),
            (&["--write-manifest", "never.json"], &[&**bad]),
        ] {
            let (stdout, stderr) = ends(code, words, paths);
            assert!(stdout.is_empty() && stderr.contains("error: ") && stderr.contains("hint: "), "{stderr}");
        }
    }
    ends(2, &["--manifest", "nowhere.json"], &[&good]);
}

#[test]
fn a_root_goes_for_both_files_and_the_other_one_may_hold_that_part_alone() {
    let folder = TempDir::new().unwrap();
    let whole = sample("lightning.ckpt");
    ends(0, &["--root", "state_dict"], &[&whole, &whole]);
    let report = ends(0, &["--root", "state_dict", "--json"], &[&whole, &whole]).0;
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["roots"], serde_json::json!(["state_dict", "state_dict"]));

    let alone = folder.path().join("alone.safetensors");
    let mut command = Command::new(env!("CARGO_BIN_EXE_unladen"));
    let converted =
        command.args(["convert", "--root", "state_dict"]).args([&whole, &alone]).output().unwrap();
    assert!(converted.status.success(), "{converted:?}");
    let (stdout, words) = ends(0, &["--root", "state_dict", "--json"], &[&whole, &alone]);
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["roots"], serde_json::json!(["state_dict", null]));
    assert!(
        words.contains("alone.safetensors has nothing below `state_dict`: all of it is compared"),
        "{words}"
    );
    // The first is what the path was given for.
    let (_, words) = ends(2, &["--root", "state_dict"], &[&alone, &whole]);
    assert!(words.contains("alone.safetensors") && words.contains("error: "), "{words}");
}

#[test]
fn a_sparse_tensor_is_not_the_same_as_its_parts_and_its_indices_are_checked() {
    let folder = TempDir::new().unwrap();
    let sparse = fixtures().join("hostile/p50_sparse_oob.pt");
    let parts = folder.path().join("parts.safetensors");
    let mut command = Command::new(env!("CARGO_BIN_EXE_unladen"));
    assert!(command.arg("convert").args([&sparse, &parts]).output().unwrap().status.success());
    let (stdout, _) = ends(1, &[], &[&sparse, &parts]);
    let expected = "`w` differs: sparse_coo [3] made of `w.indices`, `w.values`, and plain tensors";
    assert!(stdout.contains(expected) && stdout.contains("1 tensors differ"), "{stdout}");
    let report = json(1, &[&sparse, &parts]);
    let [one, other] = [0, 1].map(|side| &report["different"][0]["made"][side]);
    assert_eq!((&one["what"], &one["shape"]), (&"sparse_coo".into(), &serde_json::json!([3])));
    assert_eq!((&one["parts"][1], other), (&"w.values".into(), &Value::Null));

    let (stdout, words) = ends(1, &[], &[&sparse]);
    assert!(
        stdout.contains("below 3 (`w` is sparse_coo [3]), found 1000000, of value 0 (tensor `w.indices`)"),
        "{stdout}"
    );
    assert!(words.contains("hint: ") && !words.contains("fetch"), "{words}");
    assert_eq!(json(1, &[&sparse])["faults"][0]["kind"], "parts");
}

#[test]
fn a_manifest_of_version_1_is_read_and_what_it_does_not_cover_is_said() {
    let folder = TempDir::new().unwrap();
    let manifest = folder.path().join("m.json");
    let words = ["--manifest", manifest.to_str().unwrap()];
    ends(0, &["--write-manifest", words[1]], &[&sample("quant.pt")]);
    let (_, told) = ends(0, &words, &[&sample("quant.pt")]);
    assert!(!told.contains("version 1"), "{told}");
    let report = ends(0, &[words[0], words[1], "--json"], &[&sample("quant.pt")]).0;
    assert!(report.contains("\"composites_compared\":true"), "{report}");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"unladen_manifest\":2", "\"unladen_manifest\":1")).unwrap();
    let (_, told) = ends(0, &words, &[&sample("quant.pt")]);
    assert!(told.contains("version 1") && told.contains("zero points"), "{told}");
    let report = ends(0, &[words[0], words[1], "--json"], &[&sample("quant.pt")]).0;
    assert!(report.contains("\"composites_compared\":false"), "{report}");
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
