//! Loads to GPUs, over the driver of `tests/fake_cuda`: the oracle's bytes by every way, what the driver counted, and work, memory and
//! files that fail. (Calls that fail: `gpu_faults.rs`.)

use crate::{
    checkpoint::Case,
    expected,
    fake_driver::{Fake, Report, is_second, run_again},
    faulty::{Before, Fault},
    random::Rng,
    run::{self, Spread, Watched, Way},
    seeds, some_ways,
};
use std::{
    collections::BTreeMap,
    env,
    fs::{self, OpenOptions},
    io::Write as _,
    process::Command,
    str::FromStr as _,
    sync::Arc,
};
use unladen::{
    Casts, DType, Device, Error, LoadPlan, Machine, OpenCheckpoint, PlanOptions, Progress, RunOptions,
    Strategy,
    destination::Bytes,
    engine::Staging,
    memory::{Held, Ledger},
    plan::Step,
    tensor::Layout,
};

#[test]
fn random_checkpoints_load_to_gpus_with_the_oracles_bytes() {
    let name = "gpus::random_checkpoints_load_to_gpus_with_the_oracles_bytes";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    for seed in seeds(120) {
        // Now and then copies take their time, and what is late comes late.
        fake.tell(if seed % 4 == 0 { "delay_us 300" } else { "" });
        some_ways(seed, Way::on_gpus());
    }
}

/// Something of every kind: large and small tensors, cast, turned, tied, swapped; some for each device.
fn everything() -> Case {
    let mut case = Case::of_files(vec![(0..6_000_000u32).map(|it| (it % 251) as u8).collect()]);
    case.add_storage(0, 64, 3_000_000, false);
    case.add_storage(0, 3_000_064, 2_000_000, true);
    case.add_storage(0, 5_000_064, 900_000, false);
    let whole = Layout::contiguous(DType::F32, &[750_000]).unwrap();
    case.add_tensor("plain.0", whole.clone(), 0);
    case.add_tensor("tied.2", whole, 0);
    case.add_tensor("plain.1", Layout::contiguous(DType::F16, &[1_000_000]).unwrap(), 1);
    case.add_tensor("turned.5", Layout::strided(DType::F32, &[500, 400], &[1, 500], 0).unwrap(), 2);
    for number in 0..30u64 {
        let layout = Layout::strided(DType::I16, &[100], &[1], number * 128).unwrap();
        case.add_tensor(&format!("small.{number}"), layout, 2);
    }
    case
}

/// A plan with small buffers, so that each goes round several times.
fn plan(open: &OpenCheckpoint, way: Way) -> LoadPlan {
    let options = PlanOptions {
        host_budget_bytes: u64::MAX,
        n_threads: Some(2),
        casts: Casts::parse("plain.1=f32,keep").unwrap(),
        ..PlanOptions::default()
    };
    let needed = |options: &PlanOptions| way.plan(open, options, &Machine::plain(2, 1));
    let Err(Error::OverBudget { needed_bytes, .. }) =
        needed(&PlanOptions { host_budget_bytes: 0, ..options.clone() })
    else {
        panic!("a plan for no memory at all")
    };
    needed(&PlanOptions { host_budget_bytes: needed_bytes + (1 << 20), ..options }).unwrap()
}

/// Loads once; the error, or the tensors' bytes.
fn load(case: &Case, open: &OpenCheckpoint, plan: &LoadPlan) -> Result<BTreeMap<String, Vec<u8>>, Error> {
    let ledger = Ledger::new();
    let loaded = load_counted(case, open, plan, &ledger);
    assert_eq!(ledger.get().0, Held::default(), "something is held still");
    loaded
}

fn load_counted(
    case: &Case,
    open: &OpenCheckpoint,
    plan: &LoadPlan,
    ledger: &Arc<Ledger>,
) -> Result<BTreeMap<String, Vec<u8>>, Error> {
    let progress = Progress::default();
    let mut memory = run::caller_memory(case, plan);
    let watched = Watched { progress: &progress, ledger, after_step: &mut |_| {} };
    run::run(open, plan, &mut memory, watched).and_then(|state| {
        let mut tensors = BTreeMap::new();
        for (name, view) in state.iter() {
            let mut bytes = Vec::new();
            view.for_each_chunk(|chunk| bytes.extend_from_slice(chunk))?;
            tensors.insert(name.to_owned(), bytes);
        }
        Ok(tensors)
    })
}

/// The tensors of [`everything`] are the oracle's.
fn assert_right(case: &Case, found: &BTreeMap<String, Vec<u8>>) {
    for (tensor, bytes) in case.tensors.iter().zip(expected::resolved(case)) {
        let from = tensor.layout.dtype();
        let to = if tensor.name == "plain.1" { DType::F32 } else { from };
        let bytes = expected::cast(from, to, &bytes.unwrap());
        assert!(expected::are_equal(to, from != to, &found[&tensor.name], &bytes), "{}", tensor.name);
    }
}

/// Strategies, by name, each in a process of its own: the driver's peaks are those of the process.
#[test]
fn what_the_driver_gave_at_most_is_what_was_predicted_to_the_byte() {
    let name = "gpus::what_the_driver_gave_at_most_is_what_was_predicted_to_the_byte";
    let variable = "UNLADEN_TEST_STRATEGY";
    if is_second(name) {
        let Some(fake) = Fake::over(name, |_| ()) else { return };
        let strategy = Strategy::from_str(&env::var(variable).unwrap()).unwrap();
        let case = everything();
        let open = case.open();
        let plan = plan(&open, Way::OnGpus(strategy, Spread::Several, false));
        load(&case, &open, &plan).unwrap();
        for ordinal in [0, 1] {
            let asked = &fake.report().0["gpus"][ordinal as usize]["asked_bytes"];
            let predicted_bytes = plan.predicted().device_bytes.get(Device::Cuda(ordinal));
            assert!(predicted_bytes > 1_000_000, "{predicted_bytes} bytes on cuda:{ordinal}");
            assert_eq!(asked["peak"], predicted_bytes, "{strategy} on cuda:{ordinal}");
        }
        let seen = open.run(&plan, RunOptions::default()).unwrap().gpus.driver_peak_bytes;
        for ordinal in [0, 1] {
            let taken = &fake.report().0["gpus"][ordinal as usize]["taken_bytes"];
            assert_eq!(taken["peak"], seen.get(Device::Cuda(ordinal)), "{strategy} on cuda:{ordinal}");
        }
        return;
    }
    for strategy in Strategy::all() {
        let Some(fake) = Fake::new() else { return };
        let mut command = Command::new(env::current_exe().unwrap());
        run_again(name, fake.set_up(&mut command).env(variable, strategy.name()));
        fake.report().assert_clean();
    }
}

#[test]
fn work_that_fails_on_the_gpu_is_a_typed_error_whenever_it_fails() {
    let name = "gpus::work_that_fails_on_the_gpu_is_a_typed_error_whenever_it_fails";
    let Some(fake) = Fake::over(name, |_| ()) else { return };
    let case = everything();
    let way = Way::OnGpus(Strategy::Stream, Spread::One, false);
    for number in [1, 2, 9] {
        let open = case.open();
        let plan = plan(&open, way);
        fake.tell(&format!("delay_us 2000\nfault {number} 700"));
        // Whether the GPU still reads a buffer cannot be known, so it is not given back, and counts as held.
        let error = load_counted(&case, &open, &plan, &Ledger::new()).unwrap_err();
        assert_eq!(error.kind(), "Device", "{error}");
        // That broke the context for the whole process, as on a GPU: the next one is told so, and nothing crashes.
        fake.tell("");
        let again = load_counted(&case, &case.open(), &plan, &Ledger::new());
        assert!(again.is_err_and(|it| it.kind() == "Device"));
    }
}

#[test]
fn a_gpu_that_fills_up_after_the_plan_says_so_and_the_next_load_works() {
    let name = "gpus::a_gpu_that_fills_up_after_the_plan_says_so_and_the_next_load_works";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    fake.tell("memory 100000000");
    let case = everything();
    let open = case.open();
    for strategy in [Strategy::Stream, Strategy::Naive] {
        let plan = plan(&open, Way::OnGpus(strategy, Spread::Several, true));
        open.plan(&PlanOptions { device: Device::Cuda(0), ..PlanOptions::new(strategy) }).unwrap();
        fake.tell("used 99000000");
        let error = load(&case, &open, &plan).unwrap_err();
        assert!(error.to_string().contains("OUT_OF_MEMORY"), "{error}");
        let planned = open.plan(&PlanOptions {
            device: Device::Cuda(0),
            host_budget_bytes: u64::MAX,
            ..PlanOptions::new(strategy)
        });
        let Err(Error::OverBudget { needed_bytes, available_bytes, .. }) = planned else {
            panic!("a plan for a GPU that is full")
        };
        assert!(needed_bytes > available_bytes && available_bytes <= 1_000_000, "{available_bytes} are free");
        fake.tell("");
        load(&case, &open, &plan).unwrap();
        let report = fake.report();
        assert_eq!(report.live("memory") + report.live("registrations"), 0);
    }
}

#[test]
fn a_load_that_is_cancelled_leaves_nothing_on_the_gpu() {
    let name = "gpus::a_load_that_is_cancelled_leaves_nothing_on_the_gpu";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let case = everything();
    let open = case.open();
    let plan = plan(&open, Way::OnGpus(Strategy::Stream, Spread::One, false));
    fake.tell("delay_us 5000");
    let progress = Progress::default();
    let cancelled = std::thread::scope(|scope| {
        scope.spawn(|| {
            while progress.get().0 == 0 {
                std::thread::yield_now();
            }
            progress.cancel();
        });
        open.run(&plan, RunOptions { progress: Some(&progress), ..RunOptions::default() }).unwrap_err()
    });
    assert!(matches!(cancelled, Error::Cancelled { .. }), "{cancelled}");
    let report = fake.report();
    assert_eq!(report.live("memory") + report.live("registrations") + report.live("streams"), 0);
    fake.tell("");
    load(&case, &open, &plan).unwrap();
}

#[test]
fn a_disk_that_fails_and_a_file_that_changes_end_the_load_and_leave_nothing() {
    let name = "gpus::a_disk_that_fails_and_a_file_that_changes_end_the_load_and_leave_nothing";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    fake.tell("delay_us 300");
    let case = everything();
    let file = case.paths[0].clone();
    let grows = move |number, _, _| {
        if number == 3 {
            let file = OpenOptions::new().append(true).open(&file);
            file.and_then(|mut it| it.write_all(b"more")).unwrap();
        }
    };
    let panics = |number, _, _| assert!(number != 3, "as it was told to");
    let nothing: Before = Arc::new(|_, _, _| {});
    let faults = [
        (Fault::BrokenAt(0), Arc::clone(&nothing), "Io"),
        (Fault::BrokenAt(4_000_000), Arc::clone(&nothing), "Io"),
        (Fault::EndsAt(5_500_000), Arc::clone(&nothing), "Corrupt"),
        (Fault::Short(usize::MAX), Arc::new(panics), "Panicked"),
        (Fault::Short(usize::MAX), Arc::new(grows), "Mismatch"),
    ];
    for strategy in [Strategy::Stream, Strategy::Naive] {
        for (fault, before, kind) in &faults {
            let open = case.open_with(*fault, Arc::clone(before));
            let plan = plan(&open, Way::OnGpus(strategy, Spread::One, false));
            let error = load(&case, &open, &plan).unwrap_err();
            assert_eq!(error.kind(), *kind, "{strategy}, {fault:?}: {error}");
            let report = fake.report();
            let live = ["memory", "registrations", "streams", "events", "modules"].map(|it| report.live(it));
            assert_eq!(live, [0; 5], "{strategy}, {fault:?}");
            fs::write(&case.paths[0], &case.bytes[0]).unwrap();
        }
    }
}

#[test]
fn tensors_in_another_order_are_read_once_and_lines_of_them_lie_where_they_belong() {
    let name = "gpus::tensors_in_another_order_are_read_once_and_lines_of_them_lie_where_they_belong";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let mut case = Case::of_files(vec![(0..1_000_000u32).map(|it| (it / 3 % 251) as u8).collect(); 2]);
    for file in [0, 1] {
        case.add_storage(file, 0, 1_000_000, false);
        let layouts = [
            // Two sizes and three, turned over; rows apart from each other, turned over; rows that are repeated.
            (DType::F32, vec![500, 500], vec![1, 500]),
            (DType::F16, vec![50, 100, 100], vec![1, 50, 5000]),
            (DType::U8, vec![300, 1000], vec![1, 1000]),
            (DType::F32, vec![40, 5, 1000], vec![1000, 0, 1]),
        ];
        for (number, (dtype, shape, stride)) in layouts.into_iter().enumerate() {
            let layout = Layout::strided(dtype, &shape, &stride, 0).unwrap();
            case.add_tensor(&format!("of.{file}.{number}"), layout, file);
        }
    }
    case.pack(&mut Rng::new(7), 1);
    assert_eq!(case.n_files(), 3, "one is packed");
    let open = case.open();
    let plan = plan(&open, Way::OnGpus(Strategy::Stream, Spread::One, false));
    let n_read: u64 = plan.steps().iter().flat_map(Step::reads).map(|it| it.len_bytes).sum();
    assert_eq!(n_read, case.tensors.iter().map(|it| it.layout.len_bytes()).sum::<u64>());
    fake.tell("delay_us 300");
    assert_right(&case, &load(&case, &open, &plan).unwrap());
    let report = fake.report();
    let n_copies = report.n_calls("cuMemcpy2DAsync_v2");
    assert!(n_copies > 30, "{n_copies} copies of lines");
}

#[test]
fn nothing_else_of_the_host_comes_to_the_gpu_between_tensors() {
    const VALUE: u8 = 0x5A;
    let name = "gpus::nothing_else_of_the_host_comes_to_the_gpu_between_tensors";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    // First what leaves no gaps, so that every staging buffer has been full when those come that do.
    let mut case = Case::of_files(vec![vec![VALUE; 5 << 20]]);
    case.add_storage(0, 0, 4 << 20, false);
    case.add_storage(0, 4 << 20, 1 << 20, false);
    for (storage, n_tensors, len_bytes) in [(0, 1024u64, 4096u64), (1, 4000, 100)] {
        for number in 0..n_tensors {
            let layout = Layout::strided(DType::U8, &[len_bytes], &[1], number * len_bytes).unwrap();
            case.add_tensor(&format!("{len_bytes}.{number}"), layout, storage);
        }
    }
    let open = case.open();
    let plan = plan(&open, Way::OnGpus(Strategy::Stream, Spread::One, false));
    fake.tell("delay_us 1000");
    let loaded = open.run(&plan, RunOptions::default()).unwrap();
    let mut between = BTreeMap::new();
    for (_, view) in loaded.state.iter() {
        let Bytes::OnGpu { memory, start_byte, len_bytes } = view.bytes else { panic!("on the host") };
        let bytes = between.entry(memory.address()).or_insert_with(|| {
            let mut bytes = vec![0; memory.len_bytes() as usize];
            memory.read(0, &mut bytes).unwrap();
            bytes
        });
        let tensor = &mut bytes[start_byte as usize..][..len_bytes as usize];
        assert!(tensor.iter().all(|it| *it == VALUE));
        tensor.fill(0);
    }
    let between: Vec<u8> = between.into_values().flatten().collect();
    assert!(between.len() > 5_000_000 && !between.contains(&VALUE));
}

#[test]
fn buffers_of_elements_to_be_widened_do_not_meet_in_the_scratch() {
    let name = "gpus::buffers_of_elements_to_be_widened_do_not_meet_in_the_scratch";
    let look = |report: &Report| {
        report.assert_clean();
        assert_eq!(report.0["copies"]["peak_in_flight"], 2);
    };
    let Some(fake) = Fake::over(name, look) else { return };
    let mut case = Case::of_files(vec![(0..4_000_000u32).map(|it| (it / 977 % 251) as u8).collect()]);
    case.add_storage(0, 0, 4_000_000, false);
    case.add_tensor("plain.1", Layout::contiguous(DType::F16, &[2_000_000]).unwrap(), 0);
    let open = case.open();
    let plan = plan(&open, Way::OnGpus(Strategy::Stream, Spread::One, false));
    // Two arrive together, before anything is done with the first. If the second takes too long to be filled, the first is
    // waited for alone: then once more.
    let n_in_flight = || fake.report().0["copies"]["peak_in_flight"].as_u64().unwrap();
    for _ in 0..100 {
        fake.tell("hold on");
        let found = std::thread::scope(|scope| {
            let found = scope.spawn(|| load(&case, &open, &plan));
            let is_waiting = || fake.has_report() && fake.report().0["waiting"] == 1;
            while !is_waiting() && !found.is_finished() {
                std::thread::yield_now();
            }
            fake.tell("");
            found.join().unwrap().unwrap()
        });
        assert_right(&case, &found);
        if n_in_flight() >= 2 {
            break;
        }
    }
    // And however late they come, there is no third.
    fake.tell("delay_us 2000");
    assert_right(&case, &load(&case, &open, &plan).unwrap());
}

#[test]
fn without_pinned_memory_the_same_bytes_come_and_it_is_said() {
    let name = "gpus::without_pinned_memory_the_same_bytes_come_and_it_is_said";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let case = everything();
    let open = case.open();
    let plan = plan(&open, Way::OnGpus(Strategy::Stream, Spread::Several, false));
    let right = load(&case, &open, &plan).unwrap();
    let staging = || open.run(&plan, RunOptions::default()).unwrap().gpus.staging;
    assert_eq!(staging(), Some(Staging::Pinned));
    fake.tell("pinnable 0");
    assert!(load(&case, &open, &plan).unwrap() == right);
    let why = "cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (out of memory)".to_owned();
    assert_eq!(staging(), Some(Staging::Pageable { why }));
    // One buffer of several is enough, and it is the first reason that is told.
    fake.tell("fail cuMemHostRegister_v2 2 800\nfail cuMemHostRegister_v2 3 2");
    let why = "cuMemHostRegister: CUDA_ERROR_NOT_PERMITTED (operation not permitted)".to_owned();
    assert_eq!(staging(), Some(Staging::Pageable { why }));
}

#[test]
fn tensors_lie_on_their_devices_aligned_and_together_or_apart() {
    let name = "gpus::tensors_lie_on_their_devices_aligned_and_together_or_apart";
    let Some(fake) = Fake::over(name, Report::assert_clean) else { return };
    let case = everything();
    let open = case.open();
    let n_allocations = || fake.report().n_calls("cuMemAlloc_v2");
    let n_before = if fake.has_report() { n_allocations() } else { 0 };
    // With scratch, for what is widened.
    for (frees_singly, n_expected) in [(false, 3), (true, 28)] {
        let n_before = n_before.max(if fake.has_report() { n_allocations() } else { 0 });
        let plan = plan(&open, Way::OnGpus(Strategy::Stream, Spread::Several, frees_singly));
        let loaded = open.run(&plan, RunOptions::default()).unwrap();
        for (name, view) in loaded.state.iter() {
            let device = match name.rsplit_once('.').map(|(_, number)| number.chars().last()) {
                Some(Some('1' | '7')) => Device::Cuda(1),
                Some(Some('3' | '4')) => Device::Host,
                _ => Device::Cuda(0),
            };
            assert_eq!(view.bytes.device(), device, "{name}");
            if let Bytes::OnGpu { memory, start_byte, .. } = view.bytes {
                assert!((memory.address() + start_byte).is_multiple_of(256), "{name}");
                assert_eq!(view.host_bytes().unwrap_err().kind(), "Device");
            }
        }
        assert_eq!(n_allocations() - n_before, n_expected, "{frees_singly}");
    }
}
