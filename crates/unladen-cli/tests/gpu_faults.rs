//! `unladen gpu-faults` and what `unladen load` says of a GPU, with the fake driver.
#![cfg(feature = "cuda")]

#[path = "../../unladen/tests/common/fake_driver.rs"]
mod fake_driver;

#[path = "common/program.rs"]
mod program;

use fake_driver::Fake;
use program::{run, text, tiny, unladen};
use serde_json::Value;

/// A GPU with memory for a few of these, as slow as one that somebody can look at.
const SMALL_GPU: &str = "memory 209715200\npoison off\ndelay_us 3000";

const STEPS: [&str; 7] = [
    "a load, to compare with",
    "out of memory at the first allocation",
    "a load after it",
    "out of memory in the middle",
    "a load after that",
    "cancelled in the middle",
    "a load at the end",
];

#[test]
fn after_every_fault_the_memory_is_free_and_the_next_load_is_right() {
    let Some(fake) = Fake::new() else { return };
    let (path, _folder) = tiny("tiny.safetensors");
    fake.tell(SMALL_GPU);
    let words = ["gpu-faults", text(&path), "--device", "cuda:1", "--host-budget", "8MiB"];
    let (code, out, err) = run(fake.set_up(&mut unladen(&[&words[..], &["--json"]].concat())));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let steps: Vec<Value> = out.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
    assert_eq!(steps.iter().map(|it| it["step"].as_str().unwrap()).collect::<Vec<_>>(), STEPS);
    for step in &steps {
        assert_eq!(step["is_kept"], true, "{step}");
        assert_eq!(step["free_bytes_after"], step["free_bytes_at_first"], "{step}");
    }
    let found = |number: usize| steps[number]["found"].as_str().unwrap();
    assert!(found(1).starts_with("0 B held, then cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"), "{}", found(1));
    // That of some tensors was there.
    assert!(found(3).contains(" MiB held, then cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"), "{}", found(3));
    assert!(found(5).starts_with("stopped after ") && found(5).ends_with(" of 33.2 MiB"), "{}", found(5));
    let report = fake.report();
    report.assert_clean();
    assert!(report.0["gpus"][1]["taken_bytes"]["peak"].as_u64() > Some(150_000_000), "{}", report.0);

    let (code, out, _) = run(fake.set_up(&mut unladen(&words)));
    assert_eq!((code, out.lines().filter(|it| it.starts_with("PASS: ")).count()), (0, 7), "{out}");
}

#[test]
fn memory_that_does_not_come_back_is_noticed() {
    let Some(fake) = Fake::new() else { return };
    let (path, _folder) = tiny("tiny.safetensors");
    // One load's stays with the driver, as if it had leaked: behind that of the first one, and of what filled the GPU.
    fake.tell(&format!("{SMALL_GPU}\nfail cuMemFree_v2 3 999"));
    let words = ["gpu-faults", text(&path), "--host-budget", "8MiB"];
    let (code, out, err) = run(fake.set_up(&mut unladen(&words)));
    assert_eq!(code, 1, "{out}");
    let verdicts: Vec<_> = out.lines().map(|it| &it[..4]).collect();
    assert_eq!(verdicts, ["PASS", "PASS", "FAIL", "FAIL", "FAIL", "FAIL", "FAIL"], "{out}");
    assert!(err.contains("expected steps that leave the GPU as they found it"), "{err}");
}

#[test]
fn a_load_tells_what_the_driver_took_apart_from_its_own() {
    let Some(fake) = Fake::new() else { return };
    let (path, _folder) = tiny("tiny.safetensors");
    let words = ["load", text(&path), "--device", "cuda:0", "--host-budget", "8MiB", "--json"];
    let (code, out, err) = run(fake.set_up(&mut unladen(&words)));
    assert_eq!((code, err.as_str()), (0, ""));
    let row: Value = serde_json::from_str(&out).unwrap();
    assert!(row["context_s"].as_f64().unwrap() > 0.0 && row["context_host_anon_bytes"].is_u64(), "{row}");
    fake.report().assert_clean();
    let (_, out, _) = run(&mut unladen(&["load", text(&path), "--json"]));
    let row: Value = serde_json::from_str(&out).unwrap();
    assert!(row["context_s"].is_null() && row["context_host_anon_bytes"].is_null(), "{row}");
}
