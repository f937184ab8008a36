//! Memory of a GPU: a few large ranges, from the driver and back to it without a pool, so that what is free is free.
#![allow(unsafe_code)]

use super::{
    context::Context,
    driver::{Driver, Failure, Handle},
};
use crate::{
    error::{Error, Result},
    memory::Reservation,
};
use std::{fmt, ops::Range, sync::Arc};

/// Memory of a GPU, of a fixed size. It is not zeroed: what somebody else left there can be read.
///
/// It is given back when this is dropped, or when the last copy into it ends that was in flight then. What is copied here
/// does not wait for copies in flight: who reads what they write waits for them first.
pub struct Memory {
    allocation: Arc<Allocation>,
}

/// What the driver gave. Whatever works on it later holds a share.
pub(super) struct Allocation {
    // Freed before the ledger hears of it and the context goes: `drop` comes first, then the fields in this order.
    address: u64,
    reservation: Reservation,
    context: Context,
}

impl Memory {
    /// Takes as many bytes from the driver as were reserved. No bytes are no call.
    pub fn new(context: &Context, reservation: Reservation) -> Result<Memory> {
        let len_bytes = reservation.len_bytes();
        let mut address = 0;
        if len_bytes > 0 {
            // SAFETY: the function writes an address to where it is told.
            let result =
                context.attempt(|driver| unsafe { driver.cuMemAlloc_v2(&mut address, to_usize(len_bytes)) });
            result.map_err(|failure| {
                let words = context.describe(failure);
                context.fault(format!("{words} for {len_bytes} bytes, {}", context.describe_memory()))
            })?;
        }
        let context = context.clone();
        Ok(Memory { allocation: Arc::new(Allocation { address, reservation, context }) })
    }

    /// How many bytes.
    pub fn len_bytes(&self) -> u64 {
        self.allocation.reservation.len_bytes()
    }

    /// The GPU's number.
    pub fn ordinal(&self) -> u32 {
        self.context().ordinal()
    }

    /// Where it lies on the GPU: a number for kernels and for other libraries, nothing that the host could reach. Of no
    /// bytes, 0.
    pub fn address(&self) -> u64 {
        self.allocation.address
    }

    /// The GPU.
    pub fn context(&self) -> &Context {
        &self.allocation.context
    }

    /// Copies bytes to the host. They are there on return.
    pub fn read(&self, start_byte: u64, target: &mut [u8]) -> Result<()> {
        let source = self.address_of(start_byte, target.len() as u64)?;
        if target.is_empty() {
            return Ok(());
        }
        self.context().call(|driver| {
            // SAFETY: `target` is borrowed exclusively until the function returns, which it does when all is copied; the
            // range lies in memory that `self` holds.
            unsafe { driver.cuMemcpyDtoH_v2(target.as_mut_ptr().cast(), source, target.len()) }
        })
    }

    /// Copies bytes from the host. They are there on return.
    pub fn write(&self, start_byte: u64, source: &[u8]) -> Result<()> {
        let target = self.address_of(start_byte, source.len() as u64)?;
        if source.is_empty() {
            return Ok(());
        }
        self.context().call(|driver| {
            // SAFETY: `source` is borrowed until the copy has ended, and the range lies in memory that `self` holds.
            unsafe { driver.cuMemcpyHtoD_v2(target, source.as_ptr().cast(), source.len()) }?;
            // The last piece may still be on its way from the driver's own buffer.
            end_of_copies(driver)
        })
    }

    /// Copies bytes from memory of the same GPU or another. They are there on return.
    ///
    /// Fails if both ranges share bytes.
    pub fn copy_from(
        &self,
        start_byte: u64,
        source: &Memory,
        source_byte: u64,
        len_bytes: u64,
    ) -> Result<()> {
        let target_address = self.address_of(start_byte, len_bytes)?;
        let source_address = source.address_of(source_byte, len_bytes)?;
        let is_shared = start_byte.abs_diff(source_byte) < len_bytes;
        if Arc::ptr_eq(&self.allocation, &source.allocation) && is_shared {
            let message = format!(
                "{len_bytes} bytes from byte {source_byte} on and from byte {start_byte} on overlap, and are not copied"
            );
            return Err(self.fault(message));
        }
        if len_bytes == 0 {
            return Ok(());
        }
        if self.context().is(source.context()) {
            return self.context().call(|driver| {
                // SAFETY: the ranges lie in memory that `self` and `source` hold, and which are borrowed until it is done.
                unsafe { driver.cuMemcpyDtoD_v2(target_address, source_address, to_usize(len_bytes)) }?;
                end_of_copies(driver)
            });
        }
        self.context().call(|driver| {
            // SAFETY: as above, and each range lies in the context that is named beside it.
            unsafe {
                driver.cuMemcpyPeer(
                    target_address,
                    self.context().handle(),
                    source_address,
                    source.context().handle(),
                    to_usize(len_bytes),
                )
            }
        })?;
        // It may return early, and waits for what either GPU does anyway.
        self.context().synchronize()?;
        source.context().synchronize()
    }

    /// Where some of its bytes lie. Fails if they are not all its own.
    pub(super) fn address_of(&self, start_byte: u64, len_bytes: u64) -> Result<u64> {
        let address = inside(self.len_bytes(), start_byte, len_bytes)
            .and_then(|range| self.address().checked_add(range.start));
        address.ok_or_else(|| self.fault(outside("memory", self.len_bytes(), start_byte, len_bytes)))
    }

    /// A share, for what has to outlive a copy.
    pub(super) fn share(&self) -> Arc<Allocation> {
        Arc::clone(&self.allocation)
    }

    fn fault(&self, message: String) -> Error {
        self.context().fault(message)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.address != 0 {
            // SAFETY: the address is what the driver gave, and is freed here alone. Nothing works on the memory: copies in
            // flight hold a share of it, and all others ended before they returned.
            //
            // If the GPU failed, its memory is lost with its context.
            let _ = self.context.attempt(|driver| unsafe { driver.cuMemFree_v2(self.address) });
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} bytes on {:?})", self.len_bytes(), self.context())
    }
}

/// Waits for the copies that have no stream of their own.
fn end_of_copies(driver: &Driver) -> Result<(), Failure> {
    // SAFETY: the null handle is the stream that is always there.
    unsafe { driver.cuStreamSynchronize(Handle::NULL) }
}

/// The range of so many bytes, if it lies in `whole_bytes`.
pub(super) fn inside(whole_bytes: u64, start_byte: u64, len_bytes: u64) -> Option<Range<u64>> {
    let end_byte = start_byte.checked_add(len_bytes)?;
    (end_byte <= whole_bytes).then_some(start_byte..end_byte)
}

/// What is wrong with a range that is not inside.
pub(super) fn outside(what: &str, whole_bytes: u64, start_byte: u64, len_bytes: u64) -> String {
    format!("{len_bytes} bytes from byte {start_byte} on lie outside of {what} of {whole_bytes} bytes")
}

/// The crate is for 64 bits.
pub(super) fn to_usize(len_bytes: u64) -> usize {
    len_bytes as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_inside_with_its_last_byte() {
        assert_eq!(inside(10, 0, 10), Some(0..10));
        assert_eq!(inside(10, 10, 0), Some(10..10));
        assert_eq!(inside(0, 0, 0), Some(0..0));
        for (start_byte, len_bytes) in [(0, 11), (1, 10), (10, 1), (11, 0), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(inside(10, start_byte, len_bytes), None, "{start_byte}, {len_bytes}");
        }
        assert_eq!(outside("memory", 10, 8, 4), "4 bytes from byte 8 on lie outside of memory of 10 bytes");
    }
}
