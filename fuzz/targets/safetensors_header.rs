//! safetensors headers with lies, opened and loaded in every way; one file in eight tells the truth.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use unladen_fuzz::{damage, one_in, promises::Scratch, safetensors, truth};

thread_local!(static SCRATCH: Scratch = Scratch::default());

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    if let Ok(true) = one_in(&mut u, 8) {
        if let Ok(truth) = truth::safetensors(&mut u) {
            SCRATCH.with(|it| it.gives_back(&truth));
        }
        return;
    }
    let mut make = || -> arbitrary::Result<Vec<u8>> {
        let mut bytes = safetensors::file(&mut u)?;
        damage(&mut u, &mut bytes)?;
        Ok(bytes)
    };
    if let Ok(bytes) = make() {
        SCRATCH.with(|it| it.keeps_its_promises(&bytes));
    }
});
