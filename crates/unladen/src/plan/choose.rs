//! Finds the plan that fits: tries the ways of loading and the sizes of staging, and says what would fit if none does.

use super::{
    Intent, LoadPlan, Machine, PlanOptions, Strategy, UNKNOWN_GPU_BYTES,
    generate::{self, Generator},
    granules,
    items::{Item, items},
    size::bookkeeping_bytes,
    staging::{MIN_CHUNK_BYTES, Ring, chunk_sizes, fewer, upload_sizes},
    steps::{Step, Steps},
};
use crate::{
    checkpoint::Checkpoint,
    device::{Device, PerDevice},
    error::{Error, Fault, Limit, Result},
    io_path::IoPath,
    memory::{Peaks, Space},
    stamp::fingerprint,
    tensor::{FileId, TensorId},
};

/// More than any machine addresses, and far enough below 2⁶⁴ that no sum of a plan overflows.
const MAX_PLAN_BYTES: u64 = 1 << 56;

/// Threads beyond this do not make a warm file come faster.
const MAX_THREADS: usize = 8;

/// More threads than this are not started, whoever asks for them.
const MAX_ASKED_THREADS: usize = 256;

/// Reads that a disk wants in flight at least: 8 MiB each, eight took three quarters of the time of four.
const MIN_DIRECT_THREADS: usize = 8;

pub(super) fn plan(checkpoint: &Checkpoint, options: &PlanOptions, machine: &Machine) -> Result<LoadPlan> {
    let request = Request::new(checkpoint, options, machine)?;
    match options.strategy {
        Some(strategy) => request.plan(strategy),
        None => request.fastest(),
    }
}

pub(super) fn plan_into_caller_memory(
    checkpoint: &Checkpoint,
    options: &PlanOptions,
    machine: &Machine,
) -> Result<LoadPlan> {
    if options.devices() != [Device::Host] {
        let fault = Fault::new("memory of the host to fill", "a load to a GPU");
        return Err(fault.hint("fill memory of the host, or load to the GPU into new memory").unsupported());
    }
    Request::new(checkpoint, options, machine)?
        .plan_with(Strategy::Stream, generate::steps_into_caller_memory)
}

struct Request<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a PlanOptions,
    machine: Machine,
    items: Vec<Item>,
    fingerprint: u64,
}

impl<'a> Request<'a> {
    fn new(
        checkpoint: &'a Checkpoint,
        options: &'a PlanOptions,
        machine: &'a Machine,
    ) -> Result<Request<'a>> {
        let items = items(checkpoint, options)?;
        let needed_bytes = items.iter().map(Item::len_bytes).fold(0, u64::saturating_add);
        let on_gpus = items.iter().filter(|it| it.device != Device::Host);
        let on_gpus_bytes = on_gpus.map(Item::len_bytes).fold(0, u64::saturating_add);
        let fingerprint = fingerprint(checkpoint.files.iter());
        let machine = Machine { io: paths_of(checkpoint, &machine.io), ..machine.clone() };
        let request = Request { checkpoint, options, machine, items, fingerprint };
        let max_on_gpus_bytes = options.devices().len() as u64 * UNKNOWN_GPU_BYTES;
        for (needed_bytes, most_bytes) in [(needed_bytes, MAX_PLAN_BYTES), (on_gpus_bytes, max_on_gpus_bytes)]
        {
            if needed_bytes > most_bytes {
                let what = options.strategy.map_or("any strategy", Strategy::name);
                let largest = request.largest();
                return Err(over(checkpoint, Limit::AddressSpace, what, largest, needed_bytes, most_bytes));
            }
        }
        Ok(request)
    }

    /// The largest tensor.
    fn largest(&self) -> Option<TensorId> {
        self.items.iter().max_by_key(|item| item.len_bytes()).map(|item| item.tensor)
    }

    /// The plan with the least work among those that fit; if there is none, the error of the way that comes nearest.
    fn fastest(&self) -> Result<LoadPlan> {
        // A file that shrinks while it is mapped kills the process: nobody's choice but the caller's.
        // To a GPU everything is copied, and faster from a file that is read.
        let may_map = self.options.intent == Intent::ReadOnly && !self.is_for_gpus();
        // What is packed cannot be mapped: to copy the rest from a mapping is `stream` with more work.
        let is_packed = self.checkpoint.n_packed() > 0;
        let suits = |it: &Strategy| match it {
            Strategy::MmapCopy => may_map && !is_packed,
            _ => may_map || !it.maps_files(),
        };
        let streamed = self.plan(Strategy::Stream);
        // Everybody else who reads reads no less, and has more memory to fill: only a mapping can be cheaper.
        let is_worth_it =
            |it: &Strategy| *it != Strategy::Stream && suits(it) && (streamed.is_err() || it.maps_files());
        let others: Vec<Strategy> = Strategy::all().filter(is_worth_it).collect();
        let (mut best, mut nearest) = match streamed {
            Ok(plan) if others.is_empty() => return Ok(plan),
            Ok(plan) => (Some((cost(&plan), Strategy::Stream)), None),
            Err(error) => (None, Some(error)),
        };
        // Of many tensors, two plans side by side would take more than the budget that each is made for: what is kept of each
        // is what it costs.
        for strategy in others {
            match self.plan(strategy).map(|plan| cost(&plan)) {
                Ok(cost) if best.is_none_or(|(least, _)| cost < least) => best = Some((cost, strategy)),
                Err(error) if nearest.as_ref().is_none_or(|it| distance(&error) < distance(it)) => {
                    nearest = Some(error);
                }
                Ok(_) | Err(_) => {}
            }
        }
        match best {
            Some((_, strategy)) => self.plan(strategy),
            None => Err(nearest.expect("strategies, each of which fits or does not")),
        }
    }

    fn plan(&self, strategy: Strategy) -> Result<LoadPlan> {
        self.plan_with(strategy, |generator| generate::steps(generator, strategy))
    }

    /// The plan with the largest staging that fits the budgets.
    fn plan_with(
        &self,
        strategy: Strategy,
        generate: impl Fn(&Generator<'_>) -> Result<Steps>,
    ) -> Result<LoadPlan> {
        let (mut leanest, mut leanest_on_devices): (Option<Outline>, Option<Outline>) = (None, None);
        // Mapped pages are brought in where they fit; what fits without that still fits.
        let populates = [true, false].into_iter().filter(|it| !it || self.may_populate());
        for (populates, ring) in populates.flat_map(|it| self.rings().map(move |ring| (it, ring))) {
            let generator = Generator {
                checkpoint: self.checkpoint,
                items: &self.items,
                machine: &self.machine,
                ring,
                populates,
                frees_singly: self.options.frees_singly,
            };
            let plan = self.sized(generate(&generator)?, strategy, ring);
            let fits_budget = plan.overhead_bytes() <= self.options.host_budget_bytes;
            let brought_in_bytes = if populates { plan.predicted.mapped_bytes } else { 0 };
            let needed_bytes = needed_of_machine_bytes(plan.predicted).saturating_add(brought_in_bytes);
            if fits_budget && needed_bytes <= self.machine.free_host_bytes {
                if self.check_devices(&plan).is_ok() {
                    return Ok(plan);
                }
                // What is widened on a GPU has scratch there, as large as the staging is.
                let on_devices = |it: &LoadPlan| it.predicted.device_bytes.total_bytes();
                if leanest_on_devices.as_ref().is_none_or(|it| on_devices(&plan) < on_devices(&it.plan)) {
                    leanest_on_devices = Some(Outline::new(plan));
                }
            } else if leanest.as_ref().is_none_or(|it| plan.overhead_bytes() < it.plan.overhead_bytes()) {
                leanest = Some(Outline::new(plan));
            }
        }
        if let Some(Outline { plan, .. }) = leanest_on_devices {
            self.check_devices(&plan)?;
        }
        let Outline { plan, largest } = leanest.expect("one size of staging at least");
        let (needed_bytes, budget_bytes) = (plan.overhead_bytes(), self.options.host_budget_bytes);
        let what = plan.strategy.name();
        if needed_bytes > budget_bytes {
            let tensor = largest.or(self.largest());
            return Err(over(self.checkpoint, Limit::HostBudget, what, tensor, needed_bytes, budget_bytes));
        }
        self.check_devices(&plan)?;
        let (needed_bytes, free_bytes) =
            (needed_of_machine_bytes(plan.predicted), self.machine.free_host_bytes);
        Err(over(self.checkpoint, Limit::FreeMemory, what, self.largest(), needed_bytes, free_bytes))
    }

    /// Sizes of staging from the fastest to the leanest. They do not depend on the budget, so that the leanest tells the
    /// smallest budget.
    fn rings(&self) -> impl Iterator<Item = Ring> {
        let is_for_gpus = self.is_for_gpus();
        let is_direct = self.paths().any(|it| it == IoPath::Direct);
        let suggested = self.machine.n_cores.clamp(1, MAX_THREADS);
        let suggested = if is_direct { suggested.max(MIN_DIRECT_THREADS) } else { suggested };
        let n_threads = self.options.n_threads.unwrap_or(suggested).clamp(1, MAX_ASKED_THREADS);
        let places_pages = self.machine.places_pages;
        let is_cached = self.paths().all(IoPath::is_mostly_cached);
        let ring = move |chunk_bytes, n_in_flight| Ring {
            n_threads,
            n_in_flight,
            chunk_bytes,
            places_pages,
            is_cached,
            widens_on_host: false,
        };
        let to_host = chunk_sizes(is_direct).filter(move |_| !is_for_gpus).map(move |it| ring(it, 0));
        let to_gpus =
            upload_sizes().filter(move |_| is_for_gpus).map(move |(chunk_bytes, n)| ring(chunk_bytes, n));
        let narrow = fewer(n_threads).map(move |n_threads| Ring {
            n_threads,
            n_in_flight: usize::from(is_for_gpus),
            chunk_bytes: MIN_CHUNK_BYTES,
            places_pages: false,
            is_cached,
            widens_on_host: false,
        });
        // What a GPU has no room to widen, the host does: sooner than that the buffers become small.
        let widens = self.widens_on_gpus();
        let on_host = move |ring| widens.then_some(Ring { widens_on_host: true, ..ring });
        let rings = to_host.chain(to_gpus).chain(narrow);
        rings.flat_map(move |ring| [ring].into_iter().chain(on_host(ring)))
    }

    /// True if elements for a GPU become wider, which takes memory there that is not the weights'.
    fn widens_on_gpus(&self) -> bool {
        let elem_bytes = |item: &Item| self.checkpoint.tensor(item.tensor).layout.dtype().size_bytes();
        let mut on_gpus = self.items.iter().filter(|it| it.device != Device::Host);
        on_gpus.any(|it| it.layout.dtype().size_bytes() > elem_bytes(it))
    }

    fn is_for_gpus(&self) -> bool {
        self.items.iter().any(|it| it.device != Device::Host)
    }

    /// How what holds tensors comes: not an archive whose records are all packed.
    fn paths(&self) -> impl Iterator<Item = IoPath> {
        let files = self.checkpoint.storages.iter().map(|it| it.file.0 as usize);
        files.map(|it| self.machine.io.get(it).copied().unwrap_or_default())
    }

    /// True if mappings stay, and what could be mapped fits into memory by itself.
    fn may_populate(&self) -> bool {
        let mapped = self.checkpoint.files.iter().filter(|it| it.packed.is_none());
        let mapped_bytes = mapped.map(|it| it.len_bytes).fold(0, u64::saturating_add);
        let is_kept = self.items.iter().any(|it| it.device == Device::Host);
        self.options.intent == Intent::ReadOnly && is_kept && mapped_bytes <= self.machine.free_host_bytes
    }

    /// Adds up what a plan takes.
    fn sized(&self, steps: Steps, strategy: Strategy, ring: Ring) -> LoadPlan {
        let n_slots = steps.n_slots();
        let steps = steps.into_vec();
        let mut plan = LoadPlan {
            bookkeeping_bytes: bookkeeping_bytes(self.checkpoint, &steps, ring.n_threads),
            steps,
            n_slots,
            strategy,
            devices: self.devices(),
            n_threads: ring.n_threads,
            io: self.machine.io.clone(),
            fingerprint: self.fingerprint,
            predicted: Peaks::default(),
            driver_bytes: PerDevice::default(),
            weights_bytes: PerDevice::default(),
        };
        let mut peaks = Peaks::default();
        let mut weights_bytes = PerDevice::default();
        // Held from the first step on, and if there is none.
        peaks.raise(plan.held_before());
        for held in plan.walk() {
            peaks.raise(held);
            weights_bytes = held.device_bytes;
        }
        (plan.predicted, plan.weights_bytes) = (peaks, weights_bytes);
        plan.driver_bytes = granules::taken_bytes(&plan.steps, plan.n_slots);
        plan
    }

    /// Where tensors go; the device that was named, if there are none.
    fn devices(&self) -> Vec<Device> {
        let mut devices: Vec<Device> = self.items.iter().map(|it| it.device).collect();
        devices.sort_unstable();
        devices.dedup();
        if devices.is_empty() { vec![self.options.device] } else { devices }
    }

    /// Checks what staging cannot change.
    fn check_devices(&self, plan: &LoadPlan) -> Result<()> {
        let over = |device: Device, limit: Limit, needed_bytes: u64, most_bytes: u64| {
            let what = match plan.devices[..] {
                [_] => plan.strategy.name().to_owned(),
                _ => format!("{} to {device}", plan.strategy),
            };
            let tensor = self.largest_on(device);
            Err(over(self.checkpoint, limit, &what, tensor, needed_bytes, most_bytes))
        };
        // What a load to GPUs leaves on the host is no device's.
        let is_for_gpus = self.is_for_gpus();
        let is_meant = move |(device, _): &(Device, u64)| !is_for_gpus || *device != Device::Host;
        let needed = plan.predicted.device_bytes.iter().filter(is_meant);
        // One budget for each: what the neediest device needs is what does.
        let budget_bytes = self.options.device_budget_bytes;
        if let Some((device, needed_bytes)) = needed.max_by_key(|(_, bytes)| *bytes)
            && needed_bytes > budget_bytes
        {
            return over(device, Limit::DeviceBudget, needed_bytes, budget_bytes);
        }
        // What is free is the driver's figure, so what is needed of it is the driver's too.
        let needed = plan.driver_bytes.iter().filter(|(device, _)| *device != Device::Host);
        let needed =
            needed.map(|(device, bytes)| (device, bytes, self.machine.free_device_bytes.get(device)));
        let short = needed.filter(|(_, needed_bytes, free_bytes)| needed_bytes > free_bytes);
        match short.max_by_key(|(_, needed_bytes, free_bytes)| needed_bytes - free_bytes) {
            Some((device, needed_bytes, free_bytes)) => {
                over(device, Limit::FreeDeviceMemory, needed_bytes, free_bytes)
            }
            None => Ok(()),
        }
    }

    fn largest_on(&self, device: Device) -> Option<TensorId> {
        let items = self.items.iter().filter(|it| it.device == device);
        items.max_by_key(|item| item.len_bytes()).map(|item| item.tensor)
    }
}

/// A plan without its steps, of which there may be many: what its error will say.
struct Outline {
    plan: LoadPlan,
    /// The tensor that the most memory besides the weights is for.
    largest: Option<TensorId>,
}

impl Outline {
    fn new(plan: LoadPlan) -> Outline {
        let largest = largest(&plan);
        Outline { plan: LoadPlan { steps: Vec::new(), ..plan }, largest }
    }
}

/// How bytes will come from each file, if they may come like this: packed records have a way of their own.
pub fn paths_of(checkpoint: &Checkpoint, io: &[IoPath]) -> Vec<IoPath> {
    let path = |(index, path): (usize, &IoPath)| match checkpoint.is_packed(FileId(index as u32)) {
        true => path.of_packed(),
        false => *path,
    };
    io.iter().enumerate().map(path).collect()
}

/// Anonymous memory, and the page tables for it and for what is mapped: 8 bytes a page.
fn needed_of_machine_bytes(peaks: Peaks) -> u64 {
    peaks.host_anon_bytes + (peaks.host_anon_bytes + peaks.mapped_bytes) / 512
}

/// How far a way of loading is from fitting. One that the host budget allows is nearer than one that it does not; then
/// whichever needs less.
fn distance(error: &Error) -> (bool, u64) {
    match error {
        Error::OverBudget { limit, needed_bytes, .. } => (*limit == Limit::HostBudget, *needed_bytes),
        _ => (true, u64::MAX),
    }
}

/// Bytes that pass through a processor, more or less: those of a mapping cost next to nothing until they are touched.
fn cost(plan: &LoadPlan) -> u64 {
    let of_step = |step: &Step| match step {
        Step::Reserve { len_bytes, space, .. } if *space != Space::Staging => *len_bytes,
        Step::Map { len_bytes, .. } => len_bytes / 32,
        Step::Fill(fills) => fills.iter().map(|it| it.target.len_bytes).sum(),
        Step::Stream { reads, .. } | Step::Upload { reads, .. } => reads.iter().map(|it| it.len_bytes).sum(),
        Step::Copy(copy) => 2 * copy.source.len_bytes,
        _ => 0,
    };
    plan.steps.iter().map(of_step).sum()
}

/// The tensor that the most memory besides the weights is for.
fn largest(plan: &LoadPlan) -> Option<TensorId> {
    let of_tensors = plan.steps.iter().filter_map(|step| match step {
        Step::Reserve { len_bytes, tensor: Some(tensor), .. } => Some((*len_bytes, *tensor)),
        _ => None,
    });
    of_tensors.max().map(|(_, tensor)| tensor)
}

fn over(
    checkpoint: &Checkpoint,
    limit: Limit,
    what: &str,
    tensor: Option<TensorId>,
    needed_bytes: u64,
    available_bytes: u64,
) -> Error {
    Error::OverBudget {
        path: checkpoint.path.clone(),
        tensor: tensor.map(|it| checkpoint.tensor(it).name.clone()),
        limit,
        what: what.to_owned(),
        needed_bytes,
        available_bytes,
    }
}
