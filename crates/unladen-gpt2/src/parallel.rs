//! Threads for the length of one operation, and who does what part of it.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
    thread,
};

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

/// Does `work` on every task, each on a thread of its own but for the last, which the calling thread does, with those
/// for which the system has no thread.
pub(crate) fn for_each<T: Send>(tasks: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let tasks: Vec<Mutex<Option<T>>> = tasks.map(|it| Mutex::new(Some(it))).collect();
    // A task is taken out before the work, so the lock cannot be poisoned by it.
    let run = |task: &Mutex<Option<T>>| {
        let task = task.lock().unwrap_or_else(PoisonError::into_inner).take();
        task.into_iter().for_each(&work);
    };
    let run = &run;
    thread::scope(|scope| {
        let Some((last, others)) = tasks.split_last() else { return };
        for task in others {
            if thread::Builder::new().spawn_scoped(scope, move || run(task)).is_err() {
                run(task);
            }
        }
        run(last);
    });
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
        let mut rows = vec![0.0; 5 * 2 * 3];
        for_each(split_rows(&mut rows, 3, 2, 4), |(groups, share)| {
            assert_eq!(share.len(), groups.len() * 6);
            share
                .chunks_mut(6)
                .zip(groups)
                .for_each(|(group, at)| group.iter_mut().for_each(|it| *it += at as f32));
        });
        assert!(rows.iter().enumerate().all(|(at, &it)| it == (at / 6) as f32), "{rows:?}");
    }
}
