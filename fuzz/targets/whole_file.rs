//! Any bytes at all, beginning with the committed samples and hostile files: opened and loaded in every way.
#![no_main]

use libfuzzer_sys::fuzz_target;
use unladen_fuzz::promises::Scratch;

thread_local!(static SCRATCH: Scratch = Scratch::default());

fuzz_target!(|data: &[u8]| SCRATCH.with(|it| it.keeps_its_promises(data)));
