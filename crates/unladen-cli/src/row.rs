//! What one load took: the line that `load --json` prints and `compare` reads.

use serde::{Deserialize, Serialize};

/// All sizes in bytes, over what the process held before the load.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Row {
    pub(crate) strategy: String,
    /// From the path to the weights: open, plan, run.
    pub(crate) load_s: f64,
    pub(crate) tensors: usize,
    /// Bytes of the tensors that were brought.
    pub(crate) bytes: u64,
    /// Memory that stays with them: the host's overhead is its peak less this.
    pub(crate) weights_bytes: u64,
    /// What the load was allowed besides; nothing: whatever it takes.
    pub(crate) host_budget_bytes: Option<u64>,
    /// How bytes came from the files.
    pub(crate) io: String,
    pub(crate) host_peak_anon_bytes: u64,
    pub(crate) host_peak_rss_bytes: u64,
    pub(crate) device_peak_bytes: u64,
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
