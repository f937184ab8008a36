//! Loads neural-network weights with no extra weight: a checkpoint goes from disk to the memory where it will be used,
//! while everything that the load itself needs is planned, counted and said beforehand.
//!
//! ```no_run
//! use unladen::Strategy;
//!
//! let checkpoint = unladen::open("gpt2.pth")?; // headers only
//! let loaded = checkpoint.load(Strategy::Stream)?;
//! let weight = loaded.state.get("tok_emb.weight").expect("a tensor of that name");
//! let elements: &[f32] = weight.contiguous()?; // in place, no copy
//! # Ok::<(), unladen::Error>(())
//! ```
//!
//! Data flows one way: [`source`] → [`format`](mod@format) → [`checkpoint`] → [`plan`] → [`engine`] → [`destination`].

// Offsets become `usize` without loss, and numbers in memory are in the order that formats write them in.
#[cfg(not(all(target_os = "linux", target_endian = "little", target_pointer_width = "64")))]
compile_error!("unladen is for 64-bit little-endian Linux");

pub mod cast;
pub mod checkpoint;
pub mod contents;
pub mod cuda;
pub mod destination;
pub mod device;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod format;
pub mod io_path;
pub mod load;
pub mod memory;
pub mod plan;
pub mod progress;
pub mod save;
pub mod source;
pub mod stamp;
pub mod tensor;
pub mod verify;

pub use cast::Casts;
pub use checkpoint::{Checkpoint, Format};
pub use destination::{StateDict, TensorBuffer, TensorView};
pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use format::{Limits, OpenOptions};
pub use io_path::IoPath;
pub use load::{Loaded, OpenCheckpoint, RunOptions, open, open_with};
pub use plan::{Intent, LoadPlan, Machine, PlanOptions, Strategy};
pub use progress::Progress;
