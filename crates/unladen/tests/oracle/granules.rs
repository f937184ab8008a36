//! What is free on a GPU, to the last granule: what a plan says that the driver will take is what it takes, what does not fit
//! is refused before anything is taken, and what fits without room for casts is cast on the host. Over the driver of
//! `tests/fake_cuda`.

use crate::{
    checkpoint::Case,
    expected,
    fake_driver::{Fake, Report},
    run::{Spread, Way},
};
use unladen::{
    Casts, DType, Device, Error, LoadPlan, OpenCheckpoint, PlanOptions, Result, RunOptions, Strategy,
    error::Limit,
    plan::{GRANULE_BYTES, Step},
    tensor::Layout,
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

/// Halves: large and small, some turned over.
fn halves() -> Case {
    let mut case = Case::of_files(vec![(0..7_000_000u32).map(|it| (it / 977 % 251) as u8).collect()]);
    case.add_storage(0, 64, 6_999_000, false);
    for (name, start_elem, len) in
        [("large", 0, 2_000_000), ("middle", 2_000_001, 200_000), ("small", 2_300_000, 700)]
    {
        let layout = Layout::strided(DType::F16, &[len], &[1], start_elem).unwrap();
        case.add_tensor(name, layout, 0);
    }
    let turned = Layout::strided(DType::F16, &[1000, 900], &[1, 1000], 2_400_000).unwrap();
    case.add_tensor("turned", turned, 0);
    case
}

#[test]
fn what_a_gpu_has_no_room_to_widen_is_widened_on_the_host_by_the_same_way() {
    let name = "granules::what_a_gpu_has_no_room_to_widen_is_widened_on_the_host_by_the_same_way";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let case = halves();
    let open = case.open();
    let resolved = expected::resolved(&case);
    for (frees_singly, strategy) in
        [(false, None), (true, None), (false, Some(Strategy::Meta)), (false, Some(Strategy::MmapCopy))]
    {
        let context = format!("{strategy:?}, singly: {frees_singly}");
        let options = PlanOptions {
            strategy,
            device: GPU,
            frees_singly,
            casts: Casts::parse("f32").unwrap(),
            n_threads: Some(2),
            ..PlanOptions::default()
        };
        let plan_with = |free_bytes: u64| {
            fake.tell(&format!("used {}", TOTAL_BYTES - free_bytes));
            open.plan(&options)
        };
        let scratch = |plan: &LoadPlan| -> usize {
            let of_step = |step: &Step| match step {
                Step::Upload { scratch, .. } => scratch.len(),
                _ => 0,
            };
            plan.steps().iter().map(of_step).sum()
        };
        let roomy = plan_with(TOTAL_BYTES).unwrap();
        assert!(scratch(&roomy) > 0, "{context}");
        let Err(Error::OverBudget { needed_bytes, limit: Limit::FreeDeviceMemory, .. }) = plan_with(0) else {
            panic!("{context}: a plan for a GPU that is full")
        };
        assert!(needed_bytes < roomy.predicted_driver_bytes().get(GPU), "{context}");
        let tight = plan_with(needed_bytes).expect(&context);
        assert_eq!((tight.strategy(), scratch(&tight)), (roomy.strategy(), 0), "{context}");
        if strategy.is_none() {
            assert_eq!(tight.strategy(), Strategy::Stream, "{context}");
            assert_eq!(tight.predicted().device_bytes, tight.weights_by_device(), "{context}");
        }
        assert!(plan_with(needed_bytes - 1).is_err(), "{context}");
        for (plan, free_bytes) in [(&tight, needed_bytes), (&roomy, TOTAL_BYTES)] {
            fake.tell(&format!("used {}\ndelay_us 300", TOTAL_BYTES - free_bytes));
            let n_launches = || fake.report().n_calls("cuLaunchKernel");
            let n_before = n_launches();
            let loaded = open.run(plan, RunOptions::default()).expect(&context);
            assert_eq!(n_launches() > n_before, scratch(plan) > 0, "{context}");
            assert_eq!(loaded.peaks, plan.predicted(), "{context}");
            assert_eq!(loaded.gpus.driver_peak_bytes, plan.predicted_driver_bytes(), "{context}");
            for ((name, view), bytes) in loaded.state.iter().zip(&resolved) {
                let mut found = Vec::new();
                view.for_each_chunk(|chunk| found.extend_from_slice(chunk)).unwrap();
                let right = expected::cast(DType::F16, DType::F32, bytes.as_ref().unwrap());
                assert!(expected::are_equal(DType::F32, true, &found, &right), "{context}: {name}");
            }
        }
    }
}
