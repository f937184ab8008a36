//! Distributed checkpoints, opened and loaded in every way.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use unladen_fuzz::{dcp, promises::Scratch};

thread_local!(static SCRATCH: Scratch = Scratch::default());

fuzz_target!(|data: &[u8]| {
    if let Ok(files) = dcp::folder(&mut Unstructured::new(data)) {
        SCRATCH.with(|it| it.keeps_its_promises_of(&files, None));
    }
});
