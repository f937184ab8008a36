//! Memory of a GPU: taken, written, read, copied, given back.

use crate::{
    SLOT_BYTES, buffer, bytes, context,
    fake_driver::{Fake, Report},
    memory, message, read, slot, whole,
};
use unladen::{
    Device,
    cuda::{Lines, Memory, Slot, SlotCopy, Upload},
    memory::{Ledger, Reservation, Space},
};

#[test]
fn bytes_come_back_as_they_went() {
    let look = |report: &Report| {
        report.assert_clean();
        // Memory is the driver's as it stands: no pool keeps any.
        assert_eq!(report.n_calls("cuMemAlloc_v2"), report.n_calls("cuMemFree_v2"));
    };
    let Some(fake) = Fake::over("memory::bytes_come_back_as_they_went", look) else { return };
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
    let name = "memory::what_has_returned_is_done_and_comes_behind_nothing_later";
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
    let name = "memory::what_lies_outside_is_refused_before_the_driver_hears_of_it";
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
    let Some(_fake) = Fake::over("memory::no_bytes_are_no_memory_of_the_driver", look) else { return };
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
    let Some(fake) =
        Fake::over("memory::a_full_gpu_says_what_is_free_and_takes_what_fits", Report::assert_clean)
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
    assert!(error.hint().contains("--device-map"), "{}", error.hint());
    assert_eq!(ledger.get().0.device_bytes.total_bytes(), 0);
    let fits = Memory::new(&context, reserve(50_000_000)).unwrap();
    assert_eq!(ledger.get().0.device_bytes.total_bytes(), 50_000_000);
    drop(fits);
    assert_eq!(ledger.get().0.device_bytes.total_bytes(), 0);
}

#[test]
fn what_is_free_shrinks_by_granules_which_small_memory_shares() {
    const GRANULE_BYTES: u64 = 2 << 20;
    let name = "memory::what_is_free_shrinks_by_granules_which_small_memory_shares";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    // What is no whole granule is of no use.
    fake.tell(&format!("memory {}", 5 * GRANULE_BYTES + GRANULE_BYTES / 2));
    let context = context(0);
    let all_bytes = context.free_bytes().unwrap();
    let n_taken = || {
        let taken_bytes = all_bytes - context.free_bytes().unwrap();
        assert_eq!(taken_bytes % GRANULE_BYTES, 0);
        taken_bytes / GRANULE_BYTES
    };
    let _own = [GRANULE_BYTES, GRANULE_BYTES + 1].map(|it| memory(&context, it));
    assert_eq!(n_taken(), 3);
    let mut small: Vec<_> = (0..4).map(|_| memory(&context, GRANULE_BYTES / 4 - 511)).collect();
    assert_eq!(n_taken(), 4);
    small.push(memory(&context, 1));
    assert_eq!(n_taken(), 5);
    let error = Memory::new(&context, Reservation::uncounted(GRANULE_BYTES / 2)).unwrap_err();
    assert!(message(&error).contains("CUDA_ERROR_OUT_OF_MEMORY"), "{error}");
    // A granule is free with the last that lies in it.
    for n_left in [5, 5, 5, 5, 4] {
        assert_eq!(n_taken(), n_left);
        small.remove(0);
    }
    assert_eq!(n_taken(), 3);
}
