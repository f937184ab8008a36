//! Slots: pinned or not, in flight and back, and let go of.

use crate::{
    SLOT_BYTES, bytes, context,
    fake_driver::{Fake, Report},
    memory, message, read, slot, whole,
};
use std::{path::Path, thread};
use unladen::{
    cuda::{Lines, Slot, SlotCopy, Upload},
    memory::{HostBuffer, Ledger, Space},
};

#[test]
fn a_slot_in_flight_comes_back_when_its_bytes_have_arrived() {
    let look = |report: &Report| {
        report.assert_clean();
        // The second flight uses the first one's event.
        assert_eq!(report.n_calls("cuEventCreate"), 1);
    };
    let Some(fake) = Fake::over("slots::a_slot_in_flight_comes_back_when_its_bytes_have_arrived", look)
    else {
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
fn what_the_driver_does_not_pin_is_copied_all_the_same() {
    let look = |report: &Report| {
        report.assert_clean();
        assert_eq!(report.0["copies"]["async_pinned"]["n"], 0);
        assert_eq!(report.0["copies"]["async_pageable"]["n"], 2);
    };
    let Some(fake) = Fake::over("slots::what_the_driver_does_not_pin_is_copied_all_the_same", look) else {
        return;
    };
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
    let name = "slots::a_buffer_that_the_driver_does_not_let_go_of_is_never_unmapped";
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
