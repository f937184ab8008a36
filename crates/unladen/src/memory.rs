//! Host memory: what a load owns, what it maps, and what the operating system says about both.

mod host;
mod ledger;
mod mapping;

pub use host::{HostBuffer, PAGE_BYTES};
pub use ledger::{Held, Ledger, Peaks, Reservation, Space};
pub use mapping::Mapping;

/// TEMP
pub fn available_bytes() -> Option<u64> {
    None
}
