//! What is free on a GPU, to the last granule: what a plan says that the driver will take is what it takes, and what does not
//! fit is refused before anything is taken. Over the driver of `tests/fake_cuda`.

use crate::{
    checkpoint::Case,
    fake_driver::{Fake, Report},
    run::{Spread, Way},
};
use unladen::{
    DType, Device, Error, LoadPlan, OpenCheckpoint, PlanOptions, Result, RunOptions, Strategy, error::Limit,
    plan::GRANULE_BYTES, tensor::Layout,
};

const GPU: Device = Device::Cuda(0);

/// Of each GPU of the fake driver.
const TOTAL_BYTES: u64 = 8 << 30;

/// Tensors of all lengths from a few bytes to megabytes, none of them round.
fn case() -> Case {
    let lens_bytes = (0..40u64).map(|it| 1 + it * it * it * 53 % 3_500_000);
    let mut case = Case::of_files(vec![(0..60_000_000u32).map(|it| (it % 251) as u8).collect()]);
    case.add_storage(0, 64, 59_000_000, false);
    let mut start_byte = 0;
    for (number, len_bytes) in lens_bytes.enumerate() {
        let layout = Layout::strided(DType::U8, &[len_bytes], &[1], start_byte).unwrap();
        case.add_tensor(&number.to_string(), layout, 0);
        start_byte += len_bytes;
    }
    case
}

fn plan(open: &OpenCheckpoint, strategy: Strategy, frees_singly: bool) -> Result<LoadPlan> {
    let options = PlanOptions { device: GPU, frees_singly, ..PlanOptions::unlimited(strategy) };
    open.plan(&options)
}

#[test]
fn what_is_just_free_is_enough_and_a_byte_less_is_refused_before_anything_is_taken() {
    let name = "granules::what_is_just_free_is_enough_and_a_byte_less_is_refused_before_anything_is_taken";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let case = case();
    let open = case.open();
    let free = |bytes: u64| fake.tell(&format!("used {}", TOTAL_BYTES - bytes));
    let n_allocations = || fake.report().n_calls("cuMemAlloc_v2");
    for (strategy, frees_singly) in Strategy::all().flat_map(|it| [(it, false), (it, true)]) {
        let context = format!("{strategy}, singly: {frees_singly}");
        fake.tell("");
        let roomy = plan(&open, strategy, frees_singly).unwrap();
        let asked_bytes = roomy.predicted().device_bytes.get(GPU);
        let needed_bytes = roomy.predicted_driver_bytes().get(GPU);
        assert!(needed_bytes > asked_bytes && needed_bytes.is_multiple_of(GRANULE_BYTES), "{context}");

        free(needed_bytes);
        let planned = plan(&open, strategy, frees_singly).expect(&context);
        let loaded = open.run(&planned, RunOptions::default()).expect(&context);
        assert_eq!(loaded.gpus.driver_peak_bytes.get(GPU), needed_bytes, "{context}");
        assert_eq!(loaded.peaks.device_bytes.get(GPU), asked_bytes, "{context}");
        drop(loaded);

        let n_before = n_allocations();
        for free_bytes in [needed_bytes - 1, needed_bytes - GRANULE_BYTES, asked_bytes] {
            free(free_bytes);
            let error = plan(&open, strategy, frees_singly).expect_err(&context);
            let text = error.to_string();
            assert!(text.contains(&format!("granules of 2 MiB) of {needed_bytes} bytes, but ")), "{text}");
            let Error::OverBudget { limit, needed_bytes: named, available_bytes, .. } = error else {
                panic!("{context}: {error}")
            };
            assert_eq!(
                (limit, named, available_bytes),
                (Limit::FreeDeviceMemory, needed_bytes, free_bytes),
                "{context}"
            );
        }
        assert_eq!(n_allocations(), n_before, "{context}");
        // And rightly: by its bytes it fits, and in the middle the driver has no more.
        let error = open.run(&roomy, RunOptions::default()).unwrap_err();
        assert!(error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{context}: {error}");
        assert_eq!(fake.report().live("memory"), 0, "{context}");
    }
}

#[test]
fn several_gpus_are_compared_each_with_what_is_free_there() {
    let name = "granules::several_gpus_are_compared_each_with_what_is_free_there";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let case = case();
    let open = case.open();
    let way = Way::OnGpus(Strategy::Stream, Spread::Several, true);
    let gpus = [Device::Cuda(0), Device::Cuda(1)];
    let options = PlanOptions { host_budget_bytes: u64::MAX, ..PlanOptions::default() };
    let plan = || {
        let asked =
            PlanOptions { device: gpus[0], device_map: "*=cuda:1".parse().unwrap(), ..options.clone() };
        way.plan(&open, &options, &open.machine(&asked))
    };
    let needed = plan().unwrap().predicted_driver_bytes();
    assert!(gpus.iter().all(|it| needed.get(*it) > 2 * GRANULE_BYTES));
    let used = |ordinal: u32, less_bytes: u64| {
        format!("used {} {ordinal}\n", TOTAL_BYTES - needed.get(Device::Cuda(ordinal)) + less_bytes)
    };
    fake.tell(&format!("{}{}", used(0, 0), used(1, 0)));
    let loaded = open.run(&plan().unwrap(), RunOptions::default()).unwrap();
    for device in gpus {
        assert_eq!(loaded.gpus.driver_peak_bytes.get(device), needed.get(device));
    }
    drop(loaded);
    for (ordinal, device) in (0..).zip(gpus) {
        // The one that lacks more is named.
        fake.tell(&format!("{}{}", used(ordinal, 2 * GRANULE_BYTES), used(1 - ordinal, GRANULE_BYTES)));
        let error = plan().unwrap_err();
        let words = format!("`stream to {device}` needs free memory of the GPU");
        assert!(error.to_string().contains(&words), "{error}");
    }
}
