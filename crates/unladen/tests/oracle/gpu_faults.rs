//! Every call that a load makes of the driver of `tests/fake_cuda` fails: the first of its kind, one in the middle, and the
//! last. That is an error which names the call, nothing is left on either side, and the next load is right.

use crate::{
    checkpoint::Case,
    expected,
    fake_driver::{Fake, Report, first_middle_last, is_second, run_again},
};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    process::Command,
    sync::Arc,
    thread,
};
use unladen::{
    Casts, DType, Device, Error, IoPath, LoadPlan, Machine, OpenCheckpoint, PlanOptions, Progress, Strategy,
    cuda::Context,
    engine::{self, Io, Run, Staging},
    memory::{Held, Ledger},
    tensor::Layout,
};

/// What loads ask of the driver, and reading what was loaded. Each of these fails in one course or another.
const ASKED: &[&str] = &[
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemGetInfo_v2",
    "cuMemHostRegister_v2",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyDtoD_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyHtoD_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamCreate",
    "cuStreamSynchronize",
];

/// What they were to give back stays with the driver if they fail, so they fail in a test of their own.
const GIVES_BACK: &[&str] = &[
    "cuMemFree_v2",
    "cuMemHostUnregister",
    "cuStreamDestroy_v2",
    "cuEventDestroy_v2",
    "cuModuleUnload",
    "cuDevicePrimaryCtxRelease_v2",
];

/// What the driver is asked once in a process, and what it calls an error.
const ASKED_BESIDES: &[&str] = &["cuInit", "cuGetErrorName", "cuGetErrorString"];

/// What is called as often as it takes until something is done, or by whichever buffer comes first.
const AS_IT_COMES: &[&str] =
    &["cuCtxPopCurrent_v2", "cuCtxPushCurrent_v2", "cuEventCreate", "cuEventDestroy_v2", "cuEventQuery"];

/// On two GPUs and the host. Names of tensors end in a number.
const SPREAD: &str = "*.1=cuda:1,*.2=host";
const ON_ONE: &str = "*=cuda:0";

/// A way of loading, and what the driver is like.
#[derive(Debug)]
struct Course {
    strategy: Strategy,
    map: &'static str,
    frees_singly: bool,
    driver: &'static str,
}

fn courses() -> Vec<Course> {
    use Strategy::{Naive, Stream};
    let course = |strategy| Course { strategy, map: SPREAD, frees_singly: false, driver: "" };
    let mut courses: Vec<Course> = Strategy::all().map(course).collect();
    courses.push(Course { map: ON_ONE, frees_singly: true, ..course(Stream) });
    courses.push(Course { driver: "pinnable 0", ..course(Stream) });
    courses.push(Course { frees_singly: true, ..course(Naive) });
    if cfg!(sanitized) {
        // The sanitizer takes its time, and these two make every kind of call.
        courses.retain(|it| matches!(it.strategy, Naive | Stream));
    }
    courses
}

impl Course {
    /// What only some ways of loading do.
    fn calls(&self) -> &'static [&'static str] {
        match self.strategy {
            // Buffers go round, lines are put in their places, elements made wider.
            Strategy::Stream => {
                &["cuMemHostRegister_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpy2DAsync_v2", "cuLaunchKernel"]
            }
            Strategy::Mmap | Strategy::MmapCopy => {
                &["cuMemHostRegister_v2", "cuMemcpy2DAsync_v2", "cuLaunchKernel", "cuMemcpyHtoD_v2"]
            }
            Strategy::Naive | Strategy::Meta => {
                &["cuMemHostRegister_v2", "cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuMemcpyDtoD_v2"]
            }
            Strategy::Sequential => &["cuMemcpyHtoD_v2", "cuMemcpyDtoD_v2"],
            Strategy::PerTensor => &["cuMemcpyHtoD_v2"],
        }
    }

    /// With buffers that are small, so that each goes round several times.
    fn options(&self, open: &OpenCheckpoint) -> PlanOptions {
        let options = PlanOptions {
            device: Device::Cuda(0),
            device_map: self.map.parse().unwrap(),
            frees_singly: self.frees_singly,
            n_threads: Some(2),
            casts: Casts::parse("wide.*=f32,narrow.*=f32,keep").unwrap(),
            io: Some(IoPath::Buffered),
            ..PlanOptions::new(self.strategy)
        };
        let nothing = PlanOptions { host_budget_bytes: 0, ..options.clone() };
        let plan = LoadPlan::new(open, &nothing, &Machine::plain(2, open.files().len()));
        let Err(Error::OverBudget { needed_bytes, .. }) = plan else { panic!("a plan for no memory at all") };
        PlanOptions { host_budget_bytes: needed_bytes + (350 << 10), ..options }
    }

    /// How the host's memory was for copies.
    fn assert_staging(&self, found: &Found) {
        let has_ring = self.calls().contains(&"cuMemHostRegister_v2");
        let is_right = match &found.staging {
            None => !has_ring,
            Some(Staging::Pinned) => has_ring && self.driver.is_empty(),
            Some(Staging::Pageable { why }) => {
                has_ring && !self.driver.is_empty() && why.contains("OUT_OF_MEMORY")
            }
        };
        assert!(is_right, "{self:?}: {:?}", found.staging);
    }
}

/// Whether a load goes on after a call that failed.
fn is_forgiven(function: &str, is_planning: bool) -> bool {
    match function {
        // It is tried once more.
        "cuCtxPushCurrent_v2" | "cuCtxPopCurrent_v2" => true,
        // Pageable memory does as well, and that is told.
        "cuMemHostRegister_v2" => true,
        // Who does not know what is free plans for what could be.
        "cuMemGetInfo_v2" => is_planning,
        // Before a module is unloaded, when every load has waited for its own work.
        "cuCtxSynchronize" => true,
        _ => false,
    }
}

/// Something of every kind: plain and tied, made wider and narrower, turned over, small; some for each device.
fn everything() -> Case {
    const EACH_BYTES: u64 = 100_000;
    let n_bytes = 12 * EACH_BYTES as u32;
    let mut case = Case::of_files(vec![(0..n_bytes).map(|it| (it / 3 % 251) as u8).collect()]);
    let mut add = |name: &str, layout: Layout, is_swapped| {
        let number = case.storages.len() as u64;
        case.add_storage(0, number * EACH_BYTES, EACH_BYTES, is_swapped);
        case.add_tensor(name, layout, number as u32);
    };
    let row = |dtype: DType| Layout::contiguous(dtype, &[EACH_BYTES / dtype.size_bytes()]).unwrap();
    let turned = |dtype: DType| {
        let [rows, columns] = [200, EACH_BYTES / 200 / dtype.size_bytes()];
        Layout::strided(dtype, &[rows, columns], &[1, rows], 0).unwrap()
    };
    for number in [0, 1, 2] {
        add(&format!("plain.{number}"), row(DType::F32), false);
        add(&format!("wide.{number}"), row([DType::BF16, DType::F16][number % 2]), number == 1);
    }
    for number in [0, 1] {
        add(&format!("narrow.{number}"), row(DType::F64), false);
        add(&format!("turned.{number}"), turned([DType::F32, DType::U8][number]), false);
    }
    add("empty.0", Layout::contiguous(DType::U8, &[0]).unwrap(), false);
    let last = case.storages.len() as u32 - 1;
    for number in 0..12u64 {
        let layout = Layout::strided(DType::I16, &[100], &[1], number * 128).unwrap();
        case.add_tensor(&format!("small.{number}.{}", number % 3), layout, last);
    }
    case.add_tensor("tied.0", row(DType::F32), 0);
    case
}

/// Tensors by name.
type Tensors = BTreeMap<String, Vec<u8>>;

/// Those of [`everything`], an element at a time.
fn right(case: &Case) -> Tensors {
    let resolved = case.tensors.iter().zip(expected::resolved(case));
    let cast = resolved.map(|(tensor, bytes)| {
        let from = tensor.layout.dtype();
        let is_cast = tensor.name.starts_with("wide.") || tensor.name.starts_with("narrow.");
        let to = if is_cast { DType::F32 } else { from };
        (tensor.name.clone(), expected::cast(from, to, &bytes.unwrap()))
    });
    cast.collect()
}

/// What a load brought.
struct Found {
    tensors: Tensors,
    staging: Option<Staging>,
}

/// Runs a plan and reads every tensor. The ledger's peaks are the plan's, and it holds nothing in the end.
fn load(open: &OpenCheckpoint, plan: &LoadPlan) -> Result<Found, Error> {
    let ledger = Ledger::new();
    let found = load_counted(open, plan, &ledger);
    assert_eq!(ledger.get().0, Held::default(), "something is held still");
    if found.is_ok() {
        assert_eq!(ledger.get().1, plan.predicted());
    }
    found
}

fn load_counted(open: &OpenCheckpoint, plan: &LoadPlan, ledger: &Arc<Ledger>) -> Result<Found, Error> {
    let run = Run {
        io: Io { path: &open.path, files: open.files(), progress: &Progress::default() },
        names: &|id| &open.tensor(id).name,
        ledger: Arc::clone(ledger),
        open_gpu: &Context::open,
        initial_values: None,
        adopt: &mut |_| panic!("nothing is the caller's"),
        after_step: &mut |_, _| {},
    };
    let (state, gpus) = engine::run(plan, run)?;
    let mut tensors = BTreeMap::new();
    for (name, view) in state.iter() {
        let mut bytes = Vec::new();
        view.for_each_chunk(|chunk| bytes.extend_from_slice(chunk))?;
        tensors.insert(name.to_owned(), bytes);
    }
    Ok(Found { tensors, staging: gpus.staging })
}

/// Nothing of any kind is left, but for the contexts of so many GPUs that are open still.
#[track_caller]
fn assert_nothing_left(report: &Report, n_open: u64, words: &str) {
    assert_eq!(report.0["violations"], json!([]), "{words}");
    for (kind, n_left) in report.counted("live") {
        let is_right = if kind == "contexts" { n_left <= n_open } else { n_left == 0 };
        assert!(is_right, "{n_left} {kind} left; {words}");
    }
}

/// What the driver gave at most in this process, in loads that failed too.
#[track_caller]
fn assert_peaks(report: &Report, plan: &LoadPlan) {
    for ordinal in [0, 1] {
        let asked = &report.0["gpus"][ordinal as usize]["asked_bytes"];
        assert_eq!(asked["peak"], plan.predicted().device_bytes.get(Device::Cuda(ordinal)), "cuda:{ordinal}");
    }
}

/// A course in a process of its own: what the driver gave at most is of the whole process.
struct Loads<'f> {
    course: Course,
    fake: &'f Fake,
    case: Case,
    options: PlanOptions,
    right: Tensors,
    /// What the driver is told in any case.
    driver: String,
}

impl<'f> Loads<'f> {
    fn new(course: Course, fake: &'f Fake) -> Loads<'f> {
        let case = everything();
        let (options, right) = (course.options(&case.open()), right(&case));
        // Copies take their time, so that some are under way when something fails.
        let driver = format!("{}\ndelay_us 100\n", course.driver);
        fake.tell(&driver);
        // The driver starts once, so that all loads are alike.
        Context::open(0).unwrap();
        Loads { course, fake, case, options, right, driver }
    }

    /// A load that goes well: the driver's calls until it was planned and until its end, by function.
    fn goes_well(&self) -> [BTreeMap<String, u64>; 2] {
        let before = self.fake.report();
        let open = self.case.open();
        let plan = open.plan(&self.options).unwrap();
        let planned = self.fake.report().calls_since(&before);
        let found = load(&open, &plan).unwrap();
        assert!(found.tensors == self.right, "{:?}", self.course);
        self.course.assert_staging(&found);
        drop(open);
        let report = self.fake.report();
        assert_nothing_left(&report, 0, "a load that went well");
        assert_peaks(&report, &plan);
        [planned, report.calls_since(&before)]
    }

    /// A load in which a call fails, and the next one.
    fn fails(&self, function: &str, number: u64, is_planning: bool) {
        let words = format!("{:?}: {function} fails, call {number}", self.course);
        let n_told = || self.fake.report().n_told_to_fail(function);
        let n_told_before = n_told();
        self.fake.tell(&format!("{}fail {function} {number} 999", self.driver));
        let open = self.case.open();
        let found = open.plan(&self.options).and_then(|plan| load(&open, &plan));
        self.fake.tell(&self.driver);
        let has_failed = n_told() > n_told_before;
        assert!(has_failed || (number > 1 && AS_IT_COMES.contains(&function)), "{words}: it was not called");
        match found {
            Ok(found) => {
                assert!(!has_failed || is_forgiven(function, is_planning), "{words}: nobody noticed");
                assert!(found.tensors == self.right, "{words}: other bytes");
                if function == "cuMemHostRegister_v2" {
                    let why = found.staging.as_ref().and_then(Staging::why_pageable);
                    assert!(why.is_some_and(|it| it.starts_with("cuMemHostRegister: ")), "{words}: {why:?}");
                }
            }
            Err(error) => {
                assert!(has_failed && !is_forgiven(function, is_planning), "{words}: {error}");
                let called = format!("{}: CUDA_ERROR_UNKNOWN", function.trim_end_matches("_v2"));
                let text = error.to_string();
                assert!(error.kind() == "Device" && text.contains(&called), "{words}: {error}");
                assert!(!error.hint().is_empty(), "{words}: {error}");
            }
        }
        let n_open = if self.course.map == ON_ONE { 1 } else { 2 };
        assert_nothing_left(&self.fake.report(), n_open, &words);
        // The same checkpoint once more, the GPUs still open.
        let plan = open.plan(&self.options).unwrap();
        assert!(load(&open, &plan).unwrap().tensors == self.right, "afterwards; {words}");
        drop(open);
        assert_nothing_left(&self.fake.report(), 0, &words);
        assert_peaks(&self.fake.report(), &plan);
    }
}

#[test]
fn every_call_that_fails_is_an_error_that_names_it_and_leaves_nothing() {
    let name = "gpu_faults::every_call_that_fails_is_an_error_that_names_it_and_leaves_nothing";
    let variable = "UNLADEN_TEST_COURSE";
    if is_second(name) {
        let Some(fake) = Fake::over(name, |_| ()) else { return };
        let number: usize = env::var(variable).unwrap().parse().unwrap();
        let loads = Loads::new(courses().remove(number), &fake);
        let [planned, all] = loads.goes_well();
        for function in loads.course.calls() {
            assert!(all.contains_key(*function), "{:?} without {function}", loads.course);
        }
        for function in ASKED {
            let [n_planned, n_all] = [&planned, &all].map(|it| it.get(*function).copied().unwrap_or(0));
            for number in first_middle_last(n_all) {
                loads.fails(function, number, number <= n_planned);
            }
        }
        return;
    }
    let Some(_) = Fake::new() else { return };
    let run = |number: usize| {
        let fake = Fake::new().unwrap();
        let mut command = Command::new(env::current_exe().unwrap());
        run_again(name, fake.set_up(&mut command).env(variable, number.to_string()));
        let report = fake.report();
        report.assert_clean();
        ["calls", "told_to_fail"].map(|it| report.counted(it).into_keys().collect::<BTreeSet<_>>())
    };
    let n_courses = courses().len();
    let half = |first| (first..n_courses).step_by(2).map(run).collect::<Vec<_>>();
    let reports = thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        let mut reports = half(0);
        reports.extend(other.join().unwrap());
        reports
    });
    // No call is forgotten that one of them makes.
    let [called, told]: [BTreeSet<String>; 2] =
        [0, 1].map(|part| reports.iter().flat_map(|it| it[part].clone()).collect());
    assert_eq!(told, ASKED.iter().map(|it| it.to_string()).collect());
    let known = [ASKED, GIVES_BACK, ASKED_BESIDES].concat();
    assert!(called.iter().all(|it| known.contains(&it.as_str())), "{called:?}");
}

#[test]
fn what_the_driver_does_not_take_back_spoils_no_load() {
    let name = "gpu_faults::what_the_driver_does_not_take_back_spoils_no_load";
    let Some(fake) = Fake::over(name, |_| ()) else { return };
    let course = courses().into_iter().find(|it| it.strategy == Strategy::Stream).unwrap();
    let loads = Loads::new(course, &fake);
    let [_, all] = loads.goes_well();
    let load = |driver: &str| {
        fake.tell(driver);
        let open = loads.case.open();
        // What stays with the driver counts as held.
        open.plan(&loads.options).and_then(|plan| load_counted(&open, &plan, &Ledger::new()))
    };
    for function in GIVES_BACK {
        // Two behind each other, too.
        let n_all = all.get(*function).copied().unwrap_or(0);
        assert!(n_all > 0, "{function} is not called");
        let single = first_middle_last(n_all).into_iter().map(|number| (number, 1));
        for (number, n_times) in single.chain([(1, 2)]) {
            let words = format!("{function} fails {n_times} times, from call {number} of {n_all} on");
            let n_told = || fake.report().n_told_to_fail(function);
            let n_told_before = n_told();
            match load(&format!("{}fail {function} {number} 999 {n_times}", loads.driver)) {
                Ok(found) => assert!(found.tensors == loads.right, "{words}"),
                Err(error) => assert_eq!(error.kind(), "Device", "{words}: {error}"),
            }
            let n_told = n_told() - n_told_before;
            assert!(
                n_told > 0 || (number > 1 && AS_IT_COMES.contains(function)),
                "{words}: it was not called"
            );
            assert!(load(&loads.driver).unwrap().tensors == loads.right, "after {words}");
        }
    }
}
