//! Compares two checkpoints of any formats: the same tensors, or where they differ. Both are read side by side.

use super::{
    difference::{Elements, Tally},
    made::{self, Made},
    threads::{on_threads, total},
    tree_hash,
};
use crate::{
    checkpoint::Checkpoint,
    contents::{self, OpenFile, ReadPlan, Reader, is_in_order},
    dtype::DType,
    error::{Fault, Result},
    progress::Progress,
    source::FileSet,
    tensor::{Backing, TensorId},
};
use std::{collections::HashMap, ops::Range};

/// How two checkpoints compare, the first one's account before the second one's.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Names that only one of them has.
    pub only_in: [Vec<String>; 2],
    /// Tensors of one name that differ, in the first one's order; then what is made of several tensors in another way, in
    /// the order of names.
    pub different: Vec<(String, Difference)>,
    /// Names that both have.
    pub n_in_both: u64,
    /// Bytes that were compared; of each side as many were read.
    pub compared_bytes: u64,
    /// Of the names that both have, some share their bytes in one checkpoint and not in the other. No difference: a
    /// format without ties writes them out.
    pub ties_differ: bool,
}

/// How two tensors of one name differ.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Difference {
    /// In type or shape; their bytes were not looked at.
    Kind {
        /// Types.
        dtypes: [DType; 2],
        /// Shapes.
        shapes: [Vec<u64>; 2],
    },
    /// One has data, the other has none.
    Data {
        /// Which have.
        has_data: [bool; 2],
    },
    /// In their elements.
    Elements(Elements),
    /// In what their parts are together: `None` where the parts are tensors like any other, as in a format that has
    /// nothing else. How the parts differ is told apart from it.
    Made {
        /// What either side has.
        made: [Option<Made>; 2],
    },
}

impl Comparison {
    /// True if both hold the same tensors: names, types, shapes, bytes, and what is made of several of them.
    pub fn is_same(&self) -> bool {
        self.different.is_empty() && self.only_in.iter().all(Vec::is_empty)
    }
}

/// Two tensors to be compared, and a part of them.
struct Job {
    pair: usize,
    part: Range<u64>,
    is_whole: bool,
}

/// Compares two checkpoints, streaming both within one budget, on several threads.
///
/// Fails if the budget is too small (naming one that is not), if a file cannot be read or changes meanwhile, or if the
/// caller cancels.
pub fn compare(
    sides: [(&Checkpoint, &FileSet); 2],
    host_budget_bytes: u64,
    progress: &Progress,
) -> Result<Comparison> {
    let [(one, one_files), (other, other_files)] = sides;
    let plans = ReadPlan::pair(sides, host_budget_bytes, usize::MAX)?;
    let other_by_name: HashMap<&str, TensorId> =
        other.iter().map(|(id, tensor)| (&*tensor.name, id)).collect();
    let in_both: Vec<[TensorId; 2]> =
        one.iter().filter_map(|(id, tensor)| Some([id, *other_by_name.get(&*tensor.name)?])).collect();

    let firsts = [one, other].map(Checkpoint::first_with_same_bytes);
    let first = |ids: [TensorId; 2]| [firsts[0][ids[0].0 as usize], firsts[1][ids[1].0 as usize]];
    // Tied tensors are compared once.
    let mut pairs: Vec<[TensorId; 2]> = Vec::new();
    let mut pair_of: HashMap<[TensorId; 2], usize> = HashMap::new();
    for &ids in &in_both {
        if difference_of_kind([one, other], ids).is_none() && has_data([one, other], ids) == [true; 2] {
            pair_of.entry(first(ids)).or_insert_with(|| {
                pairs.push(ids);
                pairs.len() - 1
            });
        }
    }
    let jobs = jobs([one, other], &pairs);
    let (one_open, other_open) = (contents::files_of(one_files), contents::files_of(other_files));
    let open: [&OpenFile<'_>; 2] = [&one_open, &other_open];
    let tallies = tallies([one, other], open, &plans, &pairs, &jobs, progress)?;
    one_files.check_unchanged()?;
    other_files.check_unchanged()?;

    let difference = |ids: [TensorId; 2]| {
        difference_of_kind([one, other], ids).or_else(|| match has_data([one, other], ids) {
            [true, true] => {
                let tally = pair_of.get(&first(ids)).map(|&it| &tallies[it])?;
                tally.finish(one.tensor(ids[0]).layout.shape()).map(Difference::Elements)
            }
            [false, false] => None,
            has_data => Some(Difference::Data { has_data }),
        })
    };
    // Nothing is shared where there is nothing.
    let has_bytes = |ids: &[TensorId; 2]| {
        has_data([one, other], *ids) == [true; 2] && one.tensor(ids[0]).layout.len_bytes() > 0
    };
    let name = |id: TensorId| one.tensor(id).name.clone();
    let one_by_name: HashMap<&str, TensorId> =
        in_both.iter().map(|ids| (&*one.tensor(ids[0]).name, ids[0])).collect();
    let only_in = |side: &Checkpoint, known: &HashMap<&str, TensorId>| {
        let alone = side.tensors.iter().filter(|it| !known.contains_key(&*it.name));
        alone.map(|it| it.name.clone()).collect()
    };
    let mut different: Vec<(String, Difference)> =
        in_both.iter().filter_map(|&ids| Some((name(ids[0]), difference(ids)?))).collect();
    let made = [one, other].map(Made::all);
    let has_tensor = |side: usize, name: &str| match side {
        0 => one_by_name.contains_key(name),
        _ => other_by_name.contains_key(name),
    };
    for made in made::differences([&made[0], &made[1]], has_tensor) {
        let name = made.iter().flatten().next().map_or_else(String::new, |it| it.name.clone());
        different.push((name, Difference::Made { made: made.map(Option::<&Made>::cloned) }));
    }
    Ok(Comparison {
        only_in: [only_in(one, &other_by_name), only_in(other, &one_by_name)],
        different,
        n_in_both: in_both.len() as u64,
        compared_bytes: jobs.iter().fold(0, |sum, it| sum.saturating_add(it.part.end - it.part.start)),
        ties_differ: ties_differ(in_both.iter().filter(|ids| has_bytes(ids)).map(|&ids| first(ids))),
    })
}

fn has_data(sides: [&Checkpoint; 2], ids: [TensorId; 2]) -> [bool; 2] {
    [0, 1].map(|side| sides[side].tensor(ids[side]).backing != Backing::Meta)
}

fn difference_of_kind(sides: [&Checkpoint; 2], ids: [TensorId; 2]) -> Option<Difference> {
    let [one, other] = [0, 1].map(|side| &sides[side].tensor(ids[side]).layout);
    let is_same = one.dtype() == other.dtype() && one.shape() == other.shape();
    (!is_same).then(|| Difference::Kind {
        dtypes: [one, other].map(|it| it.dtype()),
        shapes: [one, other].map(|it| it.shape().to_vec()),
    })
}

/// True unless whatever is one tensor on one side is one on the other.
fn ties_differ(firsts: impl Iterator<Item = [TensorId; 2]>) -> bool {
    let (mut others, mut ones) = (HashMap::new(), HashMap::new());
    { firsts }.any(|[one, other]| {
        let one_had = *others.entry(one).or_insert(other);
        let other_had = *ones.entry(other).or_insert(one);
        (one_had, other_had) != (other, one)
    })
}

/// Cuts what stands in order on both sides into parts, which threads share.
fn jobs(sides: [&Checkpoint; 2], pairs: &[[TensorId; 2]]) -> Vec<Job> {
    let of_pair = |(pair, ids): (usize, &[TensorId; 2])| {
        let tensors = [0, 1].map(|side| sides[side].tensor(ids[side]));
        let len_bytes = tensors[0].layout.len_bytes();
        let parts: Vec<Range<u64>> = match tensors.iter().all(|it| is_in_order(it)) {
            true => tree_hash::parts(len_bytes).collect(),
            false => std::iter::once(0..len_bytes).collect(),
        };
        let is_whole = parts.len() == 1;
        parts.into_iter().map(move |part| Job { pair, part, is_whole })
    };
    pairs.iter().enumerate().flat_map(of_pair).collect()
}

/// What was seen of each pair.
fn tallies(
    sides: [&Checkpoint; 2],
    open: [&OpenFile<'_>; 2],
    plans: &[ReadPlan; 2],
    pairs: &[[TensorId; 2]],
    jobs: &[Job],
    progress: &Progress,
) -> Result<Vec<Tally>> {
    let sizes: Vec<u64> = jobs.iter().map(|it| it.part.end - it.part.start).collect();
    progress.expect(total(&sizes).saturating_mul(2));
    let reader = |side: usize| Reader::new(sides[side], open[side], &plans[side], progress);
    let readers = || Ok([reader(0)?, reader(1)?]);
    let n_threads = plans[0].n_threads().min(plans[1].n_threads());
    let done = on_threads(n_threads, &sizes, readers, |readers, index| {
        let job = &jobs[index];
        tally(sides, readers, pairs[job.pair], job, progress)
    })?;
    let mut tallies = vec![Tally::default(); pairs.len()];
    jobs.iter().zip(done).for_each(|(job, done)| tallies[job.pair].join(done));
    Ok(tallies)
}

fn tally(
    sides: [&Checkpoint; 2],
    readers: &mut [Reader<'_>; 2],
    ids: [TensorId; 2],
    job: &Job,
    progress: &Progress,
) -> Result<Tally> {
    let dtype = sides[0].tensor(ids[0]).layout.dtype();
    let begin = |reader: &Reader<'_>, id| match job.is_whole {
        true => reader.walk(id),
        false => reader.walk_part(id, job.part.clone()),
    };
    let [one_reader, other_reader] = readers;
    let (mut one_walk, mut other_walk) = (begin(one_reader, ids[0])?, begin(other_reader, ids[1])?);
    let mut tally = Tally::default();
    // What either side has read and the other has not yet.
    let (mut one, mut other): (&[u8], &[u8]) = (&[], &[]);
    let mut at_byte = job.part.start;
    while at_byte < job.part.end {
        if one.is_empty() {
            one = one_reader.next(&mut one_walk)?.unwrap_or_default();
        }
        if other.is_empty() {
            other = other_reader.next(&mut other_walk)?.unwrap_or_default();
        }
        let len_bytes = one.len().min(other.len());
        if len_bytes == 0 {
            let expected = format!("{} bytes on both sides", job.part.end - job.part.start);
            let fault = Fault::new(expected, format!("{} on one", at_byte - job.part.start));
            return Err(fault.tensor(&sides[0].tensor(ids[0]).name).mismatch().in_file(&sides[0].path));
        }
        let (one_now, one_later) = one.split_at(len_bytes);
        let (other_now, other_later) = other.split_at(len_bytes);
        tally.add(dtype, at_byte / dtype.size_bytes(), one_now, other_now);
        (one, other) = (one_later, other_later);
        at_byte += len_bytes as u64;
        progress.add(2 * len_bytes as u64);
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn differ(firsts: &[[u32; 2]]) -> bool {
        ties_differ(firsts.iter().map(|it| it.map(TensorId)))
    }

    #[test]
    fn ties_are_the_same_if_they_join_the_same_names() {
        assert!(!differ(&[[0, 5], [1, 6], [0, 5]]));
        assert!(differ(&[[0, 5], [1, 6], [0, 6]]));
        assert!(differ(&[[0, 5], [1, 5]]));
    }
}
