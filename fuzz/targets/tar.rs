//! Tar archives of the first releases with lies in their tables, opened and loaded in every way.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use unladen_fuzz::{damage, promises::Scratch, tar};

thread_local!(static SCRATCH: Scratch = Scratch::default());

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let mut make = || -> arbitrary::Result<Vec<u8>> {
        let mut bytes = tar::file(&mut u)?;
        damage(&mut u, &mut bytes)?;
        Ok(bytes)
    };
    if let Ok(bytes) = make() {
        SCRATCH.with(|it| it.keeps_its_promises(&bytes));
    }
});
