//! Host memory: what a load owns, what it maps, and what the operating system says about both.

mod cgroup;
mod footprint;
mod host;
mod ledger;
mod mapping;
mod meter;
mod page_cache;
mod placing;

pub use cgroup::{available_bytes, cgroup_peak_bytes};
pub use footprint::{PACKED_CHUNK_BYTES, PROCESS_BYTES, STACK_BYTES, UNPACKING_BYTES, staging_bytes};
pub use host::{HostBuffer, PAGE_BYTES};
pub use ledger::{Held, Ledger, Peaks, Reservation, Space};
pub use mapping::Mapping;
pub use meter::{Measured, Method, measure};
pub use page_cache::{cached_bytes, cached_range_bytes, evict, warm};
pub use placing::{Placing, advise_huge, placing_wins};
