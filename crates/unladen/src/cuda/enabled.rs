//! GPUs by their driver, loaded when it is asked for.
//!
//! What may not go before what is settled by who owns what: an [`InFlight`] owns its slot and a share of each target, a
//! slot its registration, and everything a share of its [`Context`], which therefore goes last.

mod casts;
mod context;
mod driver;
mod memory;
mod module;
mod slot;
mod upload;
mod version;

pub use casts::GpuCasts;
pub use context::{Context, gpus};
pub use driver::has_driver;
pub use memory::Memory;
pub use module::{Function, Module};
pub use slot::Slot;
pub use upload::{InFlight, Upload};
