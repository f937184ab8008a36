//! Runs a plan with everything checked that must hold after every step and at the end.

use crate::checkpoint::Case;
use std::{collections::HashMap, sync::Arc};
use unladen::{
    Device, DeviceMap, Error, Intent, IoPath, LoadPlan, Machine, OpenCheckpoint, PlanOptions, Progress,
    Result, StateDict, Strategy,
    engine::{self, Io, Run},
    memory::{Held, Ledger},
    plan::Step,
    tensor::TensorId,
};

/// What a model that was not loaded is filled with: none of it may be left.
const INITIAL_VALUE: u8 = 0xA5;

/// A way of loading, or the caller's memory to load into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Strategy(Strategy),
    CallerMemory,
    /// To the first GPU, or to two of them with some tensors on the host; each with memory of its own or not.
    OnGpus(Strategy, Spread, bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spread {
    One,
    Several,
}

impl Way {
    pub(crate) fn all() -> impl Iterator<Item = Way> {
        Strategy::all().map(Way::Strategy).chain([Way::CallerMemory])
    }

    pub(crate) fn on_gpus() -> impl Iterator<Item = Way> {
        let spread = |strategy| {
            [Spread::One, Spread::Several]
                .into_iter()
                .flat_map(move |it| [false, true].map(|frees_singly| Way::OnGpus(strategy, it, frees_singly)))
        };
        Strategy::all().flat_map(spread)
    }

    pub(crate) fn plan(
        self,
        open: &OpenCheckpoint,
        options: &PlanOptions,
        machine: &Machine,
    ) -> Result<LoadPlan> {
        match self {
            Way::Strategy(strategy) => {
                LoadPlan::new(open, &PlanOptions { strategy: Some(strategy), ..options.clone() }, machine)
            }
            Way::CallerMemory => LoadPlan::into_caller_memory(open, options, machine),
            Way::OnGpus(strategy, spread, frees_singly) => {
                // Random names end in numbers.
                let device_map = match spread {
                    Spread::One => DeviceMap::default(),
                    Spread::Several => "*1=cuda:1,*3=host,*7=cuda:1,*4=host".parse()?,
                };
                let (strategy, device) = (Some(strategy), Device::Cuda(0));
                let options = PlanOptions { strategy, device, device_map, frees_singly, ..options.clone() };
                LoadPlan::new(open, &options, machine)
            }
        }
    }
}

/// A plan with two threads and whatever memory it takes, past the page cache or not, with pages put in place.
pub(crate) fn unlimited(way: Way, open: &OpenCheckpoint, path: IoPath) -> LoadPlan {
    let options = PlanOptions {
        host_budget_bytes: u64::MAX,
        n_threads: Some(2),
        intent: Intent::ReadOnly,
        ..PlanOptions::default()
    };
    let n_files = open.files().len();
    let machine = Machine { io: vec![path; n_files], places_pages: true, ..Machine::plain(2, n_files) };
    way.plan(open, &options, &machine).unwrap()
}

/// The caller's memory for each tensor of a plan that wants it. One byte off any alignment.
pub(crate) fn caller_memory(case: &Case, plan: &LoadPlan) -> Vec<Vec<u8>> {
    let mut memory = vec![Vec::new(); case.tensors.len()];
    let adopts = plan.steps().iter().any(|it| matches!(it, Step::Adopt { .. }));
    for (id, layout) in plan.layouts().filter(|_| adopts) {
        memory[id.0 as usize] = vec![INITIAL_VALUE; 1 + layout.len_bytes() as usize];
    }
    memory
}

/// What a run is given beside the plan.
pub(crate) struct Watched<'r> {
    pub(crate) progress: &'r Progress,
    pub(crate) ledger: &'r Arc<Ledger>,
    pub(crate) after_step: &'r mut dyn FnMut(usize),
}

/// Runs a plan. What is held after every step must be what was predicted.
pub(crate) fn run<'a>(
    open: &OpenCheckpoint,
    plan: &LoadPlan,
    memory: &'a mut [Vec<u8>],
    watched: Watched<'_>,
) -> Result<StateDict<'a>> {
    let predicted: Vec<Held> = plan.walk().collect();
    let mut n_steps = 0;
    let mut after_step = |number: usize, held| {
        assert_eq!(number, n_steps);
        assert_eq!(held, predicted[number], "after {:?}", plan.steps()[number]);
        n_steps += 1;
        (watched.after_step)(number);
    };
    let memory = memory.iter_mut().enumerate().filter(|(_, it)| !it.is_empty());
    let mut memory: HashMap<_, _> =
        memory.map(|(index, it)| (TensorId(index as u32), &mut it[1..])).collect();
    let run = Run {
        io: Io { path: &open.path, files: open.files(), progress: watched.progress },
        names: &|id| &open.tensor(id).name,
        ledger: Arc::clone(watched.ledger),
        open_gpu: &unladen::cuda::Context::open,
        initial_values: Some(&|_, bytes| bytes.fill(INITIAL_VALUE)),
        adopt: &mut |id| Ok(memory.remove(&id).expect("each tensor of the plan once")),
        after_step: &mut after_step,
    };
    let (state, _) = engine::run(plan, run)?;
    assert_eq!(n_steps, predicted.len());
    assert_eq!(watched.ledger.get().1, plan.predicted());
    let (done_bytes, total_bytes) = watched.progress.get();
    assert_eq!((done_bytes, total_bytes), (plan.work_bytes(), plan.work_bytes()));
    Ok(state)
}

/// Runs a plan that must fail; whatever it took must be given back.
pub(crate) fn error_of(
    case: &Case,
    open: &OpenCheckpoint,
    plan: &LoadPlan,
    progress: &Progress,
    after_step: &mut dyn FnMut(usize),
) -> Error {
    let ledger = Ledger::new();
    let mut memory = caller_memory(case, plan);
    let error = run(open, plan, &mut memory, Watched { progress, ledger: &ledger, after_step }).unwrap_err();
    assert_eq!(ledger.get().0, Held::default(), "{error}");
    assert!(!error.hint().is_empty());
    error
}

/// Runs a plan that must load the bytes of [`Case::of_bytes`], and give them back when they are dropped.
pub(crate) fn assert_loads(case: &Case, open: &OpenCheckpoint, plan: &LoadPlan) {
    let ledger = Ledger::new();
    let progress = Progress::default();
    let mut memory = caller_memory(case, plan);
    let watched = Watched { progress: &progress, ledger: &ledger, after_step: &mut |_| {} };
    let state = run(open, plan, &mut memory, watched).unwrap();
    assert!(state.get("t").unwrap().host_bytes().unwrap() == case.bytes[0], "{}", plan.strategy());
    drop(state);
    assert_eq!(ledger.get().0, Held::default());
}
