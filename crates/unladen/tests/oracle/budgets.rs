//! Budgets: what an error says is needed is what works, to the byte, and a plan that is given keeps to what it was allowed.

use crate::{
    checkpoint::{self, Case},
    circumstances,
    random::Rng,
    rules,
    run::Way,
    seeds,
};
use unladen::{
    DType, Error, Intent, LoadPlan, Machine, OpenCheckpoint, PlanOptions, Strategy,
    device::PerDevice,
    error::Limit,
    tensor::{Backing, Layout},
};

/// What a plan needs of one kind, by asking for a plan without any. `None` if it needs none.
fn needed(
    case: &Case,
    limit: Limit,
    plan: &dyn Fn(u64) -> Result<LoadPlan, Error>,
    context: &str,
) -> Option<u64> {
    let error = match plan(0) {
        Ok(_) => return None,
        Err(error) => error,
    };
    let with_data = case.tensors.iter().filter(|it| it.backing != Backing::Meta);
    let has_data = with_data.map(|it| it.layout.len_bytes()).sum::<u64>() > 0;
    let Error::OverBudget { limit: found, needed_bytes, available_bytes, tensor, path, .. } = error else {
        panic!("{error}, {context}")
    };
    assert_eq!((found, available_bytes), (limit, 0), "{context}");
    assert_eq!(path.parent(), case.paths[0].parent().and_then(|it| it.parent()));
    assert!(
        tensor.is_some_and(|it| case.tensors.iter().any(|tensor| tensor.name == it)) || !has_data,
        "{context}"
    );
    assert!(plan(needed_bytes).is_ok(), "{needed_bytes} bytes are said to do, {context}");
    let again = plan(needed_bytes - 1).expect_err(context);
    let is_same = matches!(again, Error::OverBudget { limit: found, needed_bytes: same, .. }
        if found == limit && same == needed_bytes);
    assert!(is_same, "{needed_bytes} bytes: {again}, {context}");
    Some(needed_bytes)
}

#[test]
fn what_is_needed_works_and_a_byte_less_does_not() {
    for seed in seeds(300) {
        let case = checkpoint::random(seed);
        let open = case.open();
        let rng = &mut Rng::new(!seed);
        let rules = rules(rng, &case);
        let (options, machine) = circumstances(rng, &case, &rules);
        for way in Way::all().chain(Way::on_gpus().filter(|_| seed % 3 == 0)) {
            let context = format!("UNLADEN_ORACLE_FIRST={seed}: {way:?}, {options:?}, {machine:?}");
            let host = |bytes| {
                let options = PlanOptions { host_budget_bytes: bytes, ..options.clone() };
                let plan = way.plan(&open, &options, &machine)?;
                assert!(plan.overhead_bytes() <= bytes, "{context}");
                Ok(plan)
            };
            let budget_bytes = needed(&case, Limit::HostBudget, &host, &context);
            let budget_bytes = budget_bytes.expect("a load needs something");
            // The rest at the smallest budget, where staging is smallest, and without one.
            for host_budget_bytes in [budget_bytes, u64::MAX] {
                let options = PlanOptions { host_budget_bytes, ..options.clone() };
                let device = |bytes| {
                    way.plan(&open, &PlanOptions { device_budget_bytes: bytes, ..options.clone() }, &machine)
                };
                needed(&case, Limit::DeviceBudget, &device, &context);
                let free =
                    |bytes| way.plan(&open, &options, &Machine { free_host_bytes: bytes, ..machine.clone() });
                needed(&case, Limit::FreeMemory, &free, &context);
                let free_on_gpus = |bytes| {
                    let free_device_bytes = PerDevice::of_each_gpu(bytes);
                    way.plan(&open, &options, &Machine { free_device_bytes, ..machine.clone() })
                };
                if matches!(way, Way::OnGpus(..)) {
                    needed(&case, Limit::FreeDeviceMemory, &free_on_gpus, &context);
                }
            }
        }
    }
}

#[test]
fn staging_shrinks_to_the_memory_that_is_free() {
    let case = strided();
    let open = case.open();
    let options =
        PlanOptions { host_budget_bytes: u64::MAX, n_threads: Some(4), ..PlanOptions::new(Strategy::Stream) };
    let roomy = LoadPlan::new(&open, &options, &Machine::plain(4, 1)).unwrap();
    let free_host_bytes = roomy.predicted().host_anon_bytes - (1 << 20);
    let tight = LoadPlan::new(&open, &options, &Machine { free_host_bytes, ..Machine::plain(4, 1) }).unwrap();
    assert!(tight.predicted().host_anon_bytes < free_host_bytes);
    assert_eq!(tight.weights_bytes(), roomy.weights_bytes());
}

/// Four mebibytes, transposed, so that every byte goes by way of staging.
fn strided() -> Case {
    let mut case = Case::of_files(vec![vec![1; 4 << 20]]);
    case.add_storage(0, 0, 4 << 20, false);
    case.add_tensor("t", Layout::strided(DType::F32, &[1024, 1024], &[1, 1024], 0).unwrap(), 0);
    case
}

/// The plan of `auto`.
fn auto(
    open: &OpenCheckpoint,
    intent: Intent,
    host_budget_bytes: u64,
    free_host_bytes: u64,
) -> Result<LoadPlan, Error> {
    let options = PlanOptions { intent, host_budget_bytes, ..PlanOptions::default() };
    LoadPlan::new(open, &options, &Machine { free_host_bytes, ..Machine::plain(2, open.files().len()) })
}

#[test]
fn auto_streams_for_private_and_maps_for_read_only() {
    for seed in seeds(300) {
        let case = checkpoint::random(seed);
        let open = case.open();
        let plan = |intent| auto(&open, intent, u64::MAX, u64::MAX).unwrap();
        assert_eq!(plan(Intent::Private).strategy(), Strategy::Stream, "{seed}");
        let read_only = plan(Intent::ReadOnly).strategy();
        assert!(matches!(read_only, Strategy::Mmap | Strategy::Stream), "{seed}: {read_only}");
    }
    let case = Case::of_bytes(100_000);
    let open = case.open();
    assert_eq!(auto(&open, Intent::ReadOnly, u64::MAX, u64::MAX).unwrap().strategy(), Strategy::Mmap);
    // It still fits if the file does not: pages come when they are touched, and go again.
    let plan = auto(&open, Intent::ReadOnly, 4 << 20, 2 << 20).unwrap();
    assert_eq!(plan.strategy(), Strategy::Mmap);
}

#[test]
fn auto_never_maps_for_private_whatever_the_budget() {
    for seed in seeds(200) {
        let case = checkpoint::random(seed);
        let open = case.open();
        let plan = |bytes| auto(&open, Intent::Private, bytes, u64::MAX);
        let Err(Error::OverBudget { needed_bytes, .. }) = plan(0) else {
            panic!("{seed}: a plan for no memory")
        };
        let rng = &mut Rng::new(seed);
        for budget_bytes in
            [needed_bytes, needed_bytes + rng.below(1 << 20), needed_bytes + rng.below(16 << 20)]
        {
            let plan = plan(budget_bytes).unwrap();
            assert!(!plan.strategy().maps_files(), "{seed}, {budget_bytes} bytes: {}", plan.strategy());
        }
        assert!(plan(needed_bytes - 1).is_err());
    }
}

#[test]
fn auto_says_what_the_nearest_way_needs() {
    let case = Case::of_bytes(3 << 20);
    let open = case.open();
    // The host budget does for `stream`; `sequential` would break it by a figure that is smaller than what is missing.
    let error = auto(&open, Intent::Private, 2 << 20, 1 << 20).unwrap_err();
    let Error::OverBudget { limit: Limit::FreeMemory, needed_bytes, ref what, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(what, "stream");
    assert!(auto(&open, Intent::Private, 2 << 20, needed_bytes).is_ok());
}

#[test]
fn what_is_read_only_and_larger_than_memory_is_not_brought_in() {
    let case = Case::of_bytes(3 << 20);
    let open = case.open();
    let n_populated = |free_host_bytes| {
        let plan = auto(&open, Intent::ReadOnly, u64::MAX, free_host_bytes).unwrap();
        plan.steps().iter().filter(|it| matches!(it, unladen::plan::Step::Populate { .. })).count()
    };
    assert_eq!((n_populated(u64::MAX), n_populated(2 << 20)), (1, 0));
}
