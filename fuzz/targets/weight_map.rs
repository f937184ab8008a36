//! Weight maps with two shards, opened and loaded in every way.
#![no_main]

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use unladen_fuzz::{promises::Scratch, weight_map};

thread_local!(static SCRATCH: Scratch = Scratch::default());

fuzz_target!(|data: &[u8]| {
    SCRATCH.with(|it| {
        let outside = it.outside();
        if let Ok((files, opens)) =
            weight_map::folder(&mut Unstructured::new(data), &outside.to_string_lossy())
        {
            it.keeps_its_promises_of(&files, opens);
        }
    });
});
