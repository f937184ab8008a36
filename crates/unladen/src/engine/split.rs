//! Splits memory into disjoint pieces for threads, without `unsafe`, and runs work over them.

use super::{Io, Slots, missing, queue::Queue};
use crate::{
    destination::Arena,
    error::{Error, Fault, Result},
    memory::STACK_BYTES,
    plan::Span,
    tensor::FileId,
};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What is left of each slot behind the last span that was cut off.
pub(super) struct Rest<'s> {
    slots: Vec<Option<(u64, &'s mut [u8])>>,
}

impl<'s> Rest<'s> {
    /// All bytes of all slots that can be written to.
    pub(super) fn of(slots: &'s mut Slots<'_>) -> Rest<'s> {
        let bytes = |slot: &'s mut Option<Arena<'_>>| slot.as_mut().and_then(Arena::as_mut_slice);
        Rest { slots: slots.iter_mut().map(|slot| bytes(slot).map(|it| (0, it))).collect() }
    }

    /// Cuts a span off. Those of a slot must ascend.
    ///
    /// Fails if the span lies outside its slot, or not behind the one before.
    pub(super) fn cut(&mut self, span: Span) -> Result<&'s mut [u8]> {
        let entry = self.slots.get_mut(span.slot.0 as usize).ok_or_else(|| missing(span.slot))?;
        let (start_byte, bytes) = entry.take().ok_or_else(|| missing(span.slot))?;
        let skip = span.start_byte.checked_sub(start_byte);
        let fits = skip.is_some_and(|skip| skip + span.len_bytes <= bytes.len() as u64);
        let Some(skip) = skip.filter(|_| fits) else {
            let expected = "a plan whose targets ascend and lie inside their slots";
            return Err(Fault::new(expected, format!("{span:?}")).mismatch());
        };
        let (mine, after) = bytes[skip as usize..].split_at_mut(span.len_bytes as usize);
        *entry = Some((span.start_byte + span.len_bytes, after));
        Ok(mine)
    }
}

/// What a thread has for itself, and can be asked should the thread panic.
pub(super) trait State: Send {
    /// The file that it reads and where, if it reads.
    fn reading(&self) -> Option<(FileId, u64)>;
}

/// Of threads that read no file.
impl State for () {
    fn reading(&self) -> Option<(FileId, u64)> {
        None
    }
}

/// Runs work on as many threads as there are worker states (this one counts as one). The first error stops the others;
/// a panic is one.
pub(super) fn for_each<J: Send, S: State>(
    work: impl Iterator<Item = Result<J>> + Send,
    workers: Vec<S>,
    io: Io<'_>,
    run: impl Fn(&mut S, J) -> Result<()> + Sync,
) -> Result<()> {
    let queue = Queue::new(work);
    let work = |mut state: S| -> Result<()> {
        while let Some(job) = queue.take() {
            let result = io.progress.check(io.path).and(job).and_then(|job| {
                // Whatever a job leaves half done is given back when the error ends the load.
                let result = catch_unwind(AssertUnwindSafe(|| run(&mut state, job)));
                result.unwrap_or_else(|panic| Err(panicked(io, state.reading(), &*panic)))
            });
            result.inspect_err(|_| queue.stop())?;
        }
        Ok(())
    };
    let mut workers = workers.into_iter();
    let Some(first) = workers.next() else { return Ok(()) };
    std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(workers.len());
        for state in workers {
            // A thread that the system refuses is one thread less, not a failure.
            let builder = std::thread::Builder::new().stack_size(STACK_BYTES as usize);
            threads.extend(builder.spawn_scoped(scope, || work(state)));
        }
        let mut result = work(first);
        for thread in threads {
            let theirs = thread.join().unwrap_or_else(|panic| Err(panicked(io, None, &*panic)));
            result = result.and(theirs);
        }
        result
    })
}

fn panicked(io: Io<'_>, reading: Option<(FileId, u64)>, panic: &(dyn std::any::Any + Send)) -> Error {
    let message = panic.downcast_ref::<&str>().map(|it| (*it).to_owned());
    let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
    let message = message.unwrap_or_else(|| "no message".to_owned());
    let path = reading.and_then(|(file, _)| io.files.path(file.0 as usize)).unwrap_or(io.path);
    Error::Panicked { path: path.to_owned(), offset_bytes: reading.map(|(_, at_byte)| at_byte), message }
}
