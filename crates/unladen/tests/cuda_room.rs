//! The CUDA room over a fake driver that reads a copy's source only when the copy runs, refuses what a real one would, and
//! knows afterwards what was not given back.
#![cfg(feature = "cuda")]

#[path = "common/fake_driver.rs"]
mod fake_driver;

use fake_driver::{Fake, Report, is_second, run_again};
use std::{collections::VecDeque, env, mem, path::Path, process::Command, sync::Arc, thread};
use unladen::{
    Device, Error,
    cuda::{Context, InFlight, Lines, Memory, Slot, SlotCopy, Upload, gpus, has_driver},
    memory::{HostBuffer, Ledger, Reservation, Space},
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

#[test]
fn gpus_are_listed_with_what_they_have() {
    let Some(fake) = Fake::over("gpus_are_listed_with_what_they_have", Report::assert_clean) else { return };
    fake.tell(
        "gpus 3\nmemory 4000000000\nmemory 1000000000 1\nused 250000000 1\ncompute 9 0\ndriver_version 12080",
    );
    let listed = gpus().unwrap();
    assert_eq!(listed.driver_version, (12, 8));
    let found: Vec<_> = listed.gpus.iter().map(|it| (it.ordinal, it.total_bytes)).collect();
    assert_eq!(found, [(0, 4_000_000_000), (1, 1_000_000_000), (2, 4_000_000_000)]);
    assert_eq!(*listed.gpus[1].free_bytes.as_ref().unwrap(), 750_000_000);
    assert!(listed.gpus.iter().all(|it| it.name.contains("GPU") && it.compute_capability == (9, 0)));
}

#[test]
fn a_gpu_that_lets_nobody_in_is_listed_with_its_reason() {
    let Some(fake) = Fake::over("a_gpu_that_lets_nobody_in_is_listed_with_its_reason", Report::assert_clean)
    else {
        return;
    };
    fake.tell("fail cuDevicePrimaryCtxRetain 2 46");
    let listed = gpus().unwrap();
    assert!(listed.gpus[0].free_bytes.is_ok());
    let error = listed.gpus[1].free_bytes.as_ref().unwrap_err();
    assert!(message(error).starts_with("cuda:1: cuDevicePrimaryCtxRetain: CUDA_ERROR_DEVICE_UNAVAILABLE"));
    assert!(error.hint().contains("another process"), "{}", error.hint());
}

#[test]
fn a_driver_that_sees_no_gpu_gives_an_empty_list_and_opens_none() {
    let name = "a_driver_that_sees_no_gpu_gives_an_empty_list_and_opens_none";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    fake.tell("fail cuInit 1 100 2");
    assert!(gpus().unwrap().gpus.is_empty());
    let error = Context::open(0).unwrap_err();
    assert!(message(&error).starts_with("cuda: cuInit: CUDA_ERROR_NO_DEVICE ("), "{error}");
    assert!(error.hint().contains("CUDA_VISIBLE_DEVICES"), "{}", error.hint());
}

#[test]
fn a_driver_that_did_not_start_is_asked_again_and_one_that_did_is_not() {
    let name = "a_driver_that_did_not_start_is_asked_again_and_one_that_did_is_not";
    let look = |report: &Report| {
        report.assert_clean();
        assert_eq!(report.n_calls("cuInit"), 3);
    };
    let Some(fake) = Fake::over(name, look) else { return };
    assert!(has_driver());
    fake.tell("fail cuInit 1 999 2");
    for _ in 0..2 {
        let error = gpus().unwrap_err();
        assert!(message(&error).starts_with("cuda: cuInit: CUDA_ERROR_UNKNOWN ("), "{error}");
    }
    thread::scope(|scope| {
        let opened: Vec<_> =
            (0..4).map(|_| scope.spawn(|| Context::open(0).map(|it| it.ordinal()))).collect();
        opened.into_iter().for_each(|it| assert_eq!(it.join().unwrap().unwrap(), 0));
    });
}

#[test]
fn an_ordinal_that_is_not_there_is_told_which_are() {
    let Some(_fake) = Fake::over("an_ordinal_that_is_not_there_is_told_which_are", Report::assert_clean)
    else {
        return;
    };
    for ordinal in [2, u32::MAX] {
        let error = Context::open(ordinal).unwrap_err();
        let expected = format!("cuda:{ordinal}: there is no such GPU, only cuda:0 to cuda:1");
        assert_eq!(message(&error), expected);
        assert!(error.hint().contains("`unladen devices`"), "{}", error.hint());
    }
}

#[test]
fn bytes_come_back_as_they_went() {
    let look = |report: &Report| {
        report.assert_clean();
        // Memory is the driver's as it stands: no pool keeps any.
        assert_eq!(report.n_calls("cuMemAlloc_v2"), report.n_calls("cuMemFree_v2"));
    };
    let Some(fake) = Fake::over("bytes_come_back_as_they_went", look) else { return };
    fake.tell("delay_us 2000");
    let contexts = [context(0), context(1)];
    let free_bytes = contexts[0].free_bytes().unwrap();
    let n = 3 << 20;
    let all: Vec<_> = contexts.iter().map(|it| memory(it, n)).collect();
    assert_eq!([all[0].ordinal(), all[1].ordinal()], [0, 1]);
    assert!(contexts[0].free_bytes().unwrap() <= free_bytes - n);
    for (seed, it) in all.iter().enumerate() {
        it.write(0, &bytes(n, seed as u64)).unwrap();
        it.write(1001, &[9; 13]).unwrap();
        it.write(n, &[]).unwrap();
    }
    for (seed, it) in all.iter().enumerate() {
        let mut expected = bytes(n, seed as u64);
        expected[1001..1014].fill(9);
        assert!(read(it, 0, n) == expected);
        assert_eq!(read(it, n - 5, 5), &expected[n as usize - 5..]);
    }
    // Within a GPU and its memory, from one to the other, and back.
    all[0].copy_from(0, &all[0], n - 1000, 1000).unwrap();
    all[0].copy_from(1000, &all[0], 0, 1000).unwrap();
    assert_eq!(read(&all[0], 0, 2000), read(&all[0], n - 1000, 1000).repeat(2));
    all[1].copy_from(7, &all[0], 3, n - 7).unwrap();
    assert!(read(&all[1], 7, n - 7) == read(&all[0], 3, n - 7));
    let other = memory(&context(0), 100);
    other.copy_from(50, &all[0], 0, 50).unwrap();
    other.copy_from(0, &all[1], 7, 50).unwrap();
    assert_eq!(read(&other, 0, 100), [read(&all[1], 7, 50), read(&all[0], 0, 50)].concat());
    drop(all);
    drop(other);
    contexts[0].synchronize().unwrap();
    assert_eq!(contexts[0].free_bytes().unwrap(), free_bytes);
}

#[test]
fn what_has_returned_is_done_and_comes_behind_nothing_later() {
    let name = "what_has_returned_is_done_and_comes_behind_nothing_later";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let contexts = [context(0), context(1)];
    let [target, other] = contexts.each_ref().map(|it| memory(it, SLOT_BYTES));
    let same = memory(&contexts[0], SLOT_BYTES);
    let upload = Upload::new(&contexts[0]).unwrap();
    let mut slot = slot(&contexts[0], 8);
    let ways: [&dyn Fn(); 3] = [
        &|| target.write(0, &bytes(SLOT_BYTES, 9)).unwrap(),
        &|| target.copy_from(0, &same, 0, SLOT_BYTES).unwrap(),
        &|| target.copy_from(0, &other, 0, SLOT_BYTES).unwrap(),
    ];
    for way in ways {
        fake.tell("delay_us 20000");
        way();
        fake.tell("");
        // Its queue waits for nobody: a copy that still ran would end after it.
        slot = upload.submit(slot, &[whole(&target, 0)]).unwrap().wait().unwrap();
        contexts.iter().for_each(|it| it.synchronize().unwrap());
        assert!(read(&target, 0, SLOT_BYTES) == bytes(SLOT_BYTES, 8));
    }
}

#[test]
fn what_lies_outside_is_refused_before_the_driver_hears_of_it() {
    let name = "what_lies_outside_is_refused_before_the_driver_hears_of_it";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let context = context(0);
    let (one, other) = (memory(&context, 100), memory(&context, 60));
    one.write(0, &[5; 100]).unwrap();
    let n_copies = |fake: &Fake| fake.report().0["copies"].clone();
    let before = n_copies(&fake);
    let outside = "cuda:0: 60 bytes from byte 41 on lie outside of memory of 100 bytes";
    assert_eq!(message(&one.write(41, &[0; 60]).unwrap_err()), outside);
    assert_eq!(message(&one.read(41, &mut [0; 60]).unwrap_err()), outside);
    assert_eq!(message(&one.copy_from(41, &other, 0, 60).unwrap_err()), outside);
    for (target_byte, source_byte, len_bytes) in
        [(0, 1, 60), (0, 61, 0), (101, 0, 0), (u64::MAX, 0, 2), (0, u64::MAX, 2), (0, 0, u64::MAX)]
    {
        let error = one.copy_from(target_byte, &other, source_byte, len_bytes).unwrap_err();
        assert!(message(&error).contains("lie outside"), "{error}");
    }
    let error = one.copy_from(10, &one, 0, 11).unwrap_err();
    assert!(message(&error).contains("overlap"), "{error}");
    one.copy_from(0, &one, 0, 0).unwrap();

    let upload = Upload::new(&context).unwrap();
    for (slot_byte, target_byte, len_bytes) in [
        (SLOT_BYTES, 0, 1),
        (SLOT_BYTES + 1, 0, 0),
        (u64::MAX, 0, 2),
        (1, 0, u64::MAX),
        (0, 100, 1),
        (0, u64::MAX, 2),
        (0, 50, 51),
    ] {
        let right =
            SlotCopy { slot_byte: 0, len_bytes: 100, target: &one, target_byte: 0, lines: Lines::ONE };
        let wrong = SlotCopy { slot_byte, len_bytes, target: &one, target_byte, lines: Lines::ONE };
        let error = upload.submit(slot(&context, 1), &[right, wrong]).unwrap_err();
        assert!(message(&error).contains("lie outside"), "{error}");
    }
    assert_eq!(n_copies(&fake), before);
    assert_eq!(read(&one, 0, 100), [5; 100]);
}

#[test]
fn no_bytes_are_no_memory_of_the_driver() {
    let look = |report: &Report| {
        report.assert_clean();
        assert_eq!(report.n_calls("cuMemAlloc_v2") + report.n_calls("cuMemFree_v2"), 0);
        assert_eq!(report.n_calls("cuMemHostRegister_v2"), 0);
    };
    let Some(_fake) = Fake::over("no_bytes_are_no_memory_of_the_driver", look) else { return };
    let context = context(0);
    let empty = memory(&context, 0);
    assert_eq!((empty.len_bytes(), empty.address()), (0, 0));
    empty.write(0, &[]).unwrap();
    empty.read(0, &mut []).unwrap();
    empty.copy_from(0, &empty, 0, 0).unwrap();
    assert!(empty.write(0, &[1]).is_err());
    let mut slot = Slot::new(buffer(0), std::slice::from_ref(&context)).unwrap();
    assert!(!slot.is_pinned() && slot.as_mut_slice().is_empty());
    let copy = SlotCopy { slot_byte: 0, len_bytes: 0, target: &empty, target_byte: 0, lines: Lines::ONE };
    let slot = Upload::new(&context).unwrap().submit(slot, &[copy]).unwrap().wait().unwrap();
    assert!(slot.as_slice().is_empty());
}

#[test]
fn a_full_gpu_says_what_is_free_and_takes_what_fits() {
    let Some(fake) = Fake::over("a_full_gpu_says_what_is_free_and_takes_what_fits", Report::assert_clean)
    else {
        return;
    };
    fake.tell("memory 100000000");
    let context = context(0);
    let ledger = Ledger::new();
    let reserve = |len_bytes| ledger.reserve(Space::Device(Device::Cuda(0)), len_bytes);
    let error = Memory::new(&context, reserve(100_000_001)).unwrap_err();
    let text = message(&error);
    assert!(text.starts_with("cuda:0: cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY ("), "{text}");
    assert!(text.ends_with(" for 100000001 bytes, 100000000 of 100000000 bytes are free"), "{text}");
    assert!(error.hint().contains("--device-budget"), "{}", error.hint());
    assert_eq!(ledger.get().0.device_bytes.total_bytes(), 0);
    let fits = Memory::new(&context, reserve(50_000_000)).unwrap();
    assert_eq!(ledger.get().0.device_bytes.total_bytes(), 50_000_000);
    drop(fits);
    assert_eq!(ledger.get().0.device_bytes.total_bytes(), 0);
}

#[test]
fn a_slot_in_flight_comes_back_when_its_bytes_have_arrived() {
    let look = |report: &Report| {
        report.assert_clean();
        // The second flight uses the first one's event.
        assert_eq!(report.n_calls("cuEventCreate"), 1);
    };
    let Some(fake) = Fake::over("a_slot_in_flight_comes_back_when_its_bytes_have_arrived", look) else {
        return;
    };
    let context = context(0);
    let (one, other) = (memory(&context, SLOT_BYTES), memory(&context, SLOT_BYTES));
    let upload = Upload::new(&context).unwrap();
    let slot = slot(&context, 1);
    assert!(slot.is_pinned() && slot.why_pageable().is_none());
    fake.tell("hold on");
    let half = SLOT_BYTES / 2;
    let copies = [
        SlotCopy { slot_byte: 0, len_bytes: half, target: &other, target_byte: half, lines: Lines::ONE },
        SlotCopy { slot_byte: 9, len_bytes: 0, target: &one, target_byte: 3, lines: Lines::ONE },
        SlotCopy { slot_byte: half, len_bytes: half, target: &one, target_byte: 0, lines: Lines::ONE },
    ];
    let in_flight = upload.submit(slot, &copies).unwrap();
    assert!(!in_flight.is_done().unwrap());
    fake.tell("");
    let mut slot = in_flight.wait().unwrap();
    assert_eq!(read(&other, half, half), bytes(SLOT_BYTES, 1)[..half as usize]);
    assert_eq!(read(&one, 0, half), bytes(SLOT_BYTES, 1)[half as usize..]);

    slot.as_mut_slice().fill(3);
    let in_flight = upload.submit(slot, &[whole(&one, 0)]).unwrap();
    while !in_flight.is_done().unwrap() {
        thread::yield_now();
    }
    let buffer = in_flight.wait().unwrap().into_buffer().unwrap();
    assert_eq!(buffer.as_slice(), vec![3; SLOT_BYTES as usize]);
    assert_eq!(read(&one, 0, SLOT_BYTES), buffer.as_slice());
}

#[test]
fn a_ring_of_slots_brings_every_byte_to_its_place_on_every_gpu() {
    const N_RING: u64 = 3;
    const N_COPIES: u64 = 60;
    let look = |report: &Report| {
        report.assert_clean();
        assert_eq!(report.0["copies"]["peak_in_flight"], N_RING);
        assert_eq!(report.0["copies"]["async_pageable"]["n"], 0);
    };
    let name = "a_ring_of_slots_brings_every_byte_to_its_place_on_every_gpu";
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
    let Some(fake) = Fake::over("dropping_a_flight_waits_for_it", Report::assert_clean) else { return };
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
    let name = "what_a_flight_needs_stays_until_it_ends_whoever_drops_it";
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
    let name = "a_flight_that_is_forgotten_keeps_what_it_has_and_harms_nobody";
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
fn a_submission_that_fails_leaves_nothing_in_flight() {
    let Some(fake) = Fake::over("a_submission_that_fails_leaves_nothing_in_flight", Report::assert_clean)
    else {
        return;
    };
    let context = context(0);
    let target = memory(&context, SLOT_BYTES);
    let upload = Upload::new(&context).unwrap();
    let part = |slot_byte| SlotCopy {
        slot_byte,
        len_bytes: 1000,
        target: &target,
        target_byte: slot_byte,
        lines: Lines::ONE,
    };
    let parts = [part(0), part(1000), part(5000)];
    for (failing, words) in [
        ("fail cuEventCreate 1 2", "cuEventCreate: CUDA_ERROR_OUT_OF_MEMORY ("),
        ("fail cuMemcpyHtoDAsync_v2 1 1", "cuMemcpyHtoDAsync: CUDA_ERROR_INVALID_VALUE ("),
        ("fail cuMemcpyHtoDAsync_v2 3 999", "cuMemcpyHtoDAsync: CUDA_ERROR_UNKNOWN ("),
        ("fail cuEventRecord 1 400", "cuEventRecord: CUDA_ERROR_INVALID_HANDLE ("),
        // The thread's context could not be pushed, for the second copy, nor when that was tried again.
        ("fail cuCtxPushCurrent_v2 4 201 2", "cuCtxPushCurrent: CUDA_ERROR_INVALID_CONTEXT ("),
    ] {
        let slot = slot(&context, 1);
        fake.tell(&format!("delay_us 5000\n{failing}"));
        let error = upload.submit(slot, &parts).unwrap_err();
        assert!(message(&error).starts_with(&format!("cuda:0: {words}")), "{error}");
        // Nobody waits here for what might still run.
        fake.tell("");
        let report = fake.report();
        assert_eq!((report.live("registrations"), report.live("events")), (0, 0), "{failing}");
    }
    upload.submit(slot(&context, 7), &[whole(&target, 0)]).unwrap().wait().unwrap();
    assert!(read(&target, 0, SLOT_BYTES) == bytes(SLOT_BYTES, 7));
}

#[test]
fn a_wait_that_fails_is_an_error_and_ends_by_other_means() {
    let Some(fake) =
        Fake::over("a_wait_that_fails_is_an_error_and_ends_by_other_means", Report::assert_clean)
    else {
        return;
    };
    let context = context(0);
    let target = memory(&context, SLOT_BYTES);
    let upload = Upload::new(&context).unwrap();
    for failing in [
        "fail cuEventSynchronize 1 999 always",
        "fail cuEventSynchronize 1 999 always\nfail cuStreamSynchronize 1 999 always",
    ] {
        let slot = slot(&context, 1);
        fake.tell(&format!("delay_us 5000\n{failing}"));
        let error = upload.submit(slot, &[whole(&target, 0)]).unwrap().wait().unwrap_err();
        assert!(message(&error).starts_with("cuda:0: cuEventSynchronize: CUDA_ERROR_UNKNOWN ("), "{error}");
        fake.tell("");
        assert_eq!(fake.report().live("registrations"), 0);
    }
    fake.tell("fail cuEventQuery 1 999");
    let in_flight = upload.submit(slot(&context, 2), &[whole(&target, 0)]).unwrap();
    let error = in_flight.is_done().unwrap_err();
    assert!(message(&error).starts_with("cuda:0: cuEventQuery: CUDA_ERROR_UNKNOWN ("), "{error}");
    drop(in_flight);
    assert!(read(&target, 0, SLOT_BYTES) == bytes(SLOT_BYTES, 2));
}

#[test]
fn a_gpu_that_answers_no_more_keeps_what_it_may_still_use() {
    let look = |report: &Report| {
        report.assert_right();
        let live = ["memory", "registrations", "streams", "events"].map(|it| report.live(it));
        assert_eq!(live, [1; 4]);
    };
    let name = "a_gpu_that_answers_no_more_keeps_what_it_may_still_use";
    let Some(fake) = Fake::over(name, look) else { return };
    let ledger = Ledger::new();
    let context = context(0);
    let target = Memory::new(&context, ledger.reserve(Space::Device(Device::Cuda(0)), SLOT_BYTES)).unwrap();
    let slot = slot(&context, 1);
    let waits = ["cuEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize"];
    let waits = waits.map(|it| format!("fail {it} 1 999 always")).join("\n");
    fake.tell(&format!("hold on\n{waits}"));
    let in_flight = Upload::new(&context).unwrap().submit(slot, &[whole(&target, 0)]).unwrap();
    assert!(in_flight.wait().is_err());
    drop(target);
    assert_eq!(ledger.get().0.device_bytes.total_bytes(), SLOT_BYTES);
    // What was left is still whole, so the copy does no harm when it runs at last.
    fake.tell("");
    context.synchronize().unwrap();
}

#[test]
fn copies_that_go_wrong_on_the_gpu_are_told_at_the_wait() {
    let look = |report: &Report| {
        report.assert_right();
        // Nobody can tell what the GPU still does, so what it was given stays.
        assert_eq!((report.live("registrations"), report.live("memory")), (1, 1));
    };
    let Some(fake) = Fake::over("copies_that_go_wrong_on_the_gpu_are_told_at_the_wait", look) else { return };
    let context = context(0);
    let target = memory(&context, SLOT_BYTES);
    fake.tell("hold on");
    let upload = Upload::new(&context).unwrap();
    let in_flight = upload.submit(slot(&context, 1), &[whole(&target, 0)]).unwrap();
    fake.tell("fault 1 700");
    let error = in_flight.wait().unwrap_err();
    assert!(message(&error).contains("CUDA_ERROR_ILLEGAL_ADDRESS ("), "{error}");
    assert!(error.hint().contains("start again"), "{}", error.hint());
    assert!(message(&target.write(0, &[1]).unwrap_err()).contains("CUDA_ERROR_ILLEGAL_ADDRESS"));
    // The other GPU goes on.
    let other = memory(&self::context(1), 10);
    other.write(0, &[6; 10]).unwrap();
    assert_eq!(read(&other, 0, 10), [6; 10]);
}

#[test]
fn what_the_driver_does_not_pin_is_copied_all_the_same() {
    let look = |report: &Report| {
        report.assert_clean();
        assert_eq!(report.0["copies"]["async_pinned"]["n"], 0);
        assert_eq!(report.0["copies"]["async_pageable"]["n"], 2);
    };
    let Some(fake) = Fake::over("what_the_driver_does_not_pin_is_copied_all_the_same", look) else { return };
    let context = context(0);
    let target = memory(&context, SLOT_BYTES);
    let upload = Upload::new(&context).unwrap();
    fake.tell("pinnable 1000\ndelay_us 2000");
    for seed in [1, 2] {
        let slot = slot(&context, seed);
        assert!(!slot.is_pinned());
        let why = slot.why_pageable().unwrap();
        assert!(why.starts_with("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY ("), "{why}");
        let buffer =
            upload.submit(slot, &[whole(&target, 0)]).unwrap().wait().unwrap().into_buffer().unwrap();
        assert!(read(&target, 0, SLOT_BYTES) == buffer.as_slice());
    }
}

#[test]
fn a_buffer_that_the_driver_does_not_let_go_of_is_never_unmapped() {
    let name = "a_buffer_that_the_driver_does_not_let_go_of_is_never_unmapped";
    // Its context goes at the end, and what is left in it with it.
    let look = |report: &Report| assert_eq!(report.live("contexts"), 0, "{}", report.0);
    let Some(fake) = Fake::over(name, look) else { return };
    let context = context(0);
    let ledger = Ledger::new();
    let pinned = || {
        let buffer = HostBuffer::new(ledger.reserve(Space::Staging, SLOT_BYTES), Path::new("test")).unwrap();
        Slot::new(buffer, std::slice::from_ref(&context)).unwrap()
    };
    let slot = pinned();
    let start = slot.as_slice().as_ptr();
    fake.tell("fail cuMemHostUnregister 1 999 always");
    let error = slot.into_buffer().unwrap_err();
    assert!(message(&error).contains("cuMemHostUnregister: CUDA_ERROR_UNKNOWN ("), "{error}");
    drop(pinned());
    assert_eq!(ledger.get().0.staging_bytes, 2 * SLOT_BYTES);
    fake.tell("");
    let others: Vec<_> = (0..8).map(|_| pinned()).collect();
    assert!(others.iter().all(|it| it.is_pinned() && it.as_slice().as_ptr() != start));
}

#[test]
fn threads_share_gpus_and_drop_each_others_memory() {
    let Some(fake) = Fake::over("threads_share_gpus_and_drop_each_others_memory", Report::assert_clean)
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
    let Some(_fake) = Fake::over("memory_of_another_gpu_is_no_target_of_a_queue", Report::assert_clean)
    else {
        return;
    };
    let contexts = [context(0), context(1)];
    let target = memory(&contexts[1], SLOT_BYTES);
    let upload = Upload::new(&contexts[0]).unwrap();
    let error = upload.submit(slot(&contexts[0], 1), &[whole(&target, 0)]).unwrap_err();
    assert_eq!(message(&error), "cuda:0: a copy to cuda:1 does not go by this GPU's queue");
}

#[allow(clippy::print_stderr)]
#[test]
fn without_a_driver_nothing_opens_and_the_host_is_offered() {
    let name = "without_a_driver_nothing_opens_and_the_host_is_offered";
    if !is_second(name) {
        return run_again(name, Command::new(env::current_exe().unwrap()).env_remove("LD_LIBRARY_PATH"));
    }
    if has_driver() {
        eprintln!("NOT TESTED: this machine has an NVIDIA driver");
        return;
    }
    for error in [gpus().unwrap_err(), Context::open(0).unwrap_err()] {
        assert!(
            message(&error).starts_with("cuda: there is no NVIDIA driver here: libcuda.so.1: "),
            "{error}"
        );
        assert!(error.hint().contains("install the NVIDIA driver"), "{}", error.hint());
        assert!(error.hint().contains("--device host"), "{}", error.hint());
    }
}
