//! Which GPUs there are, and which can be opened.

use crate::{
    fake_driver::{Fake, Report, first_middle_last, is_second, run_again},
    message,
};
use std::{env, process::Command, thread};
use unladen::cuda::{Context, gpus, has_driver};

#[test]
fn gpus_are_listed_with_what_they_have() {
    let Some(fake) = Fake::over("devices::gpus_are_listed_with_what_they_have", Report::assert_clean) else {
        return;
    };
    fake.tell(
        "gpus 3\nmemory 4000000000\nmemory 1000000000 1\nused 250000000 1\ncompute 9 0\ndriver_version 12080",
    );
    let listed = gpus().unwrap();
    assert_eq!(listed.cuda_version, (12, 8));
    let found: Vec<_> = listed.gpus.iter().map(|it| (it.ordinal, it.total_bytes)).collect();
    assert_eq!(found, [(0, 4_000_000_000), (1, 1_000_000_000), (2, 4_000_000_000)]);
    assert_eq!(*listed.gpus[1].free_bytes.as_ref().unwrap(), 750_000_000);
    assert!(listed.gpus.iter().all(|it| it.name.contains("GPU") && it.compute_capability == (9, 0)));
}

#[test]
fn a_gpu_that_lets_nobody_in_is_listed_with_its_reason() {
    let Some(fake) =
        Fake::over("devices::a_gpu_that_lets_nobody_in_is_listed_with_its_reason", Report::assert_clean)
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
    let name = "devices::a_driver_that_sees_no_gpu_gives_an_empty_list_and_opens_none";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    fake.tell("fail cuInit 1 100 2");
    assert!(gpus().unwrap().gpus.is_empty());
    let error = Context::open(0).unwrap_err();
    assert!(message(&error).starts_with("cuda: cuInit: CUDA_ERROR_NO_DEVICE ("), "{error}");
    assert!(error.hint().contains("CUDA_VISIBLE_DEVICES"), "{}", error.hint());
}

#[test]
fn a_driver_that_did_not_start_is_asked_again_and_one_that_did_is_not() {
    let name = "devices::a_driver_that_did_not_start_is_asked_again_and_one_that_did_is_not";
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
    let Some(_fake) =
        Fake::over("devices::an_ordinal_that_is_not_there_is_told_which_are", Report::assert_clean)
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

#[allow(clippy::print_stderr)]
#[test]
fn without_a_driver_nothing_opens_and_the_host_is_offered() {
    let name = "devices::without_a_driver_nothing_opens_and_the_host_is_offered";
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

#[test]
fn every_question_about_gpus_that_fails_is_an_error_of_its_name() {
    let name = "devices::every_question_about_gpus_that_fails_is_an_error_of_its_name";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    // The driver starts once.
    gpus().unwrap();
    let before = fake.report();
    gpus().unwrap();
    let calls = fake.report().calls_since(&before);
    // Without an answer there is nothing to list; without one of the others, only what is free is unknown.
    let is_asked = |function: &str| {
        let of_the_driver = ["cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet"];
        let of_a_gpu = ["cuDeviceGetName", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute"];
        of_the_driver.contains(&function) || of_a_gpu.contains(&function)
    };
    let of_free_bytes = ["cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2"];
    assert_eq!(calls.keys().filter(|it| is_asked(it)).count(), 6, "{calls:?}");
    assert!(of_free_bytes.iter().all(|it| calls.contains_key(*it)), "{calls:?}");
    for (function, &n_calls) in &calls {
        if !is_asked(function) && !of_free_bytes.contains(&function.as_str()) {
            continue;
        }
        for number in first_middle_last(n_calls) {
            fake.tell(&format!("fail {function} {number} 999"));
            let listed = gpus();
            fake.tell("");
            let errors: Vec<_> = match listed {
                Err(error) => vec![error],
                Ok(listed) => listed.gpus.into_iter().filter_map(|it| it.free_bytes.err()).collect(),
            };
            let called = format!(": {}: CUDA_ERROR_UNKNOWN (", function.trim_end_matches("_v2"));
            assert_eq!(errors.len(), 1, "{function}, call {number}: {errors:?}");
            assert!(message(&errors[0]).contains(&called), "call {number}: {}", errors[0]);
            assert!(!errors[0].hint().is_empty());
            assert!(gpus().unwrap().gpus.iter().all(|it| it.free_bytes.is_ok()), "after {function}");
        }
    }
}
