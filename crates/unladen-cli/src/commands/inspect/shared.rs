//! Which tensors stand on the same bytes: ties, and views that overlap.

use crate::human;
use unladen::{
    Checkpoint,
    tensor::{Backing, Layout, TensorId},
};

/// Lines that are printed; what comes after is counted.
const MAX_LINES: usize = 20;
/// Names in a line.
const MAX_NAMES: usize = 20;
/// Overlapping views that each one is compared with, those that reach furthest: more of them would take a square of time.
const MAX_COMPARED: usize = 16;

/// A line for each tensor that is tied to others, and for each that shares bytes with another. `first` says by tensor which
/// is the first one with the same bytes.
pub(super) fn lines(checkpoint: &Checkpoint, first: &[TensorId]) -> Vec<String> {
    let name = |id: TensorId| human::shortened(&checkpoint.tensor(id).name).escape_debug().to_string();
    let ties = ties(checkpoint, first);
    let overlaps = overlaps(checkpoint, first);
    let n_lines = ties.len() + overlaps.len();
    let tied = ties.into_iter().map(|(first, others)| {
        let shown: Vec<_> = others.iter().take(MAX_NAMES).map(|it| format!("`{}`", name(*it))).collect();
        let n_more = others.len() - shown.len();
        let more = if n_more > 0 { format!(" and {n_more} more") } else { String::new() };
        format!("shared: {}{more} = `{}`", shown.join(", "), name(first))
    });
    let overlapping = overlaps.into_iter().map(|it| {
        let word = if it.is_sure { "shares" } else { "may share" };
        format!("shared: `{}` {word} bytes with `{}`", name(it.view), name(it.other))
    });
    let mut lines: Vec<String> = tied.chain(overlapping).take(MAX_LINES).collect();
    if n_lines > MAX_LINES {
        lines.push(format!("shared: {} more of these", n_lines - MAX_LINES));
    }
    lines
}

/// Tensors with exactly the same bytes, the first one and the others. Those without elements share nothing.
fn ties(checkpoint: &Checkpoint, first: &[TensorId]) -> Vec<(TensorId, Vec<TensorId>)> {
    let others =
        checkpoint.iter().zip(first).filter(|((id, it), first)| id != *first && it.layout.n_elems() > 0);
    let mut pairs: Vec<(TensorId, TensorId)> = others.map(|((id, _), first)| (*first, id)).collect();
    pairs.sort_unstable();
    let groups = pairs.chunk_by(|a, b| a.0 == b.0);
    groups.map(|group| (group[0].0, group.iter().map(|it| it.1).collect())).collect()
}

/// Two tensors that overlap, the later one first.
struct Overlap {
    view: TensorId,
    other: TensorId,
    is_sure: bool,
}

/// For each tensor that overlaps another of its storage, one such other.
fn overlaps(checkpoint: &Checkpoint, first: &[TensorId]) -> Vec<Overlap> {
    // Most storages have one view.
    let mut n_views = vec![0u32; checkpoint.storages.len()];
    let apart = || {
        checkpoint.iter().zip(first).filter_map(|((id, tensor), first)| match tensor.backing {
            Backing::Storage(storage) if id == *first && tensor.layout.n_elems() > 0 => Some((storage, id)),
            _ => None,
        })
    };
    apart().for_each(|(storage, _)| n_views[storage.0 as usize] += 1);
    let views = apart().filter(|(storage, _)| n_views[storage.0 as usize] > 1);
    let start_of = |id: TensorId| checkpoint.tensor(id).layout.stored_bytes().start;
    let mut views: Vec<_> = views.map(|(storage, id)| (storage, start_of(id), id)).collect();
    views.sort_unstable();
    let mut found = Vec::new();
    for views in views.chunk_by(|a, b| a.0 == b.0) {
        let mut open: Vec<(u64, TensorId)> = Vec::new();
        for &(_, start_byte, id) in views {
            let layout = &checkpoint.tensor(id).layout;
            open.retain(|(end_byte, _)| *end_byte > start_byte);
            let overlapping = open.iter().filter_map(|&(_, other)| {
                let is_sure = match relation(layout, &checkpoint.tensor(other).layout) {
                    Relation::Apart => return None,
                    Relation::Perhaps => false,
                    Relation::Sharing => true,
                };
                Some(Overlap { view: id.max(other), other: id.min(other), is_sure })
            });
            found.extend(overlapping.min_by_key(|it| (!it.is_sure, it.other)));
            open.push((layout.stored_bytes().end, id));
            open.sort_unstable_by(|a, b| b.cmp(a));
            open.truncate(MAX_COMPARED);
        }
    }
    found.sort_unstable_by_key(|it| (it.view, it.other));
    found
}

#[derive(Debug, PartialEq)]
enum Relation {
    /// They have no byte in common.
    Apart,
    /// Each has gaps where the other may stand.
    Perhaps,
    Sharing,
}

/// How two views of one storage stand to each other; both have elements.
fn relation(a: &Layout, b: &Layout) -> Relation {
    let (of_a, of_b) = (a.stored_bytes(), b.stored_bytes());
    if of_a.end <= of_b.start || of_b.end <= of_a.start {
        return Relation::Apart;
    }
    // The first and the last byte of a view are its own, whatever gaps it has.
    let ends_in = |ends: &std::ops::Range<u64>, whole: &std::ops::Range<u64>| {
        whole.contains(&ends.start) || whole.contains(&(ends.end - 1))
    };
    let is_sure = of_a.start == of_b.start
        || of_a.end == of_b.end
        || (is_dense(a) && ends_in(&of_b, &of_a))
        || (is_dense(b) && ends_in(&of_a, &of_b));
    if is_sure {
        return Relation::Sharing;
    }
    // Columns of one matrix: the same step from row to row, and side by side within it.
    match (rows(a), rows(b)) {
        (Some((step, of_a)), Some((other, of_b)))
            if step == other && (of_a.end <= of_b.start || of_b.end <= of_a.start) =>
        {
            Relation::Apart
        }
        _ => Relation::Perhaps,
    }
}

/// True if a view has no gaps.
fn is_dense(layout: &Layout) -> bool {
    let mut axes: Vec<(u64, u64)> = axes(layout).collect();
    axes.sort_unstable();
    let mut n_covered = 1u64;
    axes.into_iter().all(|(step, len)| {
        let touches = step <= n_covered;
        n_covered = n_covered.saturating_add(step.saturating_mul(len - 1));
        touches
    })
}

/// The largest step of a view in bytes, and which bytes of each step are within the view's rows; `None`: it has no
/// such rows, or they reach into the next.
fn rows(layout: &Layout) -> Option<(u64, std::ops::Range<u64>)> {
    let size_bytes = layout.dtype().size_bytes();
    let (step, len) = axes(layout).max()?;
    let step_bytes = step.checked_mul(size_bytes).filter(|it| *it > 0)?;
    let all = layout.stored_bytes();
    let row_bytes = (all.end - all.start).checked_sub(step_bytes.checked_mul(len - 1)?)?;
    let start_byte = all.start % step_bytes;
    let row = start_byte..start_byte.checked_add(row_bytes)?;
    (row.end <= step_bytes).then_some((step_bytes, row))
}

/// Steps and lengths of the axes that have more than one index.
fn axes(layout: &Layout) -> impl Iterator<Item = (u64, u64)> {
    layout.stride().iter().copied().zip(layout.shape().iter().copied()).filter(|(_, len)| *len > 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use unladen::DType;

    fn of(shape: &[u64], stride: &[u64], offset_elems: u64) -> Layout {
        Layout::strided(DType::F32, shape, stride, offset_elems).unwrap()
    }

    #[test]
    fn views_share_bytes_stand_apart_or_are_not_known_to() {
        let whole = of(&[4, 6], &[6, 1], 0);
        assert_eq!(relation(&whole, &of(&[2, 3], &[6, 1], 2)), Relation::Sharing);
        assert_eq!(relation(&of(&[6, 4], &[1, 6], 0), &of(&[4], &[6], 3)), Relation::Sharing);
        assert_eq!(relation(&of(&[6], &[1], 0), &of(&[6], &[1], 6)), Relation::Apart);
        // Columns, and columns that overlap.
        let columns = |n_columns, from| of(&[4, n_columns], &[6, 1], from);
        assert_eq!(relation(&columns(3, 0), &columns(3, 3)), Relation::Apart);
        assert_eq!(relation(&columns(3, 0), &columns(3, 2)), Relation::Perhaps);
        assert_eq!(relation(&of(&[9], &[2], 0), &of(&[5], &[3], 1)), Relation::Perhaps);
        assert_eq!(relation(&of(&[9], &[2], 0), &of(&[8], &[2], 1)), Relation::Apart);
    }

    #[test]
    fn what_is_said_of_small_views_is_so() {
        let mut views = Vec::new();
        for number in 0..9 * 16 * 4u64 {
            let (shape, stride) = ([1 + number % 3, 1 + number / 3 % 3], [number / 9 % 4, number / 36 % 4]);
            let offset = number / 144;
            let indices = (0..shape[0]).flat_map(|i| (0..shape[1]).map(move |j| (i, j)));
            let touched =
                indices.fold(0u64, |bits, (i, j)| bits | 1 << (offset + i * stride[0] + j * stride[1]));
            views.push((of(&shape, &stride, offset), touched));
        }
        let mut n_sure = 0;
        for (a, of_a) in &views {
            for (b, of_b) in &views {
                let said = relation(a, b);
                n_sure += u32::from(said != Relation::Perhaps);
                let wrong = if of_a & of_b == 0 { Relation::Sharing } else { Relation::Apart };
                assert_ne!(said, wrong, "{a:?} {b:?}");
            }
        }
        // What is not known is the smaller part.
        assert!(n_sure as usize > views.len() * views.len() * 7 / 10, "{n_sure}");
    }
}
