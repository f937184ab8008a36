//! Legacy files with lies in their tables, opened and loaded in every way; one in eight tells the truth.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use unladen_fuzz::{damage, legacy, one_in, promises::Scratch, truth};

thread_local!(static SCRATCH: Scratch = Scratch::default());

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    if let Ok(true) = one_in(&mut u, 8) {
        if let Ok(truth) = truth::legacy(&mut u) {
            SCRATCH.with(|it| it.gives_back(&truth));
        }
        return;
    }
    let mut make = || -> arbitrary::Result<Vec<u8>> {
        let mut bytes = legacy::file(&mut u)?;
        damage(&mut u, &mut bytes)?;
        Ok(bytes)
    };
    if let Ok(bytes) = make() {
        SCRATCH.with(|it| it.keeps_its_promises(&bytes));
    }
});
