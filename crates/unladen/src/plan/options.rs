//! What the caller decides about a load, and what the plan must know of the machine.

use super::Strategy;
use crate::{
    cast::Casts,
    device::{Device, DeviceMap, PerDevice},
    error::{Error, Fault},
    io_path::IoPath,
};
use std::{fmt, str::FromStr};

/// What will happen to the weights: no one way of loading is best for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Intent {
    /// The caller may write to them, and a changed file must not change them.
    #[default]
    Private,
    /// They are only read, and the file stays as it is: its own pages will do.
    ReadOnly,
}

impl Intent {
    /// The name that commands take.
    pub fn name(self) -> &'static str {
        match self {
            Intent::Private => "private",
            Intent::ReadOnly => "read-only",
        }
    }
}

impl fmt::Display for Intent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Intent {
    type Err = Error;

    fn from_str(text: &str) -> Result<Intent, Error> {
        [Intent::Private, Intent::ReadOnly].into_iter().find(|it| it.name() == text).ok_or_else(|| {
            let fault = Fault::new("an intent (private, read-only)", format!("`{text}`"));
            fault.hint("`private` if the weights will be written to").mismatch()
        })
    }
}

/// What a load may hold in host memory besides the weights, unless the caller says otherwise.
pub const DEFAULT_HOST_BUDGET_BYTES: u64 = 64 << 20;

/// What the caller decides about a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// The way of loading; `None`: the fastest that fits the budgets and the intent.
    pub strategy: Option<Strategy>,
    /// What will happen to the weights. A strategy that is named overrides it.
    pub intent: Intent,
    /// Where the weights will stay.
    pub device: Device,
    /// Tensors that go elsewhere, by name.
    pub device_map: DeviceMap,
    /// Each tensor on a GPU has memory of its own, so that the caller can free it apart from the others. The driver rounds
    /// each up: to 512 bytes or, from 1 MiB on, to 2 MiB. Otherwise all of a GPU's tensors share one range.
    /// [`LoadPlan::predicted_driver_bytes`](super::LoadPlan::predicted_driver_bytes) says what either takes.
    pub frees_singly: bool,
    /// What the load may hold in host memory besides the weights: staging, copies, names and shapes, stacks of threads.
    /// [`u64::MAX`]: whatever it takes.
    pub host_budget_bytes: u64,
    /// What may be allocated on each device, the weights included: the bytes that drivers are asked for, like the ledger's.
    /// That they round them up counts where what is free is compared, whatever the budget. [`u64::MAX`]: what is free.
    pub device_budget_bytes: u64,
    /// Threads that read and copy, 256 at most; `None`: what the machine suggests.
    pub n_threads: Option<usize>,
    /// Element types that the weights shall have instead of those in the file.
    pub casts: Casts,
    /// How bytes come from the files; `None`: chosen for each file by what the page cache holds of it.
    pub io: Option<IoPath>,
    /// Leave what was read in the page cache, because other processes read the same file.
    pub share_cache: bool,
}

impl Default for PlanOptions {
    fn default() -> PlanOptions {
        PlanOptions {
            strategy: None,
            intent: Intent::default(),
            device: Device::default(),
            device_map: DeviceMap::default(),
            frees_singly: false,
            host_budget_bytes: DEFAULT_HOST_BUDGET_BYTES,
            device_budget_bytes: u64::MAX,
            n_threads: None,
            casts: Casts::default(),
            io: None,
            share_cache: false,
        }
    }
}

impl PlanOptions {
    /// A named strategy, the rest by default.
    pub fn new(strategy: Strategy) -> PlanOptions {
        PlanOptions { strategy: Some(strategy), ..PlanOptions::default() }
    }

    /// Where a tensor will stay.
    pub fn device_of(&self, name: &str) -> Device {
        self.device_map.device_of(name).unwrap_or(self.device)
    }

    /// Every device that tensors may go to, once.
    pub fn devices(&self) -> Vec<Device> {
        let mut devices: Vec<Device> = self.device_map.devices().chain([self.device]).collect();
        devices.sort_unstable();
        devices.dedup();
        devices
    }

    /// A named strategy that may take whatever it takes: to see what it costs.
    pub fn unlimited(strategy: Strategy) -> PlanOptions {
        PlanOptions { host_budget_bytes: u64::MAX, ..PlanOptions::new(strategy) }
    }
}

/// More than any GPU has, and not so much that a plan for it were endless.
pub const UNKNOWN_GPU_BYTES: u64 = 1 << 40;

/// What a plan must know of the machine that it will run on. The plan asks nobody: `load` does, or the caller says it of
/// a machine that is elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Host memory that can be had, page cache included.
    pub free_host_bytes: u64,
    /// What is free on GPUs, by their drivers, who take it in granules; of those that nobody asked, more than any has.
    pub free_device_bytes: PerDevice,
    /// Processors.
    pub n_cores: usize,
    /// How bytes come from each file, by position.
    pub io: Vec<IoPath>,
    /// Whole pages can be put in place, which is faster here than touching them.
    pub places_pages: bool,
}

impl Machine {
    /// One without any peculiarity, and with enough memory for everything.
    pub fn plain(n_cores: usize, n_files: usize) -> Machine {
        Machine {
            free_host_bytes: u64::MAX,
            free_device_bytes: PerDevice::of_each_gpu(UNKNOWN_GPU_BYTES),
            n_cores,
            io: vec![IoPath::Buffered; n_files],
            places_pages: false,
        }
    }
}
