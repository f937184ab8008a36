//! A staging buffer that the driver knows: pinned, so that it copies from there by itself while the processor works.
#![allow(unsafe_code)]

use super::{
    context::Context,
    driver::{Failure, Handle},
};
use crate::{
    error::{Error, Result},
    memory::HostBuffer,
};
use std::{ffi::c_uint, fmt, mem};

/// Pinned for every context, not only for the one that is current.
const PORTABLE: c_uint = 1;

/// No times are kept, and who waits sleeps: the processors are for those who read and cast.
const QUIET: c_uint = BLOCKING | WITHOUT_TIMES;
const BLOCKING: c_uint = 1;
const WITHOUT_TIMES: c_uint = 2;

/// A staging buffer, pinned where the driver allows it.
///
/// Copies from pageable memory are right too, and slower: the driver takes them through a buffer of its own, and may only
/// return when it has.
pub struct Slot {
    /// Where the buffer is registered, or why it is pageable.
    pinning: Result<Context, String>,
    /// `None` once it was handed back.
    buffer: Option<HostBuffer>,
    /// From the last copies out of it, for the next.
    pub(super) event: Option<Event>,
}

impl Slot {
    /// Pins a buffer for copies to any GPU; the first of `contexts` answers for it. Its pages become resident.
    ///
    /// If the driver does not pin it, it stays pageable, and [`Slot::why_pageable`] says why. Fails only if a GPU that is
    /// used no longer answers.
    pub fn new(buffer: HostBuffer, contexts: &[Context]) -> Result<Slot> {
        let mut slot = Slot { pinning: Err(String::new()), buffer: Some(buffer), event: None };
        let bytes = slot.as_mut_slice();
        let Some(context) = contexts.first() else {
            return Ok(slot.pageable("there is no GPU that it is for"));
        };
        if bytes.is_empty() {
            return Ok(slot.pageable("it is empty"));
        }
        let (start, len) = (bytes.as_mut_ptr(), bytes.len());
        let pinned = context.call(|driver| {
            // SAFETY: the range is the whole of `buffer`, an anonymous mapping of its own. It stays mapped until it is no
            // longer registered: `slot` owns it, and `unpin` comes before it is handed back or dropped.
            Ok(unsafe { driver.cuMemHostRegister_v2(start.cast(), len, PORTABLE) })
        })?;
        match pinned {
            Ok(()) => slot.pinning = Ok(context.clone()),
            Err(failure) => return Ok(slot.pageable(&context.describe(failure))),
        }
        // A process that is forked must not share the pages: the first write afterwards would move them, away from where
        // the driver reads.
        slot.advise(libc::MADV_DONTFORK);
        Ok(slot)
    }

    fn pageable(mut self, why: &str) -> Slot {
        self.pinning = Err(why.to_owned());
        self
    }

    /// True if the driver copies from it by itself.
    pub fn is_pinned(&self) -> bool {
        self.pinning.is_ok()
    }

    /// Why it is not pinned, if it is not.
    pub fn why_pageable(&self) -> Option<&str> {
        self.pinning.as_ref().err().map(String::as_str)
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], HostBuffer::as_slice)
    }

    /// The bytes, to be written. Nobody reads them meanwhile: a slot in flight is not at hand.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.buffer.as_mut().map_or(&mut [], HostBuffer::as_mut_slice)
    }

    /// The buffer, no longer pinned. Fails if the driver does not let go of it; then it stays where it is for good.
    pub fn into_buffer(mut self) -> Result<HostBuffer> {
        self.unpin()?;
        self.buffer.take().ok_or_else(|| Error::Device {
            device: "cuda".to_owned(),
            message: "the slot was handed back before".to_owned(),
        })
    }

    fn unpin(&mut self) -> Result<()> {
        let Ok(context) = &self.pinning else { return Ok(()) };
        let context = context.clone();
        let start = self.as_mut_slice().as_mut_ptr();
        context.call(|driver| {
            // SAFETY: the buffer was registered by this start. No copy out of it is in flight: a slot in flight belongs to
            // its `InFlight`, which hands it on when the copies have ended.
            unsafe { driver.cuMemHostUnregister(start.cast()) }
        })?;
        self.pinning = Err("it was handed back".to_owned());
        self.advise(libc::MADV_DOFORK);
        Ok(())
    }

    /// Says something of the buffer's pages that changes none of their bytes.
    fn advise(&mut self, advice: libc::c_int) {
        let bytes = self.as_mut_slice();
        // SAFETY: the range is a whole mapping, borrowed exclusively. Both pieces of advice that are given concern what
        // forked processes see, and nothing in this one. Should the system refuse, they see as much as before.
        let _ = unsafe { libc::madvise(bytes.as_mut_ptr().cast(), bytes.len(), advice) };
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.unpin().is_err() {
            // The driver would take whatever lies at this address next for the pages that it pinned.
            mem::forget(self.buffer.take());
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_pinned() { "pinned" } else { "pageable" };
        write!(f, "Slot({} bytes, {kind})", self.as_slice().len())
    }
}

/// A mark in a stream.
pub(super) struct Event {
    context: Context,
    pub(super) handle: Handle,
}

impl Event {
    /// The one that is there if it is for this GPU, else a new one.
    pub(super) fn on(context: &Context, used: Option<Event>) -> Result<Event, Failure> {
        if let Some(event) = used.filter(|it| it.context.is(context)) {
            return Ok(event);
        }
        let mut handle = Handle::NULL;
        // SAFETY: the function writes a handle to where it is told.
        context.attempt(|driver| unsafe { driver.cuEventCreate(&mut handle, QUIET) })?;
        Ok(Event { context: context.clone(), handle })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event was made by `on`, and nothing else has its handle.
        let _ = self.context.attempt(|driver| unsafe { driver.cuEventDestroy_v2(self.handle) });
    }
}
