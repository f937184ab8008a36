//! From headers to checkpoints.

pub mod names;
