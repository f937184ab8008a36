//! Casts on a GPU, to wider floats: fewer bytes cross the bus when they are widened behind it.
#![allow(unsafe_code)]

use super::{
    context::Context,
    memory::Memory,
    module::{Function, Module},
};
use crate::{
    cuda::Arg,
    dtype::DType::{self, BF16, F16, F32, F64},
    error::Result,
};
use std::ops::Range;

/// What the kernels cast, and what they are called.
const CASTS: &[(DType, DType, &str)] = &[
    (F16, F32, "cast_f16_to_f32"),
    (BF16, F32, "cast_bf16_to_f32"),
    (F16, F64, "cast_f16_to_f64"),
    (BF16, F64, "cast_bf16_to_f64"),
    (F32, F64, "cast_f32_to_f64"),
];

const THREADS: u32 = 256;

/// About as many blocks as a large GPU runs at once; more elements than threads are taken in turns.
const MAX_BLOCKS: u64 = 1024;

/// The casts, compiled for one GPU.
#[derive(Debug)]
pub struct GpuCasts {
    functions: Vec<Function>, // as in CASTS
}

impl GpuCasts {
    /// Has the driver compile them.
    pub fn load(context: &Context) -> Result<GpuCasts> {
        let module = Module::load(context, include_str!("../kernels/cast.ptx"))?;
        let functions = CASTS.iter().map(|(_, _, name)| module.function(name));
        Ok(GpuCasts { functions: functions.collect::<Result<_>>()? })
    }

    /// True if [`GpuCasts::cast`] goes from the one type to the other: from a float to a wider one.
    pub fn can_cast(from: DType, to: DType) -> bool {
        position(from, to).is_some()
    }

    /// Casts `n_elems` elements, from some place to another, to the bits that the host's casts give. They are there on
    /// return; copies of an [`Upload`](super::Upload) go on meanwhile.
    ///
    /// Fails if there is no such cast, if a range does not lie inside its memory or is not aligned for its elements, if the
    /// two overlap, or if they lie on another GPU.
    pub fn cast(
        &self,
        [from, to]: [DType; 2],
        (source, source_byte): (&Memory, u64),
        (target, target_byte): (&Memory, u64),
        n_elems: u64,
    ) -> Result<()> {
        let function = position(from, to).and_then(|at| self.functions.get(at));
        let no_cast = || source.context().fault(format!("there is no cast from {from} to {to} on a GPU"));
        let function = function.ok_or_else(no_cast)?;
        let range = |memory: &Memory, start_byte: u64, dtype: DType| -> Result<Range<u64>> {
            let len_bytes = n_elems.saturating_mul(dtype.size_bytes());
            let address = memory.address_of(start_byte, len_bytes)?;
            if !address.is_multiple_of(dtype.size_bytes()) {
                return Err(function.fault(&format!("{dtype} at {address:#x} is not aligned")));
            }
            Ok(address..address + len_bytes)
        };
        let read = range(source, source_byte, from)?;
        let written = range(target, target_byte, to)?;
        if read.start < written.end && written.start < read.end {
            return Err(function.fault("source and target overlap"));
        }
        let n_blocks = n_elems.div_ceil(u64::from(THREADS)).min(MAX_BLOCKS) as u32;
        let args = [Arg::Memory(target, target_byte), Arg::Memory(source, source_byte), Arg::U64(n_elems)];
        // SAFETY: these are the parameters of a cast. It reads `n_elems` elements of the one type and writes as many of the
        // other, whatever the number of threads: both ranges lie inside their memory, aligned, and the memory is borrowed
        // until the kernel has ended, which is waited for even if the launch says that it failed.
        let launched = unsafe { function.launch(n_blocks, THREADS, &args) };
        launched.and(function.wait())
    }
}

fn position(from: DType, to: DType) -> Option<usize> {
    CASTS.iter().position(|&(source, target, _)| (source, target) == (from, to))
}
