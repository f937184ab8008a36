//! Copies in flight: in rings, on several GPUs and threads, dropped and forgotten.

use crate::{
    SLOT_BYTES, buffer, bytes, context,
    fake_driver::{Fake, Report},
    memory, message, read, slot, whole,
};
use std::{collections::VecDeque, mem, sync::Arc, thread};
use unladen::{
    Device,
    cuda::{InFlight, Memory, Slot, Upload},
    memory::{Ledger, Space},
};

#[test]
fn a_ring_of_slots_brings_every_byte_to_its_place_on_every_gpu() {
    const N_RING: u64 = 3;
    const N_COPIES: u64 = 60;
    let look = |report: &Report| {
        report.assert_clean();
        assert_eq!(report.0["copies"]["peak_in_flight"], N_RING);
        assert_eq!(report.0["copies"]["async_pageable"]["n"], 0);
    };
    let name = "upload::a_ring_of_slots_brings_every_byte_to_its_place_on_every_gpu";
    let Some(fake) = Fake::over(name, look) else { return };
    // Until all are on their way at once.
    fake.tell("hold on");
    let contexts = [context(0), context(1)];
    let targets = contexts.each_ref().map(|it| memory(it, N_COPIES / 2 * SLOT_BYTES));
    let uploads = contexts.each_ref().map(|it| Upload::new(it).unwrap());
    let mut idle: Vec<_> = (0..N_RING).map(|_| Slot::new(buffer(SLOT_BYTES), &contexts).unwrap()).collect();
    let mut in_flight: VecDeque<InFlight> = VecDeque::new();
    for number in 0..N_COPIES {
        if number == N_RING {
            fake.tell("delay_us 500");
        }
        let mut slot = match idle.pop() {
            Some(slot) => slot,
            None => in_flight.pop_front().unwrap().wait().unwrap(),
        };
        slot.as_mut_slice().copy_from_slice(&bytes(SLOT_BYTES, number));
        let gpu = number as usize % 2;
        in_flight
            .push_back(uploads[gpu].submit(slot, &[whole(&targets[gpu], number / 2 * SLOT_BYTES)]).unwrap());
    }
    in_flight.into_iter().for_each(|it| drop(it.wait().unwrap()));
    for number in 0..N_COPIES {
        let found = read(&targets[number as usize % 2], number / 2 * SLOT_BYTES, SLOT_BYTES);
        assert!(found == bytes(SLOT_BYTES, number), "{number}");
    }
}

#[test]
fn dropping_a_flight_waits_for_it() {
    let Some(fake) = Fake::over("upload::dropping_a_flight_waits_for_it", Report::assert_clean) else {
        return;
    };
    let context = context(0);
    let target = memory(&context, SLOT_BYTES);
    let upload = Upload::new(&context).unwrap();
    fake.tell("hold on");
    let in_flight = upload.submit(slot(&context, 4), &[whole(&target, 0)]).unwrap();
    thread::scope(|scope| {
        let dropping = scope.spawn(|| drop(in_flight));
        fake.tell("delay_us 20000");
        dropping.join().unwrap();
    });
    assert_eq!(fake.report().live("registrations"), 0);
    assert!(read(&target, 0, SLOT_BYTES) == bytes(SLOT_BYTES, 4));
}

#[test]
fn what_a_flight_needs_stays_until_it_ends_whoever_drops_it() {
    let name = "upload::what_a_flight_needs_stays_until_it_ends_whoever_drops_it";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let ledger = Ledger::new();
    let context = context(0);
    let target = Memory::new(&context, ledger.reserve(Space::Device(Device::Cuda(0)), SLOT_BYTES)).unwrap();
    let upload = Upload::new(&context).unwrap();
    let slot = slot(&context, 4);
    fake.tell("hold on");
    let in_flight = upload.submit(slot, &[whole(&target, 0)]).unwrap();
    drop(target);
    drop(upload);
    drop(context);
    let report = fake.report();
    let live = ["memory", "registrations", "streams", "events"].map(|it| report.live(it));
    assert_eq!((live, ledger.get().0.device_bytes.total_bytes()), ([1; 4], SLOT_BYTES));
    fake.tell("");
    let slot = in_flight.wait().unwrap();
    assert!(slot.as_slice() == bytes(SLOT_BYTES, 4));
    let report = fake.report();
    let live = ["memory", "registrations", "streams", "events"].map(|it| report.live(it));
    assert_eq!((live, ledger.get().0.device_bytes.total_bytes()), ([0, 1, 0, 1], 0));
}

#[test]
fn a_flight_that_is_forgotten_keeps_what_it_has_and_harms_nobody() {
    let name = "upload::a_flight_that_is_forgotten_keeps_what_it_has_and_harms_nobody";
    let look = |report: &Report| {
        report.assert_right();
        let live = ["memory", "registrations", "streams", "events"].map(|it| report.live(it));
        assert_eq!(live, [1; 4]);
    };
    let Some(fake) = Fake::over(name, look) else { return };
    let context = context(0);
    let target = memory(&context, SLOT_BYTES);
    fake.tell("delay_us 5000");
    mem::forget(Upload::new(&context).unwrap().submit(slot(&context, 4), &[whole(&target, 0)]).unwrap());
    let other = memory(&context, SLOT_BYTES);
    other.write(0, &bytes(SLOT_BYTES, 5)).unwrap();
    drop(target);
    context.synchronize().unwrap();
    assert!(read(&other, 0, SLOT_BYTES) == bytes(SLOT_BYTES, 5));
}

#[test]
fn threads_share_gpus_and_drop_each_others_memory() {
    let Some(fake) =
        Fake::over("upload::threads_share_gpus_and_drop_each_others_memory", Report::assert_clean)
    else {
        return;
    };
    fake.tell("delay_us 300");
    let contexts = [context(0), context(1)];
    let uploads = contexts.each_ref().map(|it| Upload::new(it).unwrap());
    thread::scope(|scope| {
        for seed in 0..8 {
            let (contexts, uploads) = (&contexts, &uploads);
            scope.spawn(move || {
                for round in 0..5 {
                    let gpu = (seed + round) as usize % 2;
                    let target = Arc::new(memory(&contexts[gpu], SLOT_BYTES));
                    let in_flight =
                        uploads[gpu].submit(slot(&contexts[gpu], seed), &[whole(&target, 0)]).unwrap();
                    let reader = thread::spawn(move || {
                        drop(in_flight.wait().unwrap());
                        read(&target, 0, SLOT_BYTES)
                    });
                    assert!(reader.join().unwrap() == bytes(SLOT_BYTES, seed));
                }
            });
        }
    });
}

#[test]
fn memory_of_another_gpu_is_no_target_of_a_queue() {
    let Some(_fake) =
        Fake::over("upload::memory_of_another_gpu_is_no_target_of_a_queue", Report::assert_clean)
    else {
        return;
    };
    let contexts = [context(0), context(1)];
    let target = memory(&contexts[1], SLOT_BYTES);
    let upload = Upload::new(&contexts[0]).unwrap();
    let error = upload.submit(slot(&contexts[0], 1), &[whole(&target, 0)]).unwrap_err();
    assert_eq!(message(&error), "cuda:0: a copy to cuda:1 does not go by this GPU's queue");
}
