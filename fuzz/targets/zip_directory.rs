//! Archives with lies in their directory, around a good pickle or an odd one; one in eight tells the truth.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use std::path::Path;
use unladen_fuzz::{
    archive, damage, one_in, pickle,
    promises::{Scratch, opens},
    truth,
};

thread_local!(static SCRATCH: Scratch = Scratch::default());

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    if let Ok(true) = one_in(&mut u, 8) {
        if let Ok(truth) = truth::zip(&mut u) {
            SCRATCH.with(|it| it.gives_back(&truth));
        }
        return;
    }
    let mut make = || -> arbitrary::Result<Vec<u8>> {
        let mut records = archive::records_of(pickle::stream(&mut u)?);
        archive::disturb(&mut u, &mut records)?;
        let mut bytes = archive::write(&records, &mut u)?;
        damage(&mut u, &mut bytes)?;
        Ok(bytes)
    };
    if let Ok(bytes) = make() {
        // Most are refused, and that is soon told from memory.
        if opens(Path::new("fuzzed.pt"), &bytes).is_ok() {
            SCRATCH.with(|it| it.keeps_its_promises(&bytes));
        }
    }
});
