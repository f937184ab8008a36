//! Loads neural-network weights with no extra weight.

pub mod checkpoint;
pub mod destination;
pub mod device;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod load;
pub mod memory;
pub mod plan;
pub mod progress;
pub mod source;
pub mod stamp;
pub mod tensor;

pub use checkpoint::{Checkpoint, Format};
pub use destination::{StateDict, TensorView};
pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use load::{Loaded, OpenCheckpoint, RunOptions};
pub use plan::{LoadPlan, PlanOptions, Strategy};
pub use progress::Progress;
