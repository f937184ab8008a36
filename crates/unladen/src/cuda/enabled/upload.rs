//! Copies from slots to a GPU that run while the host does other things.
//!
//! By ownership: who submits a slot gives it away, and gets it back when its copies have ended. Until then an [`InFlight`]
//! holds the slot, a share of each target and a share of the stream, so nothing of it can be touched, freed, or let go of
//! too early, whatever is dropped in whatever order, or forgotten.
#![allow(unsafe_code)]

use super::{
    context::Context,
    driver::{Copy2D, Failure, Handle, NOT_READY},
    memory::{Allocation, inside, outside, to_usize},
    slot::{Event, Slot},
};
use crate::{
    cuda::{Lines, SlotCopy},
    error::{Error, Result},
};
use smallvec::SmallVec;
use std::{ffi::c_uint, fmt, mem, sync::Arc};

/// Does not wait for the stream that is always there, which others in this process may use.
const NON_BLOCKING: c_uint = 1;

/// How far lines may be apart that one call copies: the least that `CU_DEVICE_ATTRIBUTE_MAX_PITCH` is anywhere.
const MAX_STEP_BYTES: usize = i32::MAX as usize;

/// A GPU's queue of copies: they run in the order in which they were submitted.
#[derive(Debug)]
pub struct Upload {
    stream: Arc<Stream>,
}

struct Stream {
    context: Context,
    handle: Handle,
}

impl Upload {
    /// A queue of its own, beside what others have the GPU do.
    pub fn new(context: &Context) -> Result<Upload> {
        let mut handle = Handle::NULL;
        // SAFETY: the function writes a handle to where it is told.
        context.call(|driver| unsafe { driver.cuStreamCreate(&mut handle, NON_BLOCKING) })?;
        Ok(Upload { stream: Arc::new(Stream { context: context.clone(), handle }) })
    }

    /// Starts copies out of a slot, which comes back when they have ended.
    ///
    /// Fails if a range lies outside, if a target lies on another GPU, or as the driver does; nothing is in flight then, and
    /// the slot is gone.
    pub fn submit(&self, mut slot: Slot, copies: &[SlotCopy<'_>]) -> Result<InFlight> {
        let context = &self.stream.context;
        copies.iter().try_for_each(|copy| self.ends_of(&slot, copy).map(|_| ()))?;
        let event =
            Event::on(context, slot.event.take()).map_err(|it| context.fault(context.describe(it)))?;
        let mut targets: SmallVec<[Arc<Allocation>; 2]> = SmallVec::new();
        for target in copies.iter().map(|copy| copy.target.share()) {
            if !targets.iter().any(|it| Arc::ptr_eq(it, &target)) {
                targets.push(target);
            }
        }
        // From here on, whatever happens, its `drop` waits.
        let mut in_flight = InFlight {
            flight: Some(Flight {
                slot,
                _targets: targets,
                event,
                is_marked: false,
                stream: Arc::clone(&self.stream),
            }),
        };
        if let Some(flight) = &mut in_flight.flight {
            for copy in copies {
                self.start(&flight.slot, copy)?;
            }
            flight.mark()?;
        }
        Ok(in_flight)
    }

    /// Starts one copy. Only for a slot and a target that an `InFlight` holds.
    fn start(&self, slot: &Slot, copy: &SlotCopy<'_>) -> Result<()> {
        let (source, target) = self.ends_of(slot, copy)?;
        if source.is_empty() {
            return Ok(());
        }
        let stream = self.stream.handle;
        let Lines { count, slot_step_bytes, target_step_bytes } = copy.lines;
        let [line_bytes, slot_step, target_step] =
            [copy.len_bytes, slot_step_bytes, target_step_bytes].map(to_usize);
        if count > 1 && slot_step.max(target_step) <= MAX_STEP_BYTES {
            let source = source.as_ptr().cast();
            let lines =
                Copy2D::to_device((source, slot_step), (target, target_step), line_bytes, to_usize(count));
            // SAFETY: the lines lie in the slot, and in an allocation of this context, apart from each other. The `InFlight`
            // that the caller made owns the slot and a share of the allocation, and does neither write to the bytes, let go
            // of them nor hand them on before the stream is done with them. The description is read during the call.
            return self.stream.context.call(|driver| unsafe { driver.cuMemcpy2DAsync_v2(&lines, stream) });
        }
        for line in 0..to_usize(count) {
            let line_of_source = &source[line * slot_step..][..line_bytes];
            let target = target + (line * target_step) as u64;
            self.stream.context.call(|driver| {
                // SAFETY: as above, for a line.
                unsafe {
                    driver.cuMemcpyHtoDAsync_v2(target, line_of_source.as_ptr().cast(), line_bytes, stream)
                }
            })?;
        }
        Ok(())
    }

    /// The bytes of a copy, what lies between its lines included, and the address that they go to.
    fn ends_of<'s>(&self, slot: &'s Slot, copy: &SlotCopy<'_>) -> Result<(&'s [u8], u64)> {
        let context = &self.stream.context;
        if !copy.target.context().is(context) {
            let message = format!("a copy to cuda:{} does not go by this GPU's queue", copy.target.ordinal());
            return Err(context.fault(message));
        }
        let Lines { count, slot_step_bytes, target_step_bytes } = copy.lines;
        let overlaps = |step_bytes: u64| count > 1 && step_bytes < copy.len_bytes;
        if overlaps(slot_step_bytes) || overlaps(target_step_bytes) {
            let message = format!("lines of {} bytes overlap in a copy", copy.len_bytes);
            return Err(context.fault(message));
        }
        // Saturated, it lies outside of anything.
        let span_bytes = |step_bytes: u64| match (count, copy.len_bytes) {
            (0, _) | (_, 0) => 0,
            _ => (count - 1).saturating_mul(step_bytes).saturating_add(copy.len_bytes),
        };
        let bytes = slot.as_slice();
        let len_bytes = span_bytes(slot_step_bytes);
        let range = inside(bytes.len() as u64, copy.slot_byte, len_bytes);
        let source = range.and_then(|it| bytes.get(to_usize(it.start)..to_usize(it.end)));
        let source = source
            .ok_or_else(|| context.fault(outside("a slot", bytes.len() as u64, copy.slot_byte, len_bytes)))?;
        Ok((source, copy.target.address_of(copy.target_byte, span_bytes(target_step_bytes))?))
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?})", self.context)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the stream was made by `Upload::new`, and nothing else has its handle: whatever is in flight on it holds a
        // share of it.
        let _ = self.context.attempt(|driver| unsafe { driver.cuStreamDestroy_v2(self.handle) });
    }
}

/// Copies that run, and the slot that they read. Dropping it waits for them.
#[derive(Debug)]
pub struct InFlight {
    /// `None`: ended.
    flight: Option<Flight>,
}

/// What may not be touched before the copies have ended.
struct Flight {
    slot: Slot,
    /// What they write to, held.
    _targets: SmallVec<[Arc<Allocation>; 2]>,
    event: Event,
    /// The event stands in the stream, behind them.
    is_marked: bool,
    stream: Arc<Stream>,
}

impl InFlight {
    /// True if the copies have ended. Fails if they, or something before them, went wrong.
    pub fn is_done(&self) -> Result<bool> {
        let Some(flight) = &self.flight else { return Ok(true) };
        let context = &flight.stream.context;
        // SAFETY: the event is the flight's own, and stands in the stream.
        match context.attempt(|driver| unsafe { driver.cuEventQuery(flight.event.handle) }) {
            Ok(()) => Ok(true),
            Err(failure) if failure.code == NOT_READY => Ok(false),
            Err(failure) => Err(context.fault(context.describe(failure))),
        }
    }

    /// Waits for the copies, and gives the slot back. Fails if they, or something before them, went wrong.
    pub fn wait(mut self) -> Result<Slot> {
        let Some(flight) = self.flight.take() else {
            return Err(Error::Device {
                device: "cuda".to_owned(),
                message: "the copies have ended before".to_owned(),
            });
        };
        match flight.wait() {
            Ok(()) => {
                let Flight { mut slot, event, .. } = flight;
                slot.event = Some(event);
                Ok(slot)
            }
            Err(failure) => {
                let context = flight.stream.context.clone();
                flight.abandon();
                Err(context.fault(context.describe(failure)))
            }
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(flight) = self.flight.take() {
            flight.abandon();
        }
    }
}

impl Flight {
    /// Puts the event behind the copies.
    fn mark(&mut self) -> Result<()> {
        self.stream.context.call(|driver| {
            // SAFETY: event and stream are the flight's own, and of one context.
            unsafe { driver.cuEventRecord(self.event.handle, self.stream.handle) }
        })?;
        self.is_marked = true;
        Ok(())
    }

    /// Waits for the copies.
    fn wait(&self) -> Result<(), Failure> {
        if !self.is_marked {
            return self.stream.wait();
        }
        // SAFETY: the event is the flight's own.
        self.stream.context.attempt(|driver| unsafe { driver.cuEventSynchronize(self.event.handle) })
    }

    /// Waits for the copies in any way that still works, and lets everything go.
    fn abandon(self) {
        let has_ended =
            self.wait().is_ok() || self.stream.wait().is_ok() || self.stream.context.synchronize().is_ok();
        if !has_ended {
            // The driver answers no more, and may read and write what it was given for all that we know: it stays.
            mem::forget(self);
        }
    }
}

impl Stream {
    /// Waits for everything that was submitted.
    fn wait(&self) -> Result<(), Failure> {
        // SAFETY: the stream is held by `self`.
        self.context.attempt(|driver| unsafe { driver.cuStreamSynchronize(self.handle) })
    }
}

impl fmt::Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flight({:?} to {:?})", self.slot, self.stream.context)
    }
}
