//! What the fuzz targets share: generators of files that are nearly good, and the promises that every file must keep.
//!
//! A generator takes [`Unstructured`] bytes and writes a whole file with a few lies in it, so that the fuzzer's bytes choose
//! which lies instead of looking for signatures. Bytes that have run out choose zeros, which must stand for the truth: the
//! rare cases are the highest numbers. A target for another container is a generator and one line under `targets/`.

pub mod archive;
pub mod dcp;
pub mod legacy;
pub mod pickle;
pub mod promises;
pub mod safetensors;
pub mod tar;
pub mod truth;
pub mod weight_map;

use arbitrary::{Result, Unstructured};

/// True once in `n` times, and never without bytes to choose from.
pub fn one_in(u: &mut Unstructured<'_>, n: u32) -> Result<bool> {
    Ok(u.int_in_range(1..=n)? == n)
}

/// The value, or now and then another one.
pub fn perhaps_lie<'a, T: arbitrary::Arbitrary<'a>>(u: &mut Unstructured<'a>, truth: T) -> Result<T> {
    if one_in(u, 24)? { u.arbitrary() } else { Ok(truth) }
}

/// A number as files have them, and as attackers write them: small, near a power of two, or any.
pub fn number(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=9)? {
        0 => u.arbitrary()?,
        1 => (1u64 << u.int_in_range(0..=63)?).wrapping_add(u.int_in_range(0..=2)?).wrapping_sub(1),
        _ => u.int_in_range(0..=6)?,
    })
}

/// Changes a few bytes anywhere, or cuts the end off.
pub fn damage(u: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> Result<()> {
    for _ in 0..u.int_in_range(0..=3)? {
        if let Some(last) = bytes.len().checked_sub(1) {
            bytes[u.int_in_range(0..=last)?] = u.arbitrary()?;
        }
    }
    match u.int_in_range(0..=15)? {
        14 => bytes.truncate(u.int_in_range(0..=bytes.len())?),
        15 => bytes.extend_from_slice(b"trailing"),
        _ => {}
    }
    Ok(())
}
