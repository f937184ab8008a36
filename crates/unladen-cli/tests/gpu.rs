//! The command line with GPUs, over the fake driver, and without a driver.
#![cfg(feature = "cuda")]

#[path = "../../unladen/tests/common/fake_driver.rs"]
mod fake_driver;

use fake_driver::{Fake, Report};
use serde_json::Value;
use std::process::{Command, Stdio};

fn unladen(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unladen"));
    command.args(words).stdin(Stdio::null());
    command
}

/// Exit code, result and words.
fn run(command: &mut Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
    (output.status.code().unwrap(), out, err)
}

fn json(command: &mut Command) -> Value {
    let (code, out, err) = run(command);
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).unwrap()
}

/// A GPT-2 in a folder.
fn tiny() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.pth").to_str().unwrap().to_owned();
    assert_eq!(run(&mut unladen(&["gpt2", "save", &path, "--size", "tiny"])).0, 0);
    (folder, path)
}

#[test]
fn a_load_to_gpus_has_the_hosts_digest_and_says_what_each_took() {
    let Some(fake) = Fake::new() else { return };
    let (_folder, path) = tiny();
    let on_host = json(&mut unladen(&["load", &path, "--digest", "--json"]));
    let map = "trf_blocks.0=cuda:1,tok_emb=host";
    let words = ["load", &path, "--digest", "--json", "--device", "cuda:0", "--device-map", map];
    let on_gpus = json(fake.set_up(&mut unladen(&words)));
    assert_eq!(on_gpus["digest"], on_host["digest"]);
    let devices = on_gpus["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 3);
    for (device, name) in devices.iter().zip(["host", "cuda:0", "cuda:1"]) {
        assert_eq!(device["device"], name);
        assert!(device["weights_bytes"].as_u64().unwrap() > 1 << 20, "{device}");
        assert_eq!(device["peak_bytes"], device["predicted_peak_bytes"]);
    }
    assert_eq!(on_gpus["is_pinned"], true);
    // What the driver says is in its own steps of 2 MiB, and nothing for the host.
    assert_eq!(devices[0]["driver_peak_bytes"], Value::Null);
    assert!(devices[1]["driver_peak_bytes"].as_u64() >= devices[1]["peak_bytes"].as_u64());
    fake.report().assert_clean();
}

#[test]
fn logits_computed_on_a_gpu_are_those_of_the_host() {
    let Some(fake) = Fake::new() else { return };
    let (_folder, path) = tiny();
    let words = ["gpt2", "forward", &path, "--tokens", "1,2,3", "--json"];
    let logits = |it: Value| -> Vec<f64> {
        it["logits"].as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect()
    };
    let on_host = logits(json(&mut unladen(&words)));
    let mut command = unladen(&words);
    let on_gpu = logits(json(fake.set_up(command.args(["--device", "cuda:1"]))));
    assert_eq!(on_host.len(), on_gpu.len());
    let largest = on_host.iter().fold(0f64, |max, it| max.max(it.abs()));
    let apart = on_host.iter().zip(&on_gpu).fold(0f64, |max, (one, other)| max.max((one - other).abs()));
    assert!(apart <= 1e-4 * largest, "{apart} of {largest}");
    fake.report().assert_clean();

    let mut command = unladen(&words);
    let spread = command.args(["--device", "cuda:0", "--device-map", "tok_emb=host"]);
    let (code, _, err) = run(fake.set_up(spread));
    assert_eq!(code, 1);
    assert!(err.contains("on one device") && err.contains("hint: "), "{err}");
}

#[test]
fn strategies_are_compared_on_a_gpu_and_the_leanest_is_the_models_size() {
    let Some(fake) = Fake::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let words =
        ["compare", "--gpt2", "tiny", "--dir", dir, "--device", "cuda:0", "--strategies", "meta,stream"];
    let mut command = unladen(&words);
    let (code, out, err) = run(fake.set_up(command.arg("--json")));
    assert_eq!(code, 0, "{err}");
    let rows: Vec<Value> = out.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
    let peak = |row: &Value| row["device_peak_bytes"].as_u64().unwrap();
    let bytes = rows[0]["bytes"].as_u64().unwrap();
    assert!(peak(&rows[0]) >= 2 * bytes, "meta holds two of everything: {}", rows[0]);
    assert!(peak(&rows[1]) - bytes <= bytes / 500, "stream holds one: {}", rows[1]);
    assert_eq!(rows[0]["digest"], rows[1]["digest"]);
}

#[test]
fn every_command_that_loads_says_why_the_driver_would_not_pin() {
    let Some(fake) = Fake::new() else { return };
    let (folder, path) = tiny();
    let dir = folder.path().to_str().unwrap();
    let load: &[&str] = &["load", &path, "--json"];
    let forward: &[&str] = &["gpt2", "forward", &path, "--tokens", "1", "--json"];
    let compare: &[&str] = &["compare", &path, "--dir", dir, "--strategies", "stream", "--json"];
    let warning = "warning: the driver would not pin the staging buffers, so the copies took longer: cuMemHostRegister: ";
    for (error, why, hint, commands) in [
        (
            2,
            "CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
            "look at `ulimit -l` (RLIMIT_MEMLOCK)",
            &[load, forward, compare][..],
        ),
        (801, "CUDA_ERROR_NOT_SUPPORTED (operation not supported)", "`dmesg` may say more", &[load]),
    ] {
        fake.tell(&format!("fail cuMemHostRegister_v2 1 {error} always"));
        for words in commands {
            let (code, out, err) = run(fake.set_up(unladen(words).args(["--device", "cuda:0"])));
            assert_eq!(code, 0, "{err}");
            assert!(err.contains(&format!("{warning}{why}; {hint}")), "{words:?}: {err}");
            assert_eq!(err.contains("ulimit"), error == 2, "{err}");
            if words[0] == "load" {
                let row: Value = serde_json::from_str(&out).unwrap();
                assert_eq!(row["is_pinned"], false);
                assert_eq!(row["why_pageable"], format!("cuMemHostRegister: {why}"));
            }
        }
    }
    fake.tell("");
    let (code, _, err) = run(fake.set_up(unladen(load).args(["--device", "cuda:0"])));
    assert_eq!((code, err.as_str()), (0, ""));
}

#[test]
fn without_a_driver_a_gpu_is_a_typed_error_and_can_be_planned_for() {
    let (folder, path) = tiny();
    // A folder without libraries, and nothing else to look into.
    let without = |words: &[&str]| {
        let mut command = unladen(words);
        command.env_remove("LD_LIBRARY_PATH");
        run(&mut command)
    };
    let (code, _, err) = without(&["load", &path, "--device", "cuda:0"]);
    if code != 0 {
        assert_eq!(code, 1);
        assert!(err.contains("error: cuda") && err.contains("hint: "), "{err}");
    }
    if code != 0 {
        let dir = folder.path().to_str().unwrap();
        let n_files = || std::fs::read_dir(dir).unwrap().count();
        let n_before = n_files();
        let (code, _, err) = without(&["compare", "--gpt2", "tiny", "--dir", dir, "--device", "cuda:0"]);
        assert_eq!((code, n_files()), (1, n_before), "nothing is saved for it: {err}");
        assert!(err.contains("error: cuda"), "{err}");
    }
    let (code, _, err) = without(&["gpt2", "generate", &path, "--prompt", "a", "--device", "cuda:0"]);
    assert_eq!(code, 1);
    assert!(err.contains("on the host only") && err.contains("hint: use --device host"), "{err}");
    let plan = |free: &str| without(&["plan", &path, "--json", "--device", "cuda:3", "--free-device", free]);
    let (code, out, err) = plan("1GiB");
    assert_eq!(code, 0, "{err}");
    let planned: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(planned["device"], "cuda:3");
    assert!(planned["overhead_bytes"].as_u64().unwrap() <= 64 << 20);
    let (code, _, err) = plan("1MiB");
    assert_eq!(code, 1);
    assert!(err.contains("device budget"), "{err}");
    for (words, expected) in [
        (["--device", "cuda:99"], "no such device"),
        (["--device", "gpu"], "it is `host`, or `cuda:0` to `cuda:31`; `unladen devices` lists those"),
        (["--device-map", "blocks"], "PATTERN=DEVICE"),
        (["--device-map", "blocks.9-1=cuda:0"], "the smaller number first"),
    ] {
        let (code, _, err) = without(&["load", &path, words[0], words[1]]);
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(expected), "{err}");
    }
}

#[test]
fn a_rule_that_decides_about_nothing_is_told() {
    let Some(fake) = Fake::new() else { return };
    let (_folder, path) = tiny();
    let (code, _, err) = run(fake.set_up(&mut unladen(&[
        "load",
        &path,
        "--device-map",
        "trf_blocks.0=cuda:0,nothing.*=cuda:1",
    ])));
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("`nothing.*=cuda:1` decides about no tensor"), "{err}");
    Report::assert_clean(&fake.report());
}
