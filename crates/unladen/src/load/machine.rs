//! Asks the system what a plan must know: free memory, processors, and how each file is best read.

use super::gpus::Gpus;
use crate::{
    device::{Device, PerDevice},
    io_path::IoPath,
    memory::{available_bytes, placing_wins},
    plan::{Intent, Machine, PlanOptions, UNKNOWN_GPU_BYTES},
    source::{FileSet, io_paths},
};
use std::thread::available_parallelism;

/// Less than this is in memory before it is known how it comes there best.
const WORTH_PROBING_BYTES: u64 = 32 << 20;

/// What this machine is like for a load of these files. `may_place`: into memory that nobody has touched yet.
pub(super) fn machine(files: &FileSet, options: &PlanOptions, may_place: bool, gpus: &Gpus) -> Machine {
    let total_bytes: u64 = files.stamps().iter().map(|it| it.len_bytes).sum();
    Machine {
        free_host_bytes: available_bytes().unwrap_or(u64::MAX),
        free_device_bytes: free_device_bytes(options, gpus),
        n_cores: available_parallelism().map_or(2, |it| it.get()),
        io: paths(files, options),
        places_pages: total_bytes > WORTH_PROBING_BYTES && may_place && placing_wins(),
    }
}

/// What is free on the GPUs that are named, as far as they are there.
fn free_device_bytes(options: &PlanOptions, gpus: &Gpus) -> PerDevice {
    let mut free = PerDevice::of_each_gpu(UNKNOWN_GPU_BYTES);
    for device in options.devices() {
        if let Device::Cuda(ordinal) = device
            && let Ok(free_bytes) = gpus.open(ordinal).and_then(|it| it.free_bytes())
            && let Some(known) = free.get_mut(device)
        {
            *known = free_bytes;
        }
    }
    free
}

/// True if the weights become memory of their own. Pages of the file are not placed, and to try it would take more memory
/// than mapping them does.
pub(super) fn may_place(options: &PlanOptions) -> bool {
    let stays = options.devices().contains(&Device::Host);
    stays
        && match options.strategy {
            Some(strategy) => strategy.is_private(),
            None => options.intent == Intent::Private,
        }
}

/// How bytes come from each file: as the caller says, else as the page cache suggests.
fn paths(files: &FileSet, options: &PlanOptions) -> Vec<IoPath> {
    match options.io {
        Some(path) => vec![path; files.len()],
        None if options.share_cache => vec![IoPath::Buffered; files.len()],
        None => io_paths(files),
    }
}
