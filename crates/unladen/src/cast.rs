//! Casts of elements between the floating-point types, rounded as PyTorch's `.to()` rounds: to nearest, ties to even,
//! too large to infinity, subnormals kept. Which tensors are cast is for [`Casts`] to say; moving bytes is the engine's.

mod rules;
#[cfg(test)]
mod tests;

pub use rules::Casts;

use crate::dtype::DType;
use half::{f16, slice::HalfFloatSliceExt};
use zerocopy::{FromBytes, IntoBytes};

/// What casts go between. Every cast passes by 32-bit floats: all but 64-bit floats widen to them without loss, and
/// PyTorch narrows 64-bit floats to 16 bits in these two steps as well. (Rounding twice is not rounding once where the
/// first step lands half-way between two 16-bit values; a cast here and a cast there should give the same bytes.)
const FLOATS: &[Float] = &[
    Float { dtype: DType::F64, to_f32: f64_to_f32, from_f32: f32_to_f64 },
    Float { dtype: DType::F32, to_f32: bytes_to_f32, from_f32: f32_to_bytes },
    Float { dtype: DType::F16, to_f32: f16_to_f32, from_f32: f32_to_f16 },
    Float { dtype: DType::BF16, to_f32: bf16_to_f32, from_f32: f32_to_bf16 },
];

struct Float {
    dtype: DType,
    to_f32: fn(&[u8], &mut [f32]),
    from_f32: fn(&[f32], &mut [u8]),
}

/// Elements that pass by the stack at once, where they cannot be cast straight from one side to the other.
const BLOCK_ELEMS: usize = 1024;

/// True if [`cast`] goes from the one type to the other: among 64-, 32- and 16-bit floats, and from any type to itself.
pub fn can_cast(from: DType, to: DType) -> bool {
    from == to || (float(from).is_some() && float(to).is_some())
}

/// Casts the whole elements of `source` to as many elements of `target`. Neither side need be aligned, but it is faster
/// if both are. A NaN stays a NaN, with an unspecified payload.
///
/// # Panics
/// If [`can_cast`] says no, or if the two sides do not hold the same number of whole elements.
pub fn cast(from: DType, to: DType, source: &[u8], target: &mut [u8]) {
    let (source_elem_bytes, target_elem_bytes) = (from.size_bytes() as usize, to.size_bytes() as usize);
    let n_elems = source.len() / source_elem_bytes;
    assert!(
        source.len() == n_elems * source_elem_bytes && target.len() == n_elems * target_elem_bytes,
        "{} bytes of {from} are not as many elements as {} bytes of {to}",
        source.len(),
        target.len(),
    );
    if from == to {
        return target.copy_from_slice(source);
    }
    let (Some(from), Some(to)) = (float(from), float(to)) else {
        panic!("there is no cast from {from} to {to}, as `can_cast` says");
    };
    if from.dtype == DType::F32
        && let Ok(source) = <[f32]>::ref_from_bytes(source)
    {
        return (to.from_f32)(source, target);
    }
    if to.dtype == DType::F32
        && let Ok(target) = <[f32]>::mut_from_bytes(target)
    {
        return (from.to_f32)(source, target);
    }
    let mut block = [0.0; BLOCK_ELEMS];
    let sources = source.chunks(BLOCK_ELEMS * source_elem_bytes);
    let targets = target.chunks_mut(BLOCK_ELEMS * target_elem_bytes);
    for (source, target) in sources.zip(targets) {
        let block = &mut block[..source.len() / source_elem_bytes];
        (from.to_f32)(source, block);
        (to.from_f32)(block, target);
    }
}

fn float(dtype: DType) -> Option<&'static Float> {
    FLOATS.iter().find(|it| it.dtype == dtype)
}

// The loops below are plain, over arrays of bytes, so that the compiler makes vector instructions of them whatever the
// alignment. 16-bit floats have instructions of their own, which `half` uses where the processor has them.

fn bytes_to_f32(source: &[u8], target: &mut [f32]) {
    target.as_mut_bytes().copy_from_slice(source);
}

fn f32_to_bytes(source: &[f32], target: &mut [u8]) {
    target.copy_from_slice(source.as_bytes());
}

fn f64_to_f32(source: &[u8], target: &mut [f32]) {
    for (target, source) in target.iter_mut().zip(source.as_chunks().0) {
        *target = f64::from_le_bytes(*source) as f32;
    }
}

fn f32_to_f64(source: &[f32], target: &mut [u8]) {
    for (target, source) in target.as_chunks_mut().0.iter_mut().zip(source) {
        *target = f64::from(*source).to_le_bytes();
    }
}

fn bf16_to_f32(source: &[u8], target: &mut [f32]) {
    for (target, source) in target.iter_mut().zip(source.as_chunks().0) {
        *target = f32::from_bits(u32::from(u16::from_le_bytes(*source)) << 16);
    }
}

/// Ours, because `half` does it without vector instructions.
fn f32_to_bf16(source: &[f32], target: &mut [u8]) {
    for (target, source) in target.as_chunks_mut().0.iter_mut().zip(source) {
        *target = nearest_bf16(*source).to_le_bytes();
    }
}

#[inline(always)]
fn nearest_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    // A bf16 is the upper half of the bits. What is added carries into it if the lower half is more than half a step,
    // or just that and the upper half is odd. A NaN could be carried to zero: it gets the bit that all NaNs may have.
    let is_odd = (bits >> 16) & 1;
    let rounded = if value.is_nan() { bits | 0x40_0000 } else { bits.wrapping_add(0x7fff + is_odd) };
    // The sign is shifted in, because the oldest vector instructions narrow nothing but signed integers.
    (rounded.cast_signed() >> 16) as u16
}

fn f16_to_f32(source: &[u8], target: &mut [f32]) {
    if let Ok(source) = <[f16]>::ref_from_bytes(source) {
        return source.convert_to_f32_slice(target);
    }
    let mut block = [f16::ZERO; BLOCK_ELEMS];
    for (source, target) in source.chunks(BLOCK_ELEMS * size_of::<f16>()).zip(target.chunks_mut(BLOCK_ELEMS))
    {
        let block = &mut block[..target.len()];
        block.as_mut_bytes().copy_from_slice(source);
        block.convert_to_f32_slice(target);
    }
}

fn f32_to_f16(source: &[f32], target: &mut [u8]) {
    if let Ok(target) = <[f16]>::mut_from_bytes(target) {
        return target.convert_from_f32_slice(source);
    }
    let mut block = [f16::ZERO; BLOCK_ELEMS];
    for (source, target) in source.chunks(BLOCK_ELEMS).zip(target.chunks_mut(BLOCK_ELEMS * size_of::<f16>()))
    {
        let block = &mut block[..source.len()];
        block.convert_from_f32_slice(source);
        target.copy_from_slice(block.as_bytes());
    }
}
