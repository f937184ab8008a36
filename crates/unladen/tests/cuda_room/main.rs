//! The CUDA room over a fake driver that reads a copy's source only when the copy runs, refuses what a real one would, and
//! knows afterwards what was not given back.
#![cfg(feature = "cuda")]

mod devices;
mod errors;
#[path = "../common/fake_driver.rs"]
mod fake_driver;
mod memory;
mod slots;
mod upload;

use std::path::Path;
use unladen::{
    Error,
    cuda::{Context, Lines, Memory, Slot, SlotCopy},
    memory::{HostBuffer, Reservation},
};

const SLOT_BYTES: u64 = 64 << 10;

fn context(ordinal: u32) -> Context {
    Context::open(ordinal).unwrap()
}

fn memory(context: &Context, len_bytes: u64) -> Memory {
    Memory::new(context, Reservation::uncounted(len_bytes)).unwrap()
}

fn buffer(len_bytes: u64) -> HostBuffer {
    HostBuffer::new(Reservation::uncounted(len_bytes), Path::new("test")).unwrap()
}

/// A slot with bytes in it.
fn slot(context: &Context, seed: u64) -> Slot {
    let mut slot = Slot::new(buffer(SLOT_BYTES), std::slice::from_ref(context)).unwrap();
    slot.as_mut_slice().copy_from_slice(&bytes(SLOT_BYTES, seed));
    slot
}

fn bytes(len_bytes: u64, seed: u64) -> Vec<u8> {
    (0..len_bytes).map(|it| ((it * 7 + it / 253 + seed * 31) % 251) as u8).collect()
}

fn read(memory: &Memory, start_byte: u64, len_bytes: u64) -> Vec<u8> {
    let mut target = vec![0; len_bytes as usize];
    memory.read(start_byte, &mut target).unwrap();
    target
}

/// All of a slot, to a place in memory.
fn whole(target: &Memory, target_byte: u64) -> SlotCopy<'_> {
    SlotCopy { slot_byte: 0, len_bytes: SLOT_BYTES, target, target_byte, lines: Lines::ONE }
}

fn message(error: &Error) -> String {
    assert_eq!(error.kind(), "Device", "{error}");
    error.to_string()
}
