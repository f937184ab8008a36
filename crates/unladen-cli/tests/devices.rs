//! `unladen devices`, with the fake driver and without one.
#![cfg(feature = "cuda")]

#[path = "../../unladen/tests/common/fake_driver.rs"]
mod fake_driver;

#[path = "common/program.rs"]
mod program;

use fake_driver::Fake;
use program::run;
use serde_json::{Value, json};
use std::{path::Path, process::Command};

fn unladen() -> Command {
    program::unladen(&["devices"])
}

fn assert_host(device: &Value) {
    assert_eq!(device["device"], "host");
    assert!(device["free_bytes"].as_u64().unwrap() > 1 << 20, "{device}");
}

#[test]
fn devices_lists_the_host_and_each_gpu() {
    let Some(fake) = Fake::new() else { return };
    fake.tell("memory 8589934592\nused 1073741824 1\ncompute 9 0\ndriver_version 12080");
    let (code, out, err) = run(fake.set_up(unladen().arg("--json")));
    assert_eq!((code, err.as_str()), (0, ""));
    let listing: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listing["cuda_version"], "12.8");
    // Of the machine that this runs on: the fake driver has no part in the kernel.
    let has_kernel_part = Path::new("/proc/driver/nvidia/version").exists();
    assert_eq!(listing["driver_version"].is_string(), has_kernel_part, "{listing}");
    let devices = listing["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 3);
    assert_host(&devices[0]);
    for (ordinal, used_bytes) in [(0u64, 0u64), (1, 1 << 30)] {
        let expected = json!({
            "device": format!("cuda:{ordinal}"),
            "name": format!("Fake GPU {ordinal}"),
            "total_bytes": 8u64 << 30,
            "free_bytes": (8u64 << 30) - used_bytes,
            "compute_capability": "9.0",
        });
        assert_eq!(devices[1 + ordinal as usize], expected);
    }
    fake.report().assert_clean();

    let (code, out, err) = run(fake.set_up(&mut unladen()));
    assert_eq!((code, err.as_str()), (0, ""));
    for words in ["host", "cuda:0", "cuda:1", "Fake GPU 1", "8.00 GiB", "7.00 GiB", "9.0", "CUDA 12.8"] {
        assert!(out.contains(words), "{words}: {out}");
    }
    assert_eq!(out.ends_with("driver       CUDA 12.8\n"), !has_kernel_part, "{out}");
}

#[test]
fn a_gpu_that_cannot_be_used_is_listed_and_the_reason_said() {
    let Some(fake) = Fake::new() else { return };
    fake.tell("fail cuDevicePrimaryCtxRetain 1 46");
    let (code, out, err) = run(fake.set_up(unladen().arg("--json")));
    let listing: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &listing["devices"][1]["free_bytes"]), (0, &Value::Null));
    assert!(listing["devices"][2]["free_bytes"].is_u64());
    assert!(err.starts_with("note: cuda:0: ") && err.contains("CUDA_ERROR_DEVICE_UNAVAILABLE"), "{err}");
}

#[test]
fn a_driver_that_sees_no_gpu_is_no_error_and_one_that_fails_is() {
    let Some(fake) = Fake::new() else { return };
    fake.tell("fail cuInit 1 100");
    let (code, out, err) = run(fake.set_up(unladen().arg("--json")));
    assert_eq!((code, err.lines().count()), (0, 1), "{err}");
    assert!(err.contains("no GPU that this process may see"), "{err}");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["devices"].as_array().unwrap().len(), 1);

    fake.tell("fail cuInit 1 803");
    let (code, out, err) = run(fake.set_up(unladen().arg("--json")));
    assert_eq!(code, 1, "{err}");
    assert_host(&serde_json::from_str::<Value>(&out).unwrap()["devices"][0]);
    assert!(err.starts_with("error: cuda: cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH ("), "{err}");
    assert!(err.contains("\nhint: ") && err.contains("reboot"), "{err}");
}

#[test]
fn the_bus_is_measured_by_copies_of_pinned_memory() {
    let Some(fake) = Fake::new() else { return };
    // More than a chunk, and no multiple of one.
    let words = ["--measure-bus", "cuda:1", "--bytes", "20000001", "--json"];
    let (code, out, err) = run(fake.set_up(unladen().args(words)));
    assert_eq!((code, err.as_str()), (0, ""));
    let measured: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&measured["device"], &measured["bytes"]), (&json!("cuda:1"), &json!(20_000_001)));
    assert_eq!(measured["is_pinned"], true);
    let mut seconds: Vec<f64> = serde_json::from_value(measured["seconds"].clone()).unwrap();
    seconds.sort_unstable_by(f64::total_cmp);
    assert_eq!((seconds.len(), measured["median_s"].as_f64()), (5, Some(seconds[2])));
    assert!((measured["gb_per_s"].as_f64().unwrap() - 0.020_000_001 / seconds[2]).abs() < 1e-9);
    let report = fake.report();
    report.assert_clean();
    // Three copies a round, six rounds.
    assert_eq!(report.n_calls("cuMemcpyHtoDAsync_v2"), 18);

    // What cannot be pinned is measured, and said.
    fake.tell("pinnable 0");
    let (code, out, err) = run(fake.set_up(unladen().args(words)));
    assert_eq!((code, &serde_json::from_str::<Value>(&out).unwrap()["is_pinned"]), (0, &json!(false)));
    let warning = "warning: the driver would not pin the host's memory, so the bus may be faster: cuMemHostRegister: \
                   CUDA_ERROR_OUT_OF_MEMORY (out of memory); look at `ulimit -l`";
    assert!(err.starts_with(warning), "{err}");

    let (code, out, err) = run(unladen().args(["--measure-bus", "host"]));
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("expected a GPU, such as cuda:0, found host"), "{err}");
}

#[allow(clippy::print_stderr)]
#[test]
fn without_a_driver_the_host_is_listed_and_one_line_says_what_to_do() {
    let (code, out, err) = run(unladen().arg("--json").env_remove("LD_LIBRARY_PATH"));
    assert_eq!(code, 0, "{err}");
    let listing: Value = serde_json::from_str(&out).unwrap();
    assert_host(&listing["devices"][0]);
    if !listing["cuda_version"].is_null() {
        eprintln!("NOT TESTED: this machine has an NVIDIA driver");
        return;
    }
    assert_eq!(listing["devices"].as_array().unwrap().len(), 1);
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.starts_with("note: cuda: there is no NVIDIA driver here: "), "{err}");
    assert!(err.contains("install the NVIDIA driver") && err.contains("--device host"), "{err}");
}
