//! The commands, a file each.

pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod devices;
pub(crate) mod gpt2;
pub(crate) mod gpu_faults;
pub(crate) mod inspect;
pub(crate) mod load;
pub(crate) mod plan;
pub(crate) mod verify;
