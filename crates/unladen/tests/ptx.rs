//! The PTX that is committed is what its source becomes: nobody changed the one without the other.

use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What each source includes.
const HEADER: &str = "unladen/src/cuda/kernels/widen.h";
const SOURCES: &[&str] = &["unladen/src/cuda/kernels/cast.cu", "unladen-gpt2/src/gpu/kernels/gpt2.cu"];

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

#[test]
fn ptx_says_of_which_source_it_was_made_and_asks_for_no_newer_driver() {
    for name in SOURCES {
        let source = crates().join(name);
        let ptx = fs::read_to_string(source.with_extension("ptx")).unwrap();
        let both = [crates().join(HEADER), source].map(|it| fs::read(it).unwrap()).concat();
        let hash: String = Sha256::digest(both).iter().map(|it| format!("{it:02x}")).collect();
        let first = ptx.lines().next().unwrap();
        assert!(
            first.ends_with(&hash),
            "{name} is another than the PTX was made of: run scripts/ptx\n{first}"
        );
        // Drivers from 525 on take this version, and compile this target for every GPU since.
        for line in [".version 8.0", ".target sm_60", ".address_size 64"] {
            assert!(ptx.lines().any(|it| it == line), "{name}: no line {line}");
        }
    }
}

/// The script gets the compiler, so not every machine has it; `./check` runs the script by itself.
#[test]
#[allow(clippy::print_stderr)]
fn ptx_is_what_its_compiler_makes_where_there_is_one() {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let compiler = target.join("nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
    if !compiler.exists() {
        eprintln!("NOT TESTED: there is no {}: run scripts/ptx --check", compiler.display());
        return;
    }
    let script = crates().parent().unwrap().join("scripts/ptx");
    let output = Command::new(script).arg("--check").env("UNLADEN_NVRTC", compiler).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.starts_with("as compiled"), "{said}");
}
