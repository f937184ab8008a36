//! Splits memory into disjoint pieces for threads, without `unsafe`, and runs jobs over them.

use super::{Slots, missing};
use crate::{
    destination::Arena,
    error::{Fault, Result},
    plan::Span,
};
use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// What the threads of a load need for themselves: reads and copies, no recursion.
const STACK_BYTES: usize = 256 << 10;

/// Pairs each piece of work with its own bytes of a slot.
///
/// Fails if a span lies outside its slot, or two overlap.
pub(super) fn disjoint<'s, W>(
    slots: &'s mut Slots<'_>,
    work: impl IntoIterator<Item = (Span, W)>,
) -> Result<Vec<(&'s mut [u8], W)>> {
    let mut work: Vec<(usize, Span, W)> =
        work.into_iter().enumerate().map(|(order, (span, it))| (order, span, it)).collect();
    work.sort_by_key(|(_, span, _)| (span.slot, span.start_byte));
    // What is left of each slot behind the last span cut off, and where that starts.
    let mut rest: Vec<Option<(u64, &'s mut [u8])>> = slots
        .iter_mut()
        .map(|slot| slot.as_mut().and_then(Arena::as_mut_slice).map(|bytes| (0, bytes)))
        .collect();
    let mut split = Vec::with_capacity(work.len());
    for (order, span, it) in work {
        let entry = rest.get_mut(span.slot.0 as usize).ok_or_else(|| missing(span.slot))?;
        let (start_byte, bytes) = entry.take().ok_or_else(|| missing(span.slot))?;
        let skip = span.start_byte.checked_sub(start_byte);
        let fits = skip.is_some_and(|skip| skip + span.len_bytes <= bytes.len() as u64);
        let Some(skip) = skip.filter(|_| fits) else {
            return Err(Fault::new(
                "a plan whose targets are disjoint and inside their slots",
                format!("{span:?}"),
            )
            .mismatch());
        };
        let (mine, after) = bytes[skip as usize..].split_at_mut(span.len_bytes as usize);
        *entry = Some((span.start_byte + span.len_bytes, after));
        split.push((order, mine, it));
    }
    // Work is done in the order it was given in: that of the file.
    split.sort_by_key(|(order, ..)| *order);
    Ok(split.into_iter().map(|(_, bytes, it)| (bytes, it)).collect())
}

/// Runs jobs on as many threads as there are worker states (this one counts as one). The first error stops the others.
pub(super) fn for_each<J: Send, S: Send>(
    jobs: Vec<J>,
    workers: Vec<S>,
    run: impl Fn(&mut S, J) -> Result<()> + Sync,
) -> Result<()> {
    let n_jobs = jobs.len();
    let queue = Mutex::new(jobs.into_iter());
    let is_over = AtomicBool::new(false);
    let work = |mut state: S| -> Result<()> {
        while !is_over.load(Ordering::Relaxed) {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(job) = next else { break };
            run(&mut state, job).inspect_err(|_| is_over.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    let mut workers = workers.into_iter().take(n_jobs);
    let Some(first) = workers.next() else { return Ok(()) };
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for state in workers {
            // A thread that the system refuses is one thread less, not a failure.
            let started =
                std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, || work(state));
            threads.extend(started);
        }
        let mut result = work(first);
        for thread in threads {
            let theirs = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(theirs);
        }
        result
    })
}
