//! Spreads jobs over a few threads. What a job does is the caller's.

use crate::{error::Result, memory::STACK_BYTES};
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// Does each job on one of a few threads (this one counts as one), the largest first, and returns what they did in the order of `sizes`.
/// The first error ends it: threads finish the job they are at, and take no more.
pub(super) fn on_threads<S, T: Send>(
    n_threads: usize,
    sizes: &[u64],
    start: impl Fn() -> Result<S> + Sync,
    job: impl Fn(&mut S, usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(sizes[index]));
    let next = AtomicUsize::new(0);
    let work = || {
        let mut state = start()?;
        let mut done = Vec::new();
        while let Some(&index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            match job(&mut state, index) {
                Ok(result) => done.push((index, result)),
                Err(error) => {
                    next.store(order.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(done)
    };
    let done: Result<Vec<Vec<(usize, T)>>> = thread::scope(|scope| {
        // A thread that the system refuses is one thread less, not a failure.
        let spawn =
            |_| thread::Builder::new().stack_size(STACK_BYTES as usize).spawn_scoped(scope, work).ok();
        let threads: Vec<_> = (1..n_threads.min(sizes.len())).filter_map(spawn).collect();
        let mine = work();
        let theirs = threads.into_iter().map(|it| match it.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        std::iter::once(mine).chain(theirs).collect()
    });
    let mut done: Vec<(usize, T)> = done?.into_iter().flatten().collect();
    done.sort_unstable_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// The sum of sizes of which each may be as large as a file can claim: an expanded view of four bytes holds any number.
pub(super) fn total(sizes: &[u64]) -> u64 {
    sizes.iter().fold(0, |sum, &it| sum.saturating_add(it))
}
