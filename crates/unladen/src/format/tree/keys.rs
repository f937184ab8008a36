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

#[cfg(test)]
mod tests {
    use crate::format::{Limits, given::Given, pickle, rebuild::Rebuild, tree};

    /// A tensor, without data.
    const TENSOR: &[u8] =
        b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(K\x02tK\x01\x85\x89tR";

    /// What is said of a pickle, of which tensors are named.
    fn said(parts: &[&[u8]]) -> (Vec<String>, Vec<String>) {
        let bytes = [b"\x80\x02", &parts.concat()[..], b"."].concat();
        let pickle = pickle::read(&bytes, 0, &Limits::default()).unwrap();
        let given = Given::default();
        let rebuild = Rebuild { arena: &pickle.arena, storages: &[], refs: &[], given: &given };
        let mut warnings = Vec::new();
        let listing = tree::list(&rebuild, pickle.root, &Limits::default(), &mut warnings).unwrap();
        let said = warnings.iter().map(ToString::to_string).filter(|it| it.contains(" key")).collect();
        (said, listing.tensors.into_iter().map(|it| it.name).collect())
    }

    #[test]
    fn tensors_in_keys_are_counted_where_they_stand() {
        let (said_of, names) = said(&[b"}(", TENSOR, b"K\x01X\x01\0\0\0w", TENSOR, b"u"]);
        assert_eq!(said_of, ["left out: a tensor in a key of the dictionary at the top: keys have no names"]);
        assert_eq!(names, ["w"]);
        let pair = [TENSOR, TENSOR, b"\x86"].concat();
        let (said_of, _) = said(&[b"}X\x01\0\0\0k](}(", &pair, b"K\x01", TENSOR, b"K\x02ues"]);
        assert_eq!(said_of, ["left out: 3 tensors in keys of the dictionary `k.0`: keys have no names"]);
    }

    #[test]
    fn a_key_that_is_listed_elsewhere_is_not_left_out() {
        let (said_of, names) = said(&[b"}(X\x01\0\0\0k}", TENSOR, b"q\x01K\x01sX\x01\0\0\0wh\x01u"]);
        assert_eq!((said_of.len(), names), (0, vec!["w".to_owned()]));
    }

    #[test]
    fn objects_as_keys_are_looked_into_once_and_cycles_end() {
        let object = [&b"cmine\nThing\n)Rq\x01}(X\x01\0\0\0th\x01X\x01\0\0\0w"[..], TENSOR, b"ub"].concat();
        let (said_of, names) = said(&[b"](}", &object, b"K\x01s}h\x01K\x02se"]);
        assert_eq!(said_of, ["left out: a tensor in a key of the dictionary `0`: keys have no names"]);
        assert!(names.is_empty());
    }
}
