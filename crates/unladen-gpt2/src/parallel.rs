//! The threads of a pass, and who does what part of an operation.

use rayon_core::{ThreadPool, ThreadPoolBuilder};
use std::ops::Range;

/// Cuts `0..n` into at most `n_shares` ranges whose lengths differ by one at most; none is empty.
pub(crate) fn shares(n: usize, n_shares: usize) -> impl Iterator<Item = Range<usize>> {
    let n_shares = n_shares.clamp(1, n.max(1));
    (0..n_shares).map(move |it| n * it / n_shares..n * (it + 1) / n_shares).filter(|it| !it.is_empty())
}

/// Cuts the rows of `rows`, `row_len` elements each, into the ranges that [`shares`] gives for groups of `group` rows:
/// the range of groups, and the elements of its rows.
pub(crate) fn split_rows(
    rows: &mut [f32],
    row_len: usize,
    group: usize,
    n_shares: usize,
) -> impl Iterator<Item = (Range<usize>, &mut [f32])> {
    let n_groups = rows.len() / (row_len * group).max(1);
    let mut rest = rows;
    shares(n_groups, n_shares).filter_map(move |range| {
        let share = rest.split_off_mut(..range.len() * group * row_len)?;
        Some((range, share))
    })
}

/// Threads that wait for the next operation: a pass has hundreds, too short to start threads for each.
pub(crate) struct Threads {
    /// `None`: the calling thread does everything.
    pool: Option<ThreadPool>,
}

impl Threads {
    /// At most `n_threads`; only the calling one if the system has no more.
    pub(crate) fn new(n_threads: usize) -> Threads {
        let start = || ThreadPoolBuilder::new().num_threads(n_threads).build().ok();
        Threads { pool: (n_threads > 1).then(start).flatten() }
    }

    /// How many work at the same time.
    pub(crate) fn n(&self) -> usize {
        self.pool.as_ref().map_or(1, ThreadPool::current_num_threads)
    }

    /// Does `work` on one of the threads, from which [`Threads::for_each`] does not have to change over.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }

    /// Does `work` on every task, each on the first thread that is free.
    pub(crate) fn for_each<T: Send>(&self, tasks: impl Iterator<Item = T> + Send, work: impl Fn(T) + Sync) {
        let Some(pool) = &self.pool else { return tasks.for_each(work) };
        let work = &work;
        pool.scope(|scope| tasks.for_each(|task| scope.spawn(move |_| work(task))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once_and_evenly() {
        for (n, n_shares) in [(0, 3), (1, 4), (25, 2), (25, 16), (7, 7), (5, 0)] {
            let ranges: Vec<_> = shares(n, n_shares).collect();
            assert!(ranges.iter().cloned().flatten().eq(0..n), "{ranges:?}");
            let lens = ranges.iter().map(ExactSizeIterator::len);
            assert!(lens.clone().max().unwrap_or(0) - lens.min().unwrap_or(0) <= 1, "{ranges:?}");
        }
    }

    #[test]
    fn split_rows_go_with_their_groups_and_every_task_runs_once() {
        for n_threads in 0..4 {
            let threads = Threads::new(n_threads);
            assert_eq!(threads.n(), n_threads.max(1));
            let mut rows = vec![0.0; 5 * 2 * 3];
            threads.for_each(split_rows(&mut rows, 3, 2, 4), |(groups, share)| {
                assert_eq!(share.len(), groups.len() * 6);
                share
                    .chunks_mut(6)
                    .zip(groups)
                    .for_each(|(group, at)| group.iter_mut().for_each(|it| *it += at as f32));
            });
            assert!(rows.iter().enumerate().all(|(at, &it)| it == (at / 6) as f32), "{rows:?}");
        }
    }
}
