//! GPUs by their driver, loaded when it is asked for.
//!
//! What may not go before what is settled by who owns what: an [`InFlight`] owns its slot and a share of each target, a
//! slot its registration, and everything a share of its [`Context`], which therefore goes last.

mod context;
mod driver;
mod memory;
mod slot;
mod upload;

pub use context::{Context, gpus};
pub use driver::has_driver;
pub use memory::Memory;
pub use slot::Slot;
pub use upload::{InFlight, Upload};
