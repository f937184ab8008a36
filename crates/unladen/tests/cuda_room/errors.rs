//! Calls of the driver that fail, and work that fails on a GPU: a typed error, nothing lost, nothing still read.

use crate::{
    SLOT_BYTES, bytes, context,
    fake_driver::{Fake, Report, first_middle_last},
    memory, message, read, slot, whole,
};
use unladen::{
    Device,
    cuda::{Context, GpuCasts, Lines, Memory, SlotCopy, Upload},
    memory::{Ledger, Space},
};

#[test]
fn a_submission_that_fails_leaves_nothing_in_flight() {
    let Some(fake) =
        Fake::over("errors::a_submission_that_fails_leaves_nothing_in_flight", Report::assert_clean)
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
fn a_copy_between_gpus_that_fails_is_an_error_and_the_next_is_right() {
    let name = "errors::a_copy_between_gpus_that_fails_is_an_error_and_the_next_is_right";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let [source, target] = [0, 1].map(|it| memory(&context(it), SLOT_BYTES));
    source.write(0, &bytes(SLOT_BYTES, 3)).unwrap();
    let copy = || target.copy_from(0, &source, 0, SLOT_BYTES);
    let before = fake.report();
    copy().unwrap();
    let calls = fake.report().calls_since(&before);
    assert!(calls.contains_key("cuMemcpyPeer") && calls["cuCtxSynchronize"] == 2, "{calls:?}");
    for function in ["cuMemcpyPeer", "cuCtxSynchronize"] {
        for number in first_middle_last(calls[function]) {
            target.write(0, &bytes(SLOT_BYTES, 4)).unwrap();
            fake.tell(&format!("delay_us 2000\nfail {function} {number} 999"));
            let error = copy().unwrap_err();
            assert!(message(&error).contains(&format!(": {function}: CUDA_ERROR_UNKNOWN (")), "{error}");
            fake.tell("");
            copy().unwrap();
            assert!(read(&target, 0, SLOT_BYTES) == bytes(SLOT_BYTES, 3));
        }
    }
}

#[test]
fn a_wait_that_fails_is_an_error_and_ends_by_other_means() {
    let Some(fake) =
        Fake::over("errors::a_wait_that_fails_is_an_error_and_ends_by_other_means", Report::assert_clean)
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
    let name = "errors::a_gpu_that_answers_no_more_keeps_what_it_may_still_use";
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
    let Some(fake) = Fake::over("errors::copies_that_go_wrong_on_the_gpu_are_told_at_the_wait", look) else {
        return;
    };
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
fn a_driver_that_cannot_work_is_told_with_what_to_do_about_it() {
    let name = "errors::a_driver_that_cannot_work_is_told_with_what_to_do_about_it";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    for (code, error_name, words) in [
        (34, "CUDA_ERROR_STUB_LIBRARY", "LD_LIBRARY_PATH"),
        (100, "CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES"),
        (802, "CUDA_ERROR_SYSTEM_NOT_READY", "nvidia-fabricmanager"),
        (803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "reboot"),
        (804, "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "cuda-compat"),
        (999, "CUDA_ERROR_UNKNOWN", "dmesg"),
    ] {
        fake.tell(&format!("fail cuInit 1 {code}"));
        let error = Context::open(0).unwrap_err();
        assert!(message(&error).starts_with(&format!("cuda: cuInit: {error_name} (")), "{error}");
        assert!(error.hint().contains(words), "{error_name}: {}", error.hint());
    }
    let context = context(0);
    fake.tell("fail cuModuleLoadData 1 221");
    let error = GpuCasts::load(&context).unwrap_err();
    assert!(message(&error).contains("CUDA_ERROR_JIT_COMPILER_NOT_FOUND"), "{error}");
    assert!(error.hint().contains("libnvidia-ptxjitcompiler"), "{}", error.hint());
}
