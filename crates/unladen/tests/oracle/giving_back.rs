//! What a GPU has back once a tensor is removed, and what the driver is asked meanwhile, over the driver of
//! `tests/fake_cuda`.

use crate::{
    checkpoint::Case,
    fake_driver::{Fake, Report},
};
use unladen::{
    DType, Device, Loaded, OpenCheckpoint, PlanOptions, RunOptions, StateDict, Strategy, memory::Held,
    plan::Step, tensor::Layout,
};

const GPU: Device = Device::Cuda(0);

/// `n_tensors` of so many bytes each, one after the other, and a name for the first of them again.
fn case(n_tensors: u64, len_bytes: u64) -> Case {
    let mut case = Case::of_files(vec![(0..n_tensors * len_bytes).map(|it| (it % 251) as u8).collect()]);
    case.add_storage(0, 0, n_tensors * len_bytes, false);
    for number in (0..n_tensors).chain([0]) {
        let name =
            if case.tensors.len() as u64 == n_tensors { "tied".to_owned() } else { number.to_string() };
        let layout = Layout::strided(DType::U8, &[len_bytes], &[1], number * len_bytes).unwrap();
        case.add_tensor(&name, layout, 0);
    }
    case
}

fn options(frees_singly: bool) -> PlanOptions {
    PlanOptions { device: GPU, frees_singly, ..PlanOptions::new(Strategy::Stream) }
}

fn load(open: &OpenCheckpoint, options: &PlanOptions) -> Loaded<'static> {
    open.run(&open.plan(options).unwrap(), RunOptions::default()).unwrap()
}

/// What lies on the GPU, by the driver and by the state dict.
fn on_gpu(fake: &Fake, state: &StateDict<'_>) -> u64 {
    let asked_bytes = fake.report().0["gpus"][0]["asked_bytes"]["live"].as_u64().unwrap();
    assert_eq!(state.held().device_bytes.get(GPU), asked_bytes);
    asked_bytes
}

#[test]
fn a_tensor_that_is_removed_gives_its_memory_back_with_the_last_name_that_shares_it() {
    // Whole steps, as plans reserve them of a GPU.
    const EACH: u64 = 601 * 512;
    let name =
        "giving_back::a_tensor_that_is_removed_gives_its_memory_back_with_the_last_name_that_shares_it";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let case = case(4, EACH);
    let open = case.open();
    for strategy in Strategy::all() {
        let asked = PlanOptions { strategy: Some(strategy), host_budget_bytes: u64::MAX, ..options(true) };
        let mut state = load(&open, &asked).state;
        assert_eq!(on_gpu(&fake, &state), 4 * EACH, "{strategy}");
        for (name, n_left) in [("2", 3), ("0", 3), ("tied", 2), ("3", 1)] {
            assert_eq!(state.remove(name).unwrap().layout.len_bytes(), EACH);
            assert_eq!(on_gpu(&fake, &state), n_left * EACH, "{strategy}: after {name}");
            assert_eq!(fake.report().live("memory"), n_left);
        }
        // The one that is left is whole.
        let mut bytes = Vec::new();
        state.get("1").unwrap().for_each_chunk(|it| bytes.extend_from_slice(it)).unwrap();
        assert_eq!(bytes, case.bytes[0][EACH as usize..2 * EACH as usize], "{strategy}");
        // What is kept is not given back, whoever keeps it.
        let kept = state.remove("1").unwrap();
        assert_eq!((state.held(), fake.report().live("memory")), (Held::default(), 1));
        drop(kept);
        assert_eq!(fake.report().live("memory"), 0);
    }

    // In a range that all share, the last one takes it along.
    let mut state = load(&open, &options(false)).state;
    let whole_bytes = on_gpu(&fake, &state);
    for name in ["tied", "0", "1", "3"] {
        assert!(state.remove(name).unwrap().arena.is_none());
        assert_eq!(on_gpu(&fake, &state), whole_bytes, "after {name}");
    }
    assert!(state.remove("2").unwrap().arena.is_some());
    assert_eq!(on_gpu(&fake, &state), 0);
}

#[test]
fn thousands_of_reservations_are_a_few_questions_to_the_driver_and_its_figure_is_exact() {
    let name =
        "giving_back::thousands_of_reservations_are_a_few_questions_to_the_driver_and_its_figure_is_exact";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let case = case(2000, 600);
    let open = case.open();
    let plan = open.plan(&options(true)).unwrap();
    let n_calls = |function: &str| fake.report().n_calls(function);
    let n_before = n_calls("cuMemGetInfo_v2");
    let loaded = open.run(&plan, RunOptions::default()).unwrap();
    assert!(n_calls("cuMemAlloc_v2") >= 2000);
    let n_asked = n_calls("cuMemGetInfo_v2") - n_before;
    assert!((2..10).contains(&n_asked), "{n_asked}");
    let report = fake.report();
    let taken = &report.0["gpus"][0]["taken_bytes"]["peak"];
    assert_eq!(taken.as_u64(), Some(loaded.gpus.driver_peak_bytes.get(GPU)));
}

#[test]
fn what_the_driver_takes_while_a_load_copies_is_in_its_figure() {
    const TAKEN: u64 = 300_000_000;
    let name = "giving_back::what_the_driver_takes_while_a_load_copies_is_in_its_figure";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let open = case(4, 300_000).open();
    for strategy in [Strategy::Stream, Strategy::Naive, Strategy::MmapCopy] {
        let plan = open.plan(&PlanOptions {
            host_budget_bytes: u64::MAX,
            ..PlanOptions { strategy: Some(strategy), ..options(false) }
        });
        let plan = plan.unwrap();
        // Nothing is reserved on the GPU behind this step.
        let on_gpu = |step: &Step| matches!(step, Step::Reserve { space, .. } if *space == unladen::memory::Space::Device(GPU));
        let last = plan.steps().iter().rposition(on_gpu).unwrap();
        let mut tell = |step, _| {
            if step == last {
                fake.tell(&format!("used {TAKEN}"));
            }
        };
        let run = RunOptions { after_step: Some(&mut tell), ..RunOptions::default() };
        let loaded = open.run(&plan, run).unwrap();
        fake.tell("");
        let driver_bytes = loaded.gpus.driver_peak_bytes.get(GPU);
        assert!(driver_bytes >= TAKEN + loaded.peaks.device_bytes.get(GPU), "{strategy}: {driver_bytes}");
    }
}
