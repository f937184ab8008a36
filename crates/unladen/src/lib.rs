//! Loads neural-network weights with no extra weight.

pub mod checkpoint;
pub mod destination;
pub mod device;
pub mod dtype;
pub mod error;
pub mod format;
pub mod memory;
pub mod progress;
pub mod source;
pub mod stamp;
pub mod tensor;

pub use checkpoint::{Checkpoint, Format};
pub use destination::{StateDict, TensorView};
pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
