//! Host memory: what a load owns, what it maps, and what the operating system says about both.

mod host;
mod mapping;

pub use host::{HostBuffer, PAGE_BYTES};
pub use mapping::Mapping;
