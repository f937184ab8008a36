//! The program as a script sees it: what it prints where, how it exits, and what it leaves behind.

mod compare;
mod gpt2;
mod inspect;
mod limits;

use serde_json::{Value, json};
use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

const STRATEGIES: [&str; 7] = ["naive", "sequential", "meta", "mmap", "mmap-copy", "per-tensor", "stream"];

fn unladen() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unladen"));
    command.stdin(Stdio::null());
    command
}

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../unladen/tests/fixtures/samples").join(name)
}

fn gpt2(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../unladen-gpt2/tests/fixtures").join(name)
}

/// What `samples/expected.json` says.
fn expected() -> Value {
    serde_json::from_slice(&fs::read(sample("expected.json")).unwrap()).unwrap()
}

/// Runs `unladen WORDS FILES`.
fn run(words: &str, files: &[&Path]) -> Output {
    let output = unladen().args(words.split_whitespace()).args(files).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!words.contains("panicked"), "{words}");
    assert!(!words.contains('\x1b') && !output.stdout.contains(&0x1b), "terminal codes in a pipe: {words}");
    output
}

/// Runs `unladen WORDS FILES`, which has to succeed: what it prints, and the words about it.
fn ok(words: &str, files: &[&Path]) -> (String, String) {
    let output = run(words, files);
    let [stdout, stderr] = [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
    assert!(output.status.success(), "{words} {files:?}: {stderr}");
    (stdout, stderr)
}

/// The one JSON value that a command prints.
fn ok_json(words: &str, files: &[&Path]) -> Value {
    serde_json::from_str(&ok(words, files).0).unwrap()
}

/// Runs `unladen WORDS FILES`, which has to fail without a result: the words.
fn fails(code: i32, words: &str, files: &[&Path]) -> String {
    let output = run(words, files);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words} {files:?}: {stderr}");
    assert!(output.stdout.is_empty() && !stderr.is_empty(), "a result beside an error: {words} {files:?}");
    assert!(code != 1 || (stderr.contains("error: ") && stderr.contains("\nhint: ")), "{stderr}");
    stderr
}

fn names_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn digest_of(path: &Path) -> Value {
    ok_json("load --json --digest", &[path])["digest"].clone()
}

/// The lines of `compare --json`, and the words about them.
fn compared(words: &str, dir: &Path, file: &Path) -> (Vec<Value>, String) {
    let (rows, words) = ok(&format!("compare --json {words} --dir"), &[dir, file]);
    (rows.lines().map(|it| serde_json::from_str(it).unwrap()).collect(), words)
}

/// A safetensors file of zeros, its bytes a hole.
fn zeros(path: &Path, tensors: &[(&str, &[u64])]) {
    let mut end_byte = 0;
    let entries = tensors.iter().map(|(name, shape)| {
        let start_byte = end_byte;
        end_byte += 4 * shape.iter().product::<u64>();
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start_byte, end_byte] });
        ((*name).to_owned(), entry)
    });
    let header = Value::Object(entries.collect()).to_string();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end_byte).unwrap();
}

#[test]
fn inspect_lists_names_dtypes_shapes_and_strides() {
    let listing = ok_json("inspect --json", &[&sample("layouts.pt")]);
    let keys = |it: &Value| it.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(keys(&listing), "composites format open_s roots tensors warnings");
    assert_eq!((&listing["format"], &listing["warnings"]), (&json!("pth"), &json!([])));
    assert!(listing["open_s"].as_f64().unwrap() > 0.0);
    let wanted = expected()["layouts.pt"]["tensors"].clone();
    let (found, wanted) = (listing["tensors"].as_array().unwrap(), wanted.as_array().unwrap());
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(wanted) {
        assert_eq!(keys(found), "dtype name offset_bytes shape storage stride");
        for key in ["name", "dtype", "shape", "stride"] {
            assert_eq!(found[key], wanted[key], "{wanted}");
        }
    }
}

#[test]
fn inspect_hashes_what_pytorch_hashed() {
    let names =
        ["layouts.pt", "all_dtypes.pt", "all_dtypes.safetensors", "big_endian.pt", "per_tensor", "tied.pt"];
    for name in names {
        let listing = ok_json("inspect --json --hash sha256", &[&sample(name)]);
        let found = listing["tensors"].as_array().unwrap();
        let wanted = &expected()[name]["torch"];
        assert_eq!(found.len(), wanted.as_object().unwrap().len(), "{name}");
        for it in found {
            let wanted = &wanted[it["name"].as_str().unwrap()];
            assert_eq!((&it["sha256"], &it["shape"]), (&wanted["sha256"], &wanted["shape"]), "{name}: {it}");
        }
    }
}

#[test]
fn every_sample_loads_with_its_digest() {
    let mut n_loaded = 0;
    for (name, wanted) in expected().as_object().unwrap() {
        let output = run("load --json --digest", &[&sample(name)]);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let row: Value = serde_json::from_slice(&output.stdout).unwrap();
        // A checkpoint with tensors on the meta device has none: there are no bytes to hash.
        // And where tensors have parts, the list names those otherwise, as the library's tests of the samples know.
        let has_parts = ["sparse.pt", "nested.pt", "quant.pt"].contains(&name.as_str());
        if let (Some(digest), false) = (wanted["digest"].as_str(), has_parts) {
            assert_eq!((&row["digest"], &row["tensors"]), (&json!(digest), &wanted["n_tensors"]), "{name}");
        }
        n_loaded += 1;
    }
    assert!(n_loaded >= 40, "{n_loaded}");
}

#[test]
fn load_tells_what_every_strategy_took_and_the_ledger_is_the_prediction() {
    let path = gpt2("notebook.safetensors");
    let bytes =
        ok_json("inspect --json", &[&path])["tensors"].as_array().unwrap().iter().fold(0, |sum, it| {
            let sizes = it["shape"].as_array().unwrap().iter().map(|it| it.as_u64().unwrap());
            sum + 4 * sizes.product::<u64>()
        });
    let mut digests = Vec::new();
    for strategy in STRATEGIES {
        let row = ok_json(&format!("load --json --digest --strategy {strategy}"), &[&path]);
        assert_eq!((&row["strategy"], &row["tensors"]), (&json!(strategy), &json!(39)));
        assert_eq!(row["bytes"], json!(bytes));
        assert!(row["load_s"].as_f64().unwrap() > 0.0);
        for key in ["device_peak_bytes", "host_peak_anon_bytes", "host_peak_rss_bytes", "mapped_peak_bytes"] {
            assert!(row[key].is_u64() && row[format!("predicted_{key}")].is_u64(), "{key}: {row}");
        }
        assert_eq!(row["device_peak_bytes"], row["predicted_device_peak_bytes"], "{row}");
        assert!(row["measured_by"].is_string() && row["notebook_rss_bytes"].is_u64(), "{row}");
        digests.push(row["digest"].clone());
    }
    assert!(digests[0].is_string());
    assert_eq!(digests, vec![digests[0].clone(); STRATEGIES.len()]);
    assert_eq!(ok_json("load --json", &[&path]).get("digest"), None);
    let (shown, _) = ok("load --digest", &[&path]);
    assert!(shown.starts_with("39 tensors, ") && shown.contains(digests[0].as_str().unwrap()), "{shown}");
}

#[test]
fn auto_takes_what_suits_the_intent_and_says_so() {
    let path = gpt2("notebook.safetensors");
    let of = |words: &str| ok_json(&format!("load --json --digest {words}"), &[&path]);
    let (private, read_only, refilled) = (of(""), of("--intent read-only --touch"), of("--refill"));
    let strategies = [&private, &read_only, &refilled].map(|it| it["strategy"].as_str().unwrap().to_owned());
    assert_eq!(strategies, ["stream", "mmap", "existing"]);
    assert_eq!(private["digest"], read_only["digest"]);
    assert_eq!(private["digest"], refilled["digest"]);
    assert_eq!((&private["io"], &read_only["weights_bytes"]), (&json!("buffered"), &json!(0)));
    let direct = of("--io direct");
    assert_eq!((&direct["io"], &direct["digest"]), (&json!("direct"), &private["digest"]));
}

#[test]
fn a_budget_that_is_too_small_names_the_smallest_that_works_and_that_one_does() {
    let path = gpt2("notebook.safetensors");
    for words in ["", "--strategy per-tensor", "--strategy naive", "--dtype bf16", "--intent read-only"] {
        let failed = fails(1, &format!("load --host-budget 1000 {words}"), &[&path]);
        let needed: u64 = failed.split("of ").find_map(|it| it.split(" bytes").next()?.parse().ok()).unwrap();
        assert!(failed.contains("a host budget") && failed.contains("1000 are allowed"), "{failed}");
        let row = ok_json(&format!("load --json {words} --host-budget {needed}"), &[&path]);
        assert_eq!(row["host_budget_bytes"], json!(needed));
        let failed = fails(1, &format!("load --host-budget {} {words}", needed - 1), &[&path]);
        assert!(failed.contains(&needed.to_string()), "{failed}");
    }
    let failed = fails(1, "load --device-budget 100KiB", &[&path]);
    assert!(failed.contains("a device budget") && failed.contains("tensor `"), "{failed}");
    fails(2, "load --host-budget much", &[&path]);
}

#[test]
fn a_plan_says_what_a_load_then_does_and_reads_no_tensor() {
    let path = gpt2("notebook.safetensors");
    for words in [
        "",
        "--strategy per-tensor",
        "--intent read-only",
        "--dtype f16 --threads 2",
        "--strategy sequential",
    ] {
        let plan = ok_json(&format!("plan --json {words}"), &[&path]);
        let row = ok_json(&format!("load --json {words}"), &[&path]);
        let keys = [
            "strategy",
            "predicted_host_peak_anon_bytes",
            "predicted_device_peak_bytes",
            "weights_bytes",
            "tensors",
        ];
        for key in keys {
            assert_eq!(plan[key], row[key], "{words} {key}");
        }
        assert_eq!(plan["files"][0]["io"], row["io"]);
    }
    let (table, _) = ok("plan", &[&path]);
    for word in ["reserve", "stream", "hand over", "overhead", "a budget of 64.0 MiB", "buffered"] {
        assert!(table.contains(word), "{word}: {table}");
    }
    // For a machine that is smaller than this one.
    let failed = fails(1, "plan --free-host 100KiB", &[&path]);
    assert!(failed.contains("free memory"), "{failed}");
    assert!(fails(1, "plan --device-budget 100KiB", &[&path]).contains("a device budget"));
    let (_, words) = ok("plan --free-device 100KiB", &[&path]);
    assert!(words.contains("warning: --free-device does nothing here"), "{words}");

    // 4 TB that are a hole: nothing is read, and no machine has the memory.
    let folder = TempDir::new().unwrap();
    let huge = folder.path().join("huge.safetensors");
    zeros(&huge, &[("t", &[1 << 20, 1 << 20])]);
    let plan = ok_json("plan --json --free-host 100TiB", &[&huge]);
    assert_eq!(plan["weights_bytes"], json!((4u64 << 40) + 4096));
    assert!(fails(1, "load", &[&huge]).contains("free memory"));
}

#[test]
fn casts_change_what_their_rules_name() {
    let path = gpt2("notebook.safetensors");
    let whole = ok_json("load --json", &[&path])["bytes"].as_u64().unwrap();
    assert_eq!(ok_json("load --json --dtype bf16", &[&path])["bytes"], json!(whole / 2));
    let some = ok_json("load --json --dtype *.weight=f16,keep", &[&path])["bytes"].as_u64().unwrap();
    assert!(whole / 2 < some && some < whole, "{some}");
    let (_, words) = ok("load --json --dtype nothing.like.this=f16", &[&path]);
    assert!(words.contains("nothing.like.this"), "{words}");
    assert!(fails(2, "load --dtype b16", &[&path]).contains("bf16"));
}

#[test]
fn a_tour_of_the_formats_keeps_the_digest() {
    for (name, stations) in [
        ("state_dict.pt", &["b.safetensors", "c", "d.pth", "e/", "f.safetensors", "g.pth"][..]),
        ("all_dtypes.safetensors", &["b.pth", "c", "d.safetensors", "e.bin"]),
        ("layouts.pt", &["b", "c.pth", "d.safetensors"]),
        ("odd_names.safetensors", &["b.pth", "c", "d.pt"]),
        ("tied.pt", &["b.pth", "c.safetensors"]),
    ] {
        let folder = TempDir::new().unwrap();
        let mut from = sample(name);
        let digest = digest_of(&from);
        for station in stations {
            let to = folder.path().join(station);
            let (shown, words) = ok("convert", &[&from, &to]);
            assert_eq!(shown, "", "the file is the result; words go to stderr");
            assert!(words.contains(station), "{words}");
            assert_eq!(digest_of(&to), digest, "{name} as {station}");
            from = to;
        }
        assert_eq!(names_in(folder.path()).len(), stations.len(), "something is left over");
    }
}

#[test]
fn whose_fault_it_is_shows_in_the_exit_code() {
    let folder = TempDir::new().unwrap();
    let file = sample("state_dict.pt");
    for words in ["", "load", "convert", "gpt2"] {
        fails(2, words, &[]);
    }
    for words in
        ["load --strategy magic", "load --device abacus", "inspect --hash md5", "gpt2 save --size huge"]
    {
        fails(2, words, &[&file]);
    }
    let (nowhere, empty, pipe) =
        (folder.path().join("nowhere.pth"), folder.path().join("empty"), folder.path().join("pipe"));
    fs::create_dir(&empty).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for command in ["inspect", "load", "compare", "gpt2 forward", "gpt2 generate"] {
        assert!(fails(1, command, &[&nowhere]).contains("nowhere.pth"));
        assert!(fails(1, command, &[&empty]).contains("empty"));
        // Opened like a file it would hang.
        assert!(fails(1, command, &[&pipe]).contains("found a pipe"));
    }
}

#[test]
fn what_is_in_the_way_stays_unless_forced() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::copy(sample("state_dict.pt"), at("in.pt")).unwrap();
    fs::write(at("there.pth"), "precious").unwrap();
    std::os::unix::fs::symlink(at("in.pt"), at("link.pt")).unwrap();
    let before = names_in(folder.path());
    assert!(fails(1, "convert", &[&at("in.pt"), &at("there.pth")]).contains("--force"));
    assert!(fails(1, "gpt2 save --size tiny", &[&at("there.pth")]).contains("--force"));
    for same in ["in.pt", "link.pt"] {
        assert!(fails(1, "convert --force", &[&at("in.pt"), &at(same)]).contains("same file"));
    }
    assert!(fails(1, "convert", &[&at("in.pt"), &at("no/such/out.pth")]).contains("no/such/out.pth"));
    assert!(fails(1, "convert", &[&at("in.pt"), &at("out.gguf")]).contains(".gguf"));
    assert_eq!(fs::read(at("there.pth")).unwrap(), b"precious");
    assert_eq!(names_in(folder.path()), before);
    ok("convert --force", &[&at("in.pt"), &at("there.pth")]);
    assert_eq!(digest_of(&at("there.pth")), digest_of(&at("in.pt")));
    assert_eq!(names_in(folder.path()), before);
}

#[test]
fn an_interrupted_save_leaves_nothing_behind() {
    let folder = TempDir::new().unwrap();
    let input = folder.path().join("in.safetensors");
    zeros(&input, &[("w", &[1 << 28])]);
    for (words, name) in [("convert", "out.pth"), ("convert", "out"), ("convert --to safetensors", "out")] {
        let mut command = unladen();
        command.args(words.split_whitespace()).arg(&input).arg(folder.path().join(name));
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        let began = Instant::now();
        while names_in(folder.path()).len() == 1 && began.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(1));
        }
        let interrupted = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(interrupted.success());
        let output = child.wait_with_output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{words}");
        assert!(words.contains("cancelled"), "{words}");
        assert_eq!(names_in(folder.path()), ["in.safetensors"]);
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_program_quietly() {
    let mut command = unladen();
    command.args(["inspect", "--json"]).arg(sample("many.pt")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
    // Where nobody listens to the words, the exit code still tells.
    let mut child = unladen().args(["load", "/nowhere"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn a_result_that_cannot_be_written_is_no_success() {
    let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") else { return };
    let output = unladen().arg("inspect").arg(sample("state_dict.pt")).stdout(full).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("cannot write the result"), "{words}");
}

#[test]
fn names_that_steer_a_terminal_are_shown_and_not_obeyed() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("red\x1b[31m.safetensors");
    zeros(&file, &[("w\x1b[31m", &[2])]);
    let (shown, _) = ok("inspect", &[&file]);
    assert!(shown.contains("w\\u{1b}[31m"), "{shown}");
    assert!(fails(1, "gpt2 forward", &[&file]).contains("red\\u{1b}[31m"));
    ok("compare --strategies stream,per-tensor --dir", &[&folder.path().join("bench"), &file]);
}
