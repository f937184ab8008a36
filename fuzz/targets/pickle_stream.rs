//! Pickles of all opcodes in a good archive, opened and loaded in every way.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use unladen_fuzz::{archive, pickle, promises::Scratch};

thread_local!(static SCRATCH: Scratch = Scratch::default());

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    if let Ok(pickle) = pickle::stream(&mut u) {
        let bytes = archive::honest(&archive::records_of(pickle));
        SCRATCH.with(|it| it.keeps_its_promises(&bytes));
    }
});
