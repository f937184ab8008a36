//! NVIDIA GPUs: the only calls of their driver. The driver's library is looked for when the first of them is made, so one
//! program runs with and without it.
//!
//! Without the feature `cuda` everything has the same shape, and whatever would reach for a driver says that it cannot.
//!
//! Whoever calls keeps the CUDA context that is current on the thread. Everything here may be used, and dropped, by any
//! thread.

use crate::error::Result;

#[cfg(not(feature = "cuda"))]
mod disabled;
#[cfg(feature = "cuda")]
mod enabled;

#[cfg(not(feature = "cuda"))]
pub use disabled::{Context, Function, GpuCasts, InFlight, Memory, Module, Slot, Upload, gpus, has_driver};
#[cfg(feature = "cuda")]
pub use enabled::{Context, Function, GpuCasts, InFlight, Memory, Module, Slot, Upload, gpus, has_driver};

/// What the driver knows of this machine.
#[derive(Debug)]
pub struct Gpus {
    /// The newest CUDA that it speaks: `(13, 0)`.
    pub cuda_version: (u32, u32),
    /// Its own version, as `nvidia-smi` shows it: `550.54.15`. `None`: the system does not tell.
    pub driver_version: Option<String>,
    /// Those that this process may see, by their ordinals.
    pub gpus: Vec<Gpu>,
}

/// A GPU.
#[derive(Debug)]
pub struct Gpu {
    /// Its number: the 0 of `cuda:0`.
    pub ordinal: u32,
    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its memory.
    pub total_bytes: u64,
    /// What of it is free once this process has set foot on it. Fails where it may not.
    pub free_bytes: Result<u64>,
    /// What it can compute: `(9, 0)`.
    pub compute_capability: (u32, u32),
}

/// Bytes of a slot, and where on the device they go.
#[derive(Clone, Copy, Debug)]
pub struct SlotCopy<'m> {
    /// Where they start in the slot.
    pub slot_byte: u64,
    /// How many; of one line, if there are several.
    pub len_bytes: u64,
    /// The memory that they go to.
    pub target: &'m Memory,
    /// Where they start in it.
    pub target_byte: u64,
    /// More of the same, at equal distances.
    pub lines: Lines,
}

/// How often equally long runs of bytes are copied, and how far from each other they lie. Lines do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lines {
    /// How many there are.
    pub count: u64,
    /// From the start of one to the start of the next, in the slot.
    pub slot_step_bytes: u64,
    /// The same on the device.
    pub target_step_bytes: u64,
}

impl Lines {
    /// A single one.
    pub const ONE: Lines = Lines { count: 1, slot_step_bytes: 0, target_step_bytes: 0 };
}

/// What a kernel is given for a parameter.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'m> {
    /// For a pointer: an address in memory on the GPU, so many bytes from its start.
    Memory(&'m Memory, u64),
    /// For a number of 32 bits.
    U32(u32),
    /// For a number of 64 bits. For a pointer, 0 is the null pointer.
    U64(u64),
    /// For a `float`.
    F32(f32),
}

/// The device that a GPU is, as the user spells it.
fn device_name(ordinal: u32) -> String {
    format!("cuda:{ordinal}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType,
        memory::{HostBuffer, Reservation},
    };

    /// Compiled with and without the feature: both twins have this shape.
    #[test]
    #[expect(clippy::type_complexity, reason = "types are what this is about")]
    fn what_is_there_has_the_same_shape_without_cuda() {
        fn any_thread<T: Send + Sync + std::fmt::Debug>() {}
        let _: fn() -> bool = has_driver;
        let _: fn() -> Result<Gpus> = gpus;
        let _: fn(u32) -> Result<Context> = Context::open;
        let _: fn(&Context) -> u32 = Context::ordinal;
        let _: fn(&Context) -> Result<u64> = Context::free_bytes;
        let _: fn(&Context) -> Result<()> = Context::synchronize;
        let _: fn(&Context) -> Context = Clone::clone;
        let _: fn(&Context, Reservation) -> Result<Memory> = Memory::new;
        let _: fn(&Memory) -> u64 = Memory::len_bytes;
        let _: fn(&Memory) -> u32 = Memory::ordinal;
        let _: fn(&Memory) -> u64 = Memory::address;
        let _: fn(&Memory) -> &Context = Memory::context;
        let _: fn(&Memory, u64, &mut [u8]) -> Result<()> = Memory::read;
        let _: fn(&Memory, u64, &[u8]) -> Result<()> = Memory::write;
        let _: fn(&Memory, u64, &Memory, u64, u64) -> Result<()> = Memory::copy_from;
        let _: fn(HostBuffer, &[Context]) -> Result<Slot> = Slot::new;
        let _: fn(&Slot) -> bool = Slot::is_pinned;
        let _: fn(&Slot) -> Option<&str> = Slot::why_pageable;
        let _: fn(&Slot) -> &[u8] = Slot::as_slice;
        let _: fn(&mut Slot) -> &mut [u8] = Slot::as_mut_slice;
        let _: fn(Slot) -> Result<HostBuffer> = Slot::into_buffer;
        let _: fn(&Context) -> Result<Upload> = Upload::new;
        let _: fn(&Upload, Slot, &[SlotCopy<'_>]) -> Result<InFlight> = Upload::submit;
        let _: fn(&InFlight) -> Result<bool> = InFlight::is_done;
        let _: fn(InFlight) -> Result<Slot> = InFlight::wait;
        let _: fn(&Context, &str) -> Result<Module> = Module::load;
        let _: fn(&Module, &str) -> Result<Function> = Module::function;
        let _: unsafe fn(&Function, u32, u32, &[Arg<'_>]) -> Result<()> = Function::launch;
        let _: fn(&Context) -> Result<GpuCasts> = GpuCasts::load;
        let _: fn(DType, DType) -> bool = GpuCasts::can_cast;
        let _: fn(&GpuCasts, [DType; 2], (&Memory, u64), (&Memory, u64), u64) -> Result<()> = GpuCasts::cast;
        any_thread::<Module>();
        any_thread::<Function>();
        any_thread::<GpuCasts>();
        any_thread::<Context>();
        any_thread::<Memory>();
        any_thread::<Slot>();
        any_thread::<Upload>();
        any_thread::<InFlight>();
        // Nothing stands behind a `Context` that was not opened, on machines with a driver and without.
        assert_eq!(Context::open(u32::MAX).unwrap_err().kind(), "Device");
    }
}
