//! What one load took: the line that `load --json` prints and `compare` reads.

use serde::{Deserialize, Serialize};
use unladen::{Device, LoadPlan, Loaded};

/// All sizes in bytes, over what the process held before the load.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Row {
    pub(crate) strategy: String,
    /// From the path to the weights: open, plan, run.
    pub(crate) load_s: f64,
    pub(crate) tensors: usize,
    /// Bytes of the tensors that were brought.
    pub(crate) bytes: u64,
    /// Memory that stays with them, wherever it is.
    pub(crate) weights_bytes: u64,
    /// What of that is on the host: the host's overhead is its peak less this.
    pub(crate) weights_on_host_bytes: u64,
    /// They are views of the mapped file, and read when they are touched.
    pub(crate) is_mapped: bool,
    /// What the load was allowed besides; nothing: whatever it takes.
    pub(crate) host_budget_bytes: Option<u64>,
    /// How bytes came from the files.
    pub(crate) io: String,
    pub(crate) host_peak_anon_bytes: u64,
    pub(crate) host_peak_rss_bytes: u64,
    pub(crate) device_peak_bytes: u64,
    /// By how much the driver's free memory shrank at most, on all GPUs together; nothing: there were none.
    pub(crate) driver_peak_bytes: Option<u64>,
    /// Each device by itself, GPUs with the driver's figure.
    pub(crate) devices: Vec<DeviceRow>,
    /// Staging for GPUs was pinned; nothing: there was none.
    pub(crate) is_pinned: Option<bool>,
    /// Why it was not, in the driver's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) why_pageable: Option<String>,
    /// What it took to begin to use the GPUs, before the clock of the load; nothing: there were none.
    pub(crate) context_s: Option<f64>,
    /// What the driver took of the host's memory for that: no part of the load's peaks.
    pub(crate) context_host_anon_bytes: Option<u64>,
    /// Pages of mapped files, the forward pass included where one ran: a mapping is read when it is touched.
    pub(crate) mapped_peak_bytes: u64,
    pub(crate) predicted_host_peak_anon_bytes: u64,
    pub(crate) predicted_host_peak_rss_bytes: u64,
    pub(crate) predicted_device_peak_bytes: u64,
    pub(crate) predicted_mapped_peak_bytes: u64,
    /// How the host peaks were measured.
    pub(crate) measured_by: String,
    /// What the notebook measures: growth of RSS, polled every 0.1 s.
    pub(crate) notebook_rss_bytes: u64,
    /// Peak of this process's control group, if the system tells.
    pub(crate) cgroup_peak_bytes: Option<u64>,
    /// Of the checkpoint's files, if the system tells.
    pub(crate) page_cache_before_bytes: Option<u64>,
    pub(crate) page_cache_after_bytes: Option<u64>,
    /// One hash over names, types, shapes and bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<String>,
    /// The forward pass over three tokens, right after the load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) forward_s: Option<f64>,
}

/// What one load took of one device.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct DeviceRow {
    pub(crate) device: String,
    pub(crate) weights_bytes: u64,
    pub(crate) predicted_peak_bytes: u64,
    /// By the ledger.
    pub(crate) peak_bytes: u64,
    /// What the driver was to take, in whole granules; nothing for the host.
    pub(crate) predicted_driver_peak_bytes: Option<u64>,
    /// By how much the driver's free memory shrank at most; nothing for the host.
    pub(crate) driver_peak_bytes: Option<u64>,
}

/// What a load took of every device that it was for.
pub(crate) fn device_rows(plan: &LoadPlan, loaded: &Loaded<'_>) -> Vec<DeviceRow> {
    let if_gpu = |device: Device, bytes: u64| (device != Device::Host).then_some(bytes);
    let row = |device: &Device| DeviceRow {
        device: device.to_string(),
        weights_bytes: plan.weights_by_device().get(*device),
        predicted_peak_bytes: plan.predicted().device_bytes.get(*device),
        peak_bytes: loaded.peaks.device_bytes.get(*device),
        predicted_driver_peak_bytes: if_gpu(*device, plan.predicted_driver_bytes().get(*device)),
        driver_peak_bytes: if_gpu(*device, loaded.gpus.driver_peak_bytes.get(*device)),
    };
    plan.devices().iter().map(row).collect()
}
