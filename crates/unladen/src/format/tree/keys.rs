//! Tensors that are keys of dictionaries, or stand in one. No path leads to them, so they are listed nowhere: they are
//! counted, for a warning.

use super::{MAX_WARNINGS, NO_CALL};
use crate::{
    checkpoint::Warning,
    error::Result,
    format::{
        pickle::{Meaning, Value, shortened},
        rebuild::{Rebuild, Rebuilt, Visits},
    },
};
use foldhash::{HashSet, HashSetExt as _};

/// Tensors in the keys of one dictionary.
struct Found {
    /// Which dictionary it is.
    mark: Option<usize>,
    path: String,
    calls: Vec<u32>,
}

/// What was found in keys. Nothing is looked at twice, however often it is a key.
#[derive(Default)]
pub(super) struct Keys {
    seen: HashSet<usize>,
    found: Vec<Found>,
    /// Dictionaries that are not in `found`, and have some.
    n_silent: usize,
}

impl Keys {
    /// Looks into a key of the dictionary that `mark` is, at `path`.
    pub(super) fn look(
        &mut self,
        key: Value,
        (mark, path): (Option<usize>, &str),
        rebuild: &Rebuild<'_>,
        visits: &mut Visits,
    ) -> Result<()> {
        let arena = rebuild.arena;
        let mut waiting = vec![key];
        while let Some(value) = waiting.pop() {
            visits.spend(1)?;
            if let Value::Storage(id) = value {
                if matches!(rebuild.persistent(id), Rebuilt::Tensor(_)) {
                    self.add(rebuild.call_of_persistent(id), mark, path);
                }
                continue;
            }
            if arena.identity(value).is_none_or(|it| !self.seen.insert(it)) {
                continue;
            }
            match value {
                Value::Call(number) => {
                    let call = &arena.calls[number as usize];
                    let meaning = arena.meaning(call.function);
                    if meaning.makes_tensor() && meaning != Meaning::LoadFromBytes {
                        self.add(number, mark, path);
                    } else {
                        waiting.extend([Value::Tuple(call.args), call.items, call.state]);
                    }
                }
                Value::Dict(dict) => {
                    let items = &arena.dicts[dict as usize].items;
                    visits.spend(items.len() as u64)?;
                    waiting.extend(items.iter().flat_map(|&(key, value)| [key, value]));
                }
                _ => {
                    let items = arena.sequence(value).unwrap_or_default();
                    visits.spend(items.len() as u64)?;
                    waiting.extend(items);
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, call: u32, mark: Option<usize>, path: &str) {
        if let Some(last) = self.found.last_mut().filter(|it| it.mark == mark) {
            last.calls.push(call);
        } else if self.found.len() < MAX_WARNINGS {
            self.found.push(Found { mark, path: shortened(path), calls: vec![call] });
        } else {
            self.n_silent += 1;
        }
    }

    /// What to say of the tensors that are not among the listed ones, and how many more there would be to say.
    pub(super) fn warnings(self, listed: &[u32]) -> (Vec<Warning>, usize) {
        if self.found.is_empty() {
            return (Vec::new(), 0);
        }
        let mut known = HashSet::with_capacity(listed.len());
        known.extend(listed.iter().copied().filter(|it| *it != NO_CALL));
        let warning = |Found { path, calls, .. }: Found| {
            let n_tensors = calls.iter().filter(|it| !known.contains(it)).count();
            let what = match n_tensors {
                0 => return None,
                1 => "a tensor in a key".to_owned(),
                _ => format!("{n_tensors} tensors in keys"),
            };
            let place = if path.is_empty() { "at the top".to_owned() } else { format!("`{path}`") };
            Some(Warning::LeftOut(format!("{what} of the dictionary {place}: keys have no names")))
        };
        (self.found.into_iter().filter_map(warning).collect(), self.n_silent)
    }
}
