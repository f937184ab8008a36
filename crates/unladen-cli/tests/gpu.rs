//! The command line with GPUs, over the fake driver, and without a driver.
#![cfg(feature = "cuda")]

#[path = "../../unladen/tests/common/fake_driver.rs"]
mod fake_driver;

#[path = "common/program.rs"]
mod program;

use fake_driver::{Fake, Report};
use program::{json, json_lines, run, text, tiny, unladen};
use serde_json::Value;
use std::{
    fs::{self, OpenOptions},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

#[test]
fn a_load_to_gpus_has_the_hosts_digest_and_says_what_each_took() {
    let Some(fake) = Fake::new() else { return };
    let (path, _folder) = tiny("tiny.pth");
    let path = text(&path);
    let on_host = json(&mut unladen(&["load", path, "--digest", "--json"]));
    let map = "trf_blocks.0=cuda:1,tok_emb=host";
    let words = ["load", path, "--digest", "--json", "--device", "cuda:0", "--device-map", map];
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
    assert_eq!(devices[1]["driver_peak_bytes"], devices[1]["predicted_driver_peak_bytes"]);
    assert_eq!(devices[0]["predicted_driver_peak_bytes"], Value::Null);
    fake.report().assert_clean();
}

#[test]
fn logits_computed_on_a_gpu_are_those_of_the_host() {
    let Some(fake) = Fake::new() else { return };
    let (path, _folder) = tiny("tiny.pth");
    let path = text(&path);
    let words = ["gpt2", "forward", path, "--tokens", "1,2,3", "--json"];
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
fn a_forward_pass_runs_where_the_tensors_go_and_what_it_cannot_take_is_refused_before_anything_is_loaded() {
    let Some(fake) = Fake::new() else { return };
    let (path, _folder) = tiny("tiny.pth");
    let forward = |words: &[&str]| {
        let mut command = unladen(&["gpt2", "forward", text(&path), "--json"]);
        run(fake.set_up(command.args(words)))
    };
    // Kernels are compiled for the GPU that computes, and for no other.
    let (code, _, err) = forward(&["--device", "cuda:0", "--device-map", "*=cuda:1"]);
    assert_eq!(code, 0, "{err}");
    let report = fake.report();
    assert_eq!(report.n_calls("cuModuleLoadData"), 1);
    assert_eq!(report.0["gpus"][0]["taken_bytes"]["peak"], 0);
    report.assert_clean();

    let fake = Fake::new().unwrap();
    for (words, expected, hint) in [
        (&["--device", "cuda:0", "--device-map", "tok_emb=cuda:1"][..], "found cuda:0", "--device-map"),
        (&["--device", "cuda:0", "--device-map", "trf_blocks.1=host"], "found host", "--device-map"),
        (&["--device", "cuda:0", "--dtype", "f64"], "found float64", "--dtype f32"),
        (&["--dtype", "bf16"], "found bfloat16", "--dtype f32"),
    ] {
        let mut command = unladen(&["gpt2", "forward", text(&path)]);
        let (code, out, err) = run(fake.set_up(command.args(words)));
        assert_eq!((code, out.as_str()), (1, ""), "{words:?}: {err}");
        let hint_line = err.lines().find(|it| it.starts_with("hint: ")).unwrap();
        assert!(err.contains(expected) && hint_line.contains(hint), "{words:?}: {err}");
        assert!(!err.contains("loaded with") && !fake.has_report(), "{words:?} was loaded: {err}");
    }
    // Casts to what can be taken are for the pass too, and so is a map that spreads nothing.
    let (code, out, err) = forward(&["--device", "cuda:1", "--device-map", "*=host"]);
    assert_eq!(code, 0, "{err}");
    assert!(serde_json::from_str::<Value>(&out).unwrap()["logits"].is_array());
    let (code, _, err) = forward(&["--device", "cuda:0", "--dtype", "bf16"]);
    assert_eq!(code, 0, "{err}");
}

#[test]
fn strategies_are_compared_on_a_gpu_and_the_leanest_is_the_models_size() {
    let Some(fake) = Fake::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let dir = text(folder.path());
    let words =
        ["compare", "--gpt2", "tiny", "--dir", dir, "--device", "cuda:0", "--strategies", "meta,stream"];
    let compared = |more: &[&str]| json_lines(fake.set_up(unladen(&words).args(more).arg("--json")));
    let rows = compared(&[]);
    let peak = |row: &Value| row["device_peak_bytes"].as_u64().unwrap();
    let bytes = rows[0]["bytes"].as_u64().unwrap();
    assert!(peak(&rows[0]) >= 2 * bytes, "meta holds two of everything: {}", rows[0]);
    assert!(peak(&rows[1]) - bytes <= bytes / 500, "stream holds one: {}", rows[1]);
    for row in &rows {
        assert_eq!(row["digest"], row["file_digest"]);
        // The driver gives memory out 2 MiB at a time.
        let over_bytes = row["driver_peak_bytes"].as_u64().unwrap() - peak(row);
        assert!(over_bytes <= 4 << 20, "{row}");
    }
    // What the user asked of loads is asked of each.
    let more = ["--dtype", "bf16", "--device-map", "out_head=host", "--io", "buffered", "--threads", "2"];
    for row in compared(&more) {
        assert_eq!((&row["digest"], row["bytes"].as_u64()), (&row["file_digest"], Some(bytes / 2)), "{row}");
        assert_ne!(row["digest"], rows[0]["digest"]);
        let devices: Vec<_> = row["devices"].as_array().unwrap().iter().map(|it| &it["device"]).collect();
        assert_eq!(devices, ["host", "cuda:0"]);
        assert!(row["forward_s"].is_null(), "on several devices there is no forward pass: {row}");
    }
    // A table on a GPU has its driver's figure, one on the host is as wide as it was.
    for (device, has_driver) in [("cuda:0", true), ("host", false)] {
        let words = ["compare", "--gpt2", "tiny", "--dir", dir, "--strategies", "stream", "--device", device];
        let (code, table, err) = run(fake.set_up(&mut unladen(&words)));
        assert_eq!(code, 0, "{err}");
        assert_eq!(table.contains("predicted / ledger / driver"), has_driver, "{table}");
    }
}

#[test]
fn loads_to_a_gpu_that_agree_with_each_other_and_not_with_the_file_are_an_error() {
    let Some(fake) = Fake::new() else { return };
    let (path, folder) = tiny("tiny.pth");
    let dir = folder.path().join("bench");
    let words =
        ["compare", text(&path), "--dir", text(&dir), "--device", "cuda:0", "--strategies", "per-tensor"];
    let (code, _, err) = run(fake.set_up(&mut unladen(&words)));
    assert_eq!(code, 0, "{err}");
    // One bit of what is kept there and loaded next time.
    let kept = fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
    let file = fs::read_dir(kept)
        .unwrap()
        .map(|it| it.unwrap().path())
        .max_by_key(|it| it.metadata().unwrap().len());
    let file = file.unwrap();
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (code, table, err) = run(fake.set_up(&mut unladen(&words)));
    assert_eq!(code, 1, "{table}");
    assert!(table.contains("per-tensor"), "{table}");
    let expected =
        ["expected the digest of the file's own tensors, ", "found that of `per-tensor`, ", "\nhint: "];
    assert!(expected.iter().all(|it| err.contains(it)), "{err}");
}

#[test]
fn every_command_that_loads_says_why_the_driver_would_not_pin() {
    let Some(fake) = Fake::new() else { return };
    let (path, folder) = tiny("tiny.pth");
    let (path, dir) = (text(&path), text(folder.path()));
    let load: &[&str] = &["load", path, "--json"];
    let forward: &[&str] = &["gpt2", "forward", path, "--tokens", "1", "--json"];
    let compare: &[&str] = &["compare", path, "--dir", dir, "--strategies", "stream", "--json"];
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
    let (path, folder) = tiny("tiny.pth");
    let path = text(&path);
    // A folder without libraries, and nothing else to look into.
    let without = |words: &[&str]| {
        let mut command = unladen(words);
        command.env_remove("LD_LIBRARY_PATH");
        run(&mut command)
    };
    let (code, _, err) = without(&["load", path, "--device", "cuda:0"]);
    if code != 0 {
        assert_eq!(code, 1);
        assert!(err.contains("error: cuda") && err.contains("hint: "), "{err}");
    }
    if code != 0 {
        let dir = folder.path().to_str().unwrap();
        let n_files = || fs::read_dir(dir).unwrap().count();
        let n_before = n_files();
        let (code, _, err) = without(&["compare", "--gpt2", "tiny", "--dir", dir, "--device", "cuda:0"]);
        assert_eq!((code, n_files()), (1, n_before), "nothing is saved for it: {err}");
        assert!(err.contains("error: cuda"), "{err}");
    }
    let (code, _, err) = without(&["load", path, "--refill", "--device", "cuda:0"]);
    assert_eq!(code, 1);
    assert!(err.contains("found cuda:0") && err.contains("hint: leave --refill out"), "{err}");
    let (code, _, err) = without(&["load", path, "--free-singly"]);
    assert_eq!(code, 0);
    assert!(err.starts_with("warning: --free-singly does nothing here"), "{err}");
    let (code, _, err) = without(&["gpt2", "generate", path, "--prompt", "a", "--device", "cuda:0"]);
    assert_eq!(code, 1);
    assert!(err.contains("on the host only") && err.contains("hint: use --device host"), "{err}");
    let plan = |free: &str| without(&["plan", path, "--json", "--device", "cuda:3", "--free-device", free]);
    let (code, out, err) = plan("1GiB");
    assert_eq!(code, 0, "{err}");
    let planned: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(planned["device"], "cuda:3");
    assert!(planned["overhead_bytes"].as_u64().unwrap() <= 64 << 20);
    assert_eq!(planned["devices"][0]["free_bytes"], 1 << 30);
    let (code, _, err) = plan("1MiB");
    assert_eq!(code, 1);
    assert!(err.contains("needs free memory of the GPU") && err.contains("but 1048576 are free"), "{err}");
    // That it is not here is said, and the plan is made.
    if without(&["load", path, "--device", "cuda:3"]).0 != 0 {
        assert!(planned["devices"][0]["why_absent"].as_str().unwrap().starts_with("cuda"), "{planned}");
        let (code, out, err) = without(&["plan", path, "--device", "cuda:3"]);
        assert_eq!(code, 0, "{err}");
        let line = out.lines().find(|it| it.starts_with("not here     cuda:3: ")).unwrap_or_default();
        assert!(line.contains("; this is a plan for one elsewhere that has room for it"), "{out}");
        let (_, out, _) = without(&["plan", path, "--device", "cuda:3", "--free-device", "1GiB"]);
        assert!(out.contains("; this is a plan for one elsewhere with 1.00 GiB free"), "{out}");
    }
    for (words, expected) in [
        (["--device", "cuda:99"], "no such device"),
        (["--device", "gpu"], "it is `host`, or `cuda:0` to `cuda:31`; `unladen devices` lists those"),
        (["--device-map", "blocks"], "PATTERN=DEVICE"),
        (["--device-map", "blocks.9-1=cuda:0"], "the smaller number first"),
    ] {
        let (code, _, err) = without(&["load", path, words[0], words[1]]);
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(expected), "{err}");
    }
}

/// Starts a load whose copies take their time, and waits until some are under way.
fn started(fake: &Fake, path: &str) -> std::process::Child {
    let mut command = unladen(&["load", path, "--device", "cuda:0", "--host-budget", "8MiB", "--digest"]);
    let command = fake.set_up(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut load = command.spawn().unwrap();
    let began = Instant::now();
    let is_copying = || fake.has_report() && fake.report().0["copies"]["peak_in_flight"].as_u64() >= Some(1);
    while !is_copying() {
        assert!(load.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(120));
        thread::sleep(Duration::from_millis(1));
    }
    load
}

#[test]
fn a_load_that_is_interrupted_says_so_and_leaves_nothing_on_the_gpu() {
    let (path, _folder) = tiny("tiny.safetensors");
    for signal in ["-INT", "-TERM"] {
        let Some(fake) = Fake::new() else { return };
        fake.tell("delay_us 100000");
        let load = started(&fake, text(&path));
        assert!(Command::new("kill").args([signal, &load.id().to_string()]).status().unwrap().success());
        let output = load.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(130), 0), "{err}");
        assert!(err.contains("tiny.safetensors: cancelled\nhint: "), "{err}");
        fake.report().assert_clean();
    }
}

#[test]
fn a_file_that_is_cut_off_before_or_during_a_load_is_an_error_that_leaves_nothing_on_the_gpu() {
    for name in ["tiny.safetensors", "tiny.pth"] {
        let Some(fake) = Fake::new() else { return };
        let (path, _folder) = tiny(name);
        let cut_to =
            |len_bytes| OpenOptions::new().write(true).open(&path).unwrap().set_len(len_bytes).unwrap();
        let len_bytes = fs::metadata(&path).unwrap().len();
        // No copy ends before the file is cut, so none of the later pieces was read.
        fake.tell("hold on");
        let load = started(&fake, text(&path));
        cut_to(len_bytes / 2);
        fake.tell("");
        let output = load.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{err}");
        assert!(err.starts_with("error: ") && err.contains(name) && err.contains("\nhint: "), "{err}");
        fake.report().assert_clean();

        let (code, out, err) = run(fake.set_up(&mut unladen(&["load", text(&path), "--device", "cuda:0"])));
        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert!(err.starts_with("error: ") && err.contains(name) && err.contains("\nhint: "), "{err}");
        fake.report().assert_clean();
    }
}

#[test]
fn a_plan_and_a_load_compare_what_the_driver_will_take_with_what_is_free() {
    const TOTAL_BYTES: u64 = 8 << 30;
    let Some(fake) = Fake::new() else { return };
    let (path, _folder) = tiny("tiny.pth");
    let path = text(&path);
    let command = |name, words: &[&str]| {
        let mut command = unladen(&[name, path, "--device", "cuda:1"]);
        command.args(words);
        command
    };
    let mut needed = Vec::new();
    for words in [&[][..], &["--free-singly"], &["--free-singly", "--strategy", "per-tensor"]] {
        fake.tell("");
        let planned = json(fake.set_up(command("plan", words).arg("--json")));
        let device = &planned["devices"][0];
        assert_eq!((&device["free_bytes"], &device["why_absent"]), (&TOTAL_BYTES.into(), &Value::Null));
        let [asked_bytes, needed_bytes] =
            ["predicted_peak_bytes", "predicted_driver_peak_bytes"].map(|it| device[it].as_u64().unwrap());
        assert!(asked_bytes < needed_bytes && needed_bytes % (2 << 20) == 0, "{device}");
        needed.push(needed_bytes);
        // A budget is bytes, and what is free is granules.
        let [budget, free] = [asked_bytes, needed_bytes].map(|it| it.to_string());
        let both = ["--device-budget", &budget, "--free-device", &free];
        let (code, out, err) = run(fake.set_up(command("plan", words).args(both)));
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("for which the driver takes ") && !out.contains("not here"), "{out}");
        let less = (needed_bytes - 1).to_string();
        let expected = format!("granules of 2 MiB) of {needed_bytes} bytes, but {less} are free");
        let (code, _, err) = run(fake.set_up(command("plan", words).args(["--free-device", &less])));
        assert_eq!(code, 1);
        assert!(err.contains(&expected), "{err}");

        // A load finds the same by the driver's own figure, and takes nothing.
        for (free_bytes, expected_code) in [(needed_bytes - 1, 1), (needed_bytes, 0)] {
            fake.tell(&format!("used {}", TOTAL_BYTES - free_bytes));
            let (code, _, err) = run(fake.set_up(&mut command("load", words)));
            assert_eq!(code, expected_code, "{err}");
            assert!(code == 0 || err.contains(&expected) && err.contains("\nhint: "), "{err}");
            let report = fake.report();
            assert_eq!(report.n_calls("cuMemAlloc_v2") > 0, code == 0);
            report.assert_clean();
        }
    }
    assert!(needed[0] < needed[1], "each by itself takes more: {needed:?}");

    // One that this machine does not have.
    let planned = json(fake.set_up(&mut unladen(&["plan", path, "--json", "--device", "cuda:7"])));
    let device = &planned["devices"][0];
    assert_eq!(device["free_bytes"], Value::Null);
    assert!(device["why_absent"].as_str().unwrap().starts_with("cuda:7: "), "{device}");
}

#[test]
fn a_rule_that_decides_about_nothing_is_told() {
    let Some(fake) = Fake::new() else { return };
    let (path, _folder) = tiny("tiny.pth");
    let path = text(&path);
    let (code, _, err) = run(fake.set_up(&mut unladen(&[
        "load",
        path,
        "--device-map",
        "trf_blocks.0=cuda:0,nothing.*=cuda:1",
    ])));
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("`nothing.*=cuda:1` decides about no tensor"), "{err}");
    Report::assert_clean(&fake.report());
}
