//! The engine against an oracle: random checkpoints, by every way of loading, within every budget, over files and disks
//! that fail. The bytes must be those of a plain walk over the elements, and the ledger must equal the prediction.
//!
//! `UNLADEN_ORACLE_CASES` says how many checkpoints (1,000), `UNLADEN_ORACLE_FIRST` with which the count starts (0).

#![allow(clippy::print_stderr)]

mod budgets;
mod changes;
mod checkpoint;
mod expected;
#[cfg(feature = "cuda")]
#[path = "../common/fake_driver.rs"]
mod fake_driver;
mod faults;
#[path = "../common/faulty.rs"]
mod faulty;
#[cfg(feature = "cuda")]
mod giving_back;
#[cfg(feature = "cuda")]
mod gpu_faults;
#[cfg(feature = "cuda")]
mod gpus;
#[cfg(feature = "cuda")]
mod granules;
mod memory;
mod random;
mod run;
mod stopping;

use checkpoint::Case;
use expected::{Rules, is_float};
use faulty::Fault;
use random::Rng;
use run::{Spread, Watched, Way, caller_memory};
use std::{collections::HashMap, ops::Range, sync::Arc};
use unladen::{
    Casts, DType, Error, Intent, IoPath, LoadPlan, Machine, OpenCheckpoint, PlanOptions, Progress, StateDict,
    Strategy,
    device::PerDevice,
    error::Limit,
    memory::{Held, Ledger, evict},
    source::RawRead,
    tensor::Backing,
};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |it| it.parse().unwrap_or_else(|_| panic!("{variable}={it}")))
}

/// Numbers of the checkpoints of a test that tries this many by default.
fn seeds(n_cases: u64) -> Range<u64> {
    let first = number("UNLADEN_ORACLE_FIRST", 0);
    first..first + number("UNLADEN_ORACLE_CASES", 1000).min(n_cases)
}

#[test]
fn random_checkpoints_load_to_the_oracles_bytes_by_every_way() {
    let seeds = seeds(1000);
    let middle = seeds.start + (seeds.end - seeds.start) / 2;
    std::thread::scope(|scope| {
        for half in [seeds.start..middle, middle..seeds.end] {
            scope.spawn(move || half.for_each(|seed| some_ways(seed, Way::all())));
        }
    });
}

/// Loads one checkpoint by some of the ways, the rest drawn anew for each.
fn some_ways(seed: u64, ways: impl Iterator<Item = Way>) {
    let case = checkpoint::random(seed);
    let resolved = expected::resolved(&case);
    let rng = &mut Rng::new(!seed);
    for way in ways {
        // The checkpoints are many: half of the ways for each.
        if rng.one_in(2) {
            continue;
        }
        let rules = rules(rng, &case);
        let fault = match rng.below(6) {
            0 => Fault::Short(1 + rng.below(9000) as usize),
            1 => Fault::Interrupted,
            2 => rng.pick(&[Fault::DirectRefused(libc::EINVAL), Fault::DirectRefusedLater]),
            _ => Fault::Short(usize::MAX),
        };
        let open = case.open_with(fault, Arc::new(|_, _, _| {}));
        let (options, machine) = circumstances(rng, &case, &rules);
        let context =
            format!("UNLADEN_ORACLE_FIRST={seed}: {way:?}, {fault:?}, {rules:?}, {options:?}, {machine:?}");
        let plan = within_some_budget(rng, way, &open, options, &machine).expect(&context);
        if rng.one_in(30) {
            // So that there is something to read from the disk.
            open.files().stamps().iter().for_each(|it| {
                evict(&std::fs::File::open(&it.path).unwrap(), &it.path).unwrap();
            });
        }
        let ledger = Ledger::new();
        let progress = Progress::default();
        let mut memory = caller_memory(&case, &plan);
        let watched = Watched { progress: &progress, ledger: &ledger, after_step: &mut |_| {} };
        let state = run::run(&open, &plan, &mut memory, watched).expect(&context);
        assert_same(&case, &resolved, &rules, &state, &context);
        assert_apart(&case, &rules, way, &state, &context);
        let may_map =
            matches!(way, Way::Strategy(Strategy::Mmap) | Way::OnGpus(Strategy::Mmap, Spread::Several, _));
        assert!(!state.is_mapped() || may_map, "{context}");
        drop(state);
        assert_eq!(ledger.get().0, Held::default(), "{context}");
    }
}

/// Random casts, of some tensors or of all.
fn rules(rng: &mut Rng, case: &Case) -> Rules {
    let targets = [None, Some(DType::F64), Some(DType::F32), Some(DType::F16), Some(DType::BF16)];
    let mut rules = Rules::default();
    if rng.one_in(2) {
        return rules;
    }
    rules.all = rng.pick(&targets);
    let floats = case.tensors.iter().filter(|it| is_float(it.layout.dtype()));
    for tensor in floats {
        if rng.one_in(4) {
            rules.named.push((tensor.name.clone(), rng.pick(&targets)));
        }
    }
    rules
}

/// Everything about a load but its way and its budget.
fn circumstances(rng: &mut Rng, case: &Case, rules: &Rules) -> (PlanOptions, Machine) {
    let paths: Vec<_> = IoPath::all().collect();
    let n_files = case.n_files();
    let io = match rng.one_in(2) {
        true => vec![rng.pick(&paths); n_files],
        false => (0..n_files).map(|_| rng.pick(&paths)).collect(),
    };
    let machine = Machine { io, places_pages: rng.one_in(2), ..Machine::plain(2, n_files) };
    let options = PlanOptions {
        intent: rng.pick(&[Intent::Private, Intent::ReadOnly]),
        n_threads: Some(1 + rng.below(4) as usize),
        casts: Casts::parse(&rules.text()).unwrap(),
        ..PlanOptions::default()
    };
    (options, machine)
}

/// A plan for a budget between the smallest that works and any.
fn within_some_budget(
    rng: &mut Rng,
    way: Way,
    open: &OpenCheckpoint,
    mut options: PlanOptions,
    machine: &Machine,
) -> Result<LoadPlan, Error> {
    options.host_budget_bytes = 0;
    let needed_bytes = match way.plan(open, &options, machine) {
        Err(Error::OverBudget { limit: Limit::HostBudget, needed_bytes, .. }) => needed_bytes,
        other => panic!("a plan for no memory at all: {other:?}"),
    };
    options.host_budget_bytes = match rng.below(4) {
        0 => needed_bytes,
        1 => needed_bytes + rng.below(1 << 20),
        2 => needed_bytes + rng.below(8 << 20),
        _ => u64::MAX,
    };
    let mut machine = machine.clone();
    if matches!(way, Way::OnGpus(..)) && rng.one_in(4) {
        // A GPU with just enough: nothing is widened there.
        let full = Machine { free_device_bytes: PerDevice::default(), ..machine.clone() };
        if let Err(Error::OverBudget { limit: Limit::FreeDeviceMemory, needed_bytes, .. }) =
            way.plan(open, &options, &full)
        {
            machine.free_device_bytes = PerDevice::of_each_gpu(needed_bytes);
        }
    }
    let plan = way.plan(open, &options, &machine)?;
    assert!(plan.overhead_bytes() <= options.host_budget_bytes);
    Ok(plan)
}

/// Names, types, shapes and bytes are the oracle's, in its order.
fn assert_same(
    case: &Case,
    resolved: &[Option<Vec<u8>>],
    rules: &Rules,
    state: &StateDict<'_>,
    context: &str,
) {
    let with_data: Vec<_> = case
        .tensors
        .iter()
        .zip(resolved)
        .filter_map(|(tensor, bytes)| Some((tensor, bytes.as_ref()?)))
        .collect();
    assert_eq!(state.len(), with_data.len(), "{context}");
    for ((name, view), (tensor, bytes)) in state.iter().zip(with_data) {
        let from = tensor.layout.dtype();
        let to = rules.dtype_of(&tensor.name, from);
        assert_eq!((name, view.dtype, view.shape), (&*tensor.name, to, tensor.layout.shape()), "{context}");
        let mut found = Vec::new();
        view.for_each_chunk(|chunk| found.extend_from_slice(chunk)).unwrap();
        let expected = expected::cast(from, to, bytes);
        assert!(expected::are_equal(to, from != to, &found, &expected), "{tensor:?}\n{context}");
    }
}

/// Tensors of an owned state dict are row-major, aligned for their type, and share no byte unless they are tied.
fn assert_apart(case: &Case, rules: &Rules, way: Way, state: &StateDict<'_>, context: &str) {
    if !matches!(way, Way::Strategy(_)) {
        return;
    }
    let is_mapped = way == Way::Strategy(Strategy::Mmap);
    let mut first_of = HashMap::new();
    let mut ranges = Vec::new();
    let tensors: HashMap<_, _> = case.tensors.iter().map(|it| (it.name.as_str(), it)).collect();
    for (name, view) in state.iter().filter(|(_, view)| view.bytes.len_bytes() > 0) {
        let bytes = view.host_bytes().unwrap();
        let start = bytes.as_ptr().addr();
        let tensor = tensors[name];
        assert!(start.is_multiple_of(view.dtype.size_bytes() as usize), "{name} is not aligned, {context}");
        assert!(is_mapped || bytes.len() as u64 == tensor.layout.n_elems() * view.dtype.size_bytes());
        // Tied: one storage, one layout, and cast alike.
        if let Backing::Storage(storage) = tensor.backing {
            let key = (storage, &tensor.layout, rules.dtype_of(name, tensor.layout.dtype()));
            let first = *first_of.entry(key).or_insert((name, start));
            assert_eq!(first.1, start, "{name} is tied to {}, {context}", first.0);
            if first.0 != name {
                continue;
            }
        }
        ranges.push((start, start + bytes.len(), name));
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2).filter(|_| !is_mapped) {
        assert!(pair[0].1 <= pair[1].0, "{} and {} overlap, {context}", pair[0].2, pair[1].2);
    }
}
