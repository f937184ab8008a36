//! `unladen devices --measure-bus`: what the bus to a GPU brings at most, which is what loads to it are measured by.

use crate::{human, out, pinning};
use serde::Serialize;
use std::{collections::VecDeque, path::Path, time::Instant};
use unladen::{
    Device, Error, Result,
    cuda::{Context, InFlight, Lines, Memory, Slot, SlotCopy, Upload},
    error::Fault,
    memory::{self, HostBuffer, Reservation},
};

/// What a copy takes: as much as a load's copies take at most.
const CHUNK_BYTES: u64 = 8 << 20;

/// What is pinned at most: more than any processor's cache holds, so that the bytes come from memory, as a file's do.
const MAX_PINNED_BYTES: u64 = 1 << 30;

/// Rounds that count. One before them wakes the bus, which may rest in a slow state.
const N_ROUNDS: usize = 5;

#[derive(Serialize)]
struct Measured {
    device: String,
    /// What each round copied.
    bytes: u64,
    /// By copies of so many.
    chunk_bytes: u64,
    /// Out of so much host memory, over and over.
    pinned_bytes: u64,
    /// If not, the driver would not pin it, and this is no limit.
    is_pinned: bool,
    /// In the driver's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    why_pageable: Option<String>,
    /// Of each round.
    seconds: Vec<f64>,
    median_s: f64,
    /// At the median; 1 GB is 10^9 bytes.
    gb_per_s: f64,
}

pub(super) fn run(device: Device, len_bytes: u64, json: bool) -> Result<()> {
    let Device::Cuda(ordinal) = device else {
        let fault = Fault::new("a GPU, such as cuda:0", device.to_string());
        return Err(fault.hint("there is no bus to the host's own memory").mismatch());
    };
    let context = Context::open(ordinal)?;
    let measured = measure(&context, len_bytes.max(1))?;
    if json {
        out::result(&serde_json::to_string(&measured).expect("strings and numbers"));
    } else {
        out::result(&format!(
            "{}: {} in {} s, {:.2} GB/s (median of {N_ROUNDS}, pinned memory, copies of {})",
            measured.device,
            human::bytes(measured.bytes),
            human::seconds(measured.median_s),
            measured.gb_per_s,
            human::bytes(measured.chunk_bytes)
        ));
    }
    if let Some(why) = &measured.why_pageable {
        out::words(&pinning::warning("the host's memory", "the bus may be faster", why));
    }
    Ok(())
}

fn measure(context: &Context, len_bytes: u64) -> Result<Measured> {
    let chunk_bytes = CHUNK_BYTES.min(len_bytes);
    let spare_bytes = memory::available_bytes().map_or(u64::MAX, |it| it / 4);
    let n_slots = len_bytes.min(MAX_PINNED_BYTES).min(spare_bytes).div_ceil(chunk_bytes).max(1);
    let pinned_bytes = n_slots * chunk_bytes;
    let target = Memory::new(context, Reservation::uncounted(pinned_bytes))?;
    let upload = Upload::new(context)?;
    let mut slots = (0..n_slots).map(|it| slot(context, chunk_bytes, it)).collect::<Result<VecDeque<_>>>()?;
    let why_pageable = slots.iter().find_map(Slot::why_pageable).map(str::to_owned);
    let mut seconds = Vec::with_capacity(N_ROUNDS);
    for round in 0..=N_ROUNDS {
        let began = Instant::now();
        copy(&upload, &target, &mut slots, len_bytes)?;
        if round > 0 {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    let mut in_order = seconds.clone();
    in_order.sort_unstable_by(f64::total_cmp);
    let median_s = in_order[in_order.len() / 2];
    let gb_per_s = len_bytes as f64 / median_s / 1e9;
    let device = Device::Cuda(context.ordinal()).to_string();
    Ok(Measured {
        device,
        bytes: len_bytes,
        chunk_bytes,
        pinned_bytes,
        is_pinned: why_pageable.is_none(),
        why_pageable,
        seconds,
        median_s,
        gb_per_s,
    })
}

/// Pinned memory that holds something: pages that nobody wrote to may all be one.
fn slot(context: &Context, len_bytes: u64, seed: u64) -> Result<Slot> {
    let mut buffer = HostBuffer::new(Reservation::uncounted(len_bytes), Path::new("pinned memory"))?;
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for piece in buffer.as_mut_slice().chunks_mut(8) {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
    }
    Slot::new(buffer, std::slice::from_ref(context))
}

/// Copies so many bytes out of the slots, in turns, with all of them on their way: the driver always has the next copy.
fn copy(upload: &Upload, target: &Memory, slots: &mut VecDeque<Slot>, len_bytes: u64) -> Result<()> {
    let mut in_flight: VecDeque<InFlight> = VecDeque::with_capacity(slots.len());
    let mut done_bytes = 0;
    while done_bytes < len_bytes {
        let slot = match slots.pop_front() {
            Some(slot) => slot,
            None => in_flight.pop_front().ok_or_else(no_slot)?.wait()?,
        };
        let copied_bytes = (slot.as_slice().len() as u64).min(len_bytes - done_bytes);
        let target_byte = done_bytes % target.len_bytes();
        let copy = SlotCopy { slot_byte: 0, len_bytes: copied_bytes, target, target_byte, lines: Lines::ONE };
        in_flight.push_back(upload.submit(slot, &[copy])?);
        done_bytes += copied_bytes;
    }
    in_flight.into_iter().try_for_each(|it| {
        slots.push_back(it.wait()?);
        Ok(())
    })
}

fn no_slot() -> Error {
    Fault::new("memory to copy from", "none").mismatch()
}
