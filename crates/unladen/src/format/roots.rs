//! Finds the state dict among the other things of a checkpoint: by the names that training programs give it.

use super::{
    pickle::{Arena, Value},
    tree,
};
use std::collections::HashSet;

/// Keys of state dicts, the likeliest first: what the readers of other projects look for.
pub(super) const KNOWN: [&str; 15] = [
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "params",
    "params_ema",
    "net",
    "network",
    "generator",
    "g_ema",
    "ema",
    "state_dict_ema",
    "model_ema",
    "weights",
];

/// Values that are looked at for each byte of a pickle, at most; what is not found by then is not found.
const LOOKS_PER_BYTE: usize = 4;

/// The paths that may be a state dict's, the likeliest first. Empty if the tensors stand at the top, or if nothing tells
/// which of several dictionaries it is.
///
/// A candidate is a dictionary of the outermost one (or a module that was pickled whole) from which a tensor can be
/// reached by keys that are all strings: what an optimizer keeps is numbered.
pub(super) fn candidates(arena: &Arena<'_>, root: Value) -> Vec<String> {
    let Some(top) = dict_of(arena, root) else { return Vec::new() };
    let mut n_looks = LOOKS_PER_BYTE * arena.bytes.len();
    let mut is_state = |value| has_tensor(arena, value, &mut n_looks);
    let items = &arena.dicts[top as usize].items;
    // One pass: the outermost dictionary may be a state dict of 100,000 names.
    let mut known = [None; KNOWN.len()];
    for &(key, value) in items {
        let Value::Str(text) = key else { continue };
        if let Some(position) = KNOWN.iter().position(|it| it.as_bytes() == arena.bytes(text)) {
            known[position] = Some(value);
        }
    }
    let known = KNOWN.iter().zip(known).filter(|(_, value)| value.is_some_and(&mut is_state));
    let known: Vec<String> = known.map(|(key, _)| (*key).to_owned()).collect();
    if !known.is_empty() || items.iter().any(|&(_, value)| is_tensor(arena, value)) {
        return known;
    }
    // No known name: the only one that it can be.
    let mut states = items.iter().filter(|(_, value)| is_state(*value));
    match (states.next(), states.next()) {
        (Some(&(key @ Value::Str(_), _)), None) => {
            let mut name = String::new();
            arena.push_key(key, &mut name);
            vec![name]
        }
        _ => Vec::new(),
    }
}

/// The dictionary that a value is, by itself or as an object that has items. A module's attributes are none.
fn dict_of(arena: &Arena<'_>, value: Value) -> Option<u32> {
    match value {
        Value::Dict(dict) => Some(dict),
        Value::Call(call) => match arena.calls[call as usize].items {
            Value::Dict(dict) => Some(dict),
            _ => None,
        },
        _ => None,
    }
}

fn has_tensor(arena: &Arena<'_>, value: Value, n_looks: &mut usize) -> bool {
    if let Value::Call(call) = value
        && let state @ Value::Dict(attributes) = arena.calls[call as usize].state
    {
        // Objects may share one long dictionary.
        *n_looks = n_looks.saturating_sub(arena.n_items(state) as usize);
        if *n_looks > 0 && tree::is_module(arena, attributes) {
            return true;
        }
    }
    let mut waiting: Vec<u32> = dict_of(arena, value).into_iter().collect();
    let mut seen: HashSet<u32> = waiting.iter().copied().collect();
    while let Some(dict) = waiting.pop() {
        let items = &arena.dicts[dict as usize].items;
        *n_looks = n_looks.saturating_sub(items.len() + 1);
        if *n_looks == 0 {
            return false;
        }
        if !items.iter().all(|(key, _)| matches!(key, Value::Str(_))) {
            continue;
        }
        if items.iter().any(|&(_, value)| is_tensor(arena, value)) {
            return true;
        }
        let inner = items.iter().filter_map(|&(_, value)| dict_of(arena, value));
        waiting.extend(inner.filter(|it| seen.insert(*it)));
    }
    false
}

fn is_tensor(arena: &Arena<'_>, value: Value) -> bool {
    let Value::Call(call) = value else { return false };
    arena.meaning(arena.calls[call as usize].function).makes_tensor()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Limits, pickle};

    /// The candidates of a pickle; `T` stands for a tensor.
    fn found(parts: &[&[u8]]) -> Vec<String> {
        let tensor: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n)R";
        let body: Vec<&[u8]> = parts.iter().map(|it| if *it == b"T" { tensor } else { *it }).collect();
        let bytes = [b"\x80\x02", &body.concat()[..], b"."].concat();
        let pickle = pickle::read(&bytes, 0, &Limits::default()).unwrap();
        candidates(&pickle.arena, pickle.root)
    }

    #[test]
    fn known_names_come_in_their_order_and_must_hold_tensors() {
        let state = b"}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n)Rs";
        let with = |keys: &[&str]| {
            let items: Vec<Vec<u8>> = keys
                .iter()
                .map(|it| [b"X", &(it.len() as u32).to_le_bytes()[..], it.as_bytes(), state].concat())
                .collect();
            found(&[b"}(", &items.concat(), b"X\x05\0\0\0modelK\x05u"])
        };
        assert_eq!(with(&["ema", "state_dict", "other"]), ["state_dict", "ema"]);
        assert_eq!(with(&["mine"]), ["mine"]);
        assert!(with(&["mine", "yours"]).is_empty());
    }

    #[test]
    fn tensors_at_the_top_leave_nothing_to_choose() {
        assert!(found(&[b"}X\x01\0\0\0w", b"T", b"s"]).is_empty());
        assert!(found(&[b"}(X\x01\0\0\0w", b"T", b"X\x01\0\0\0d}X\x01\0\0\0w", b"T", b"su"]).is_empty());
        assert!(found(&[b"T"]).is_empty());
    }

    #[test]
    fn numbered_dictionaries_and_cycles_are_no_state_dicts() {
        assert!(found(&[b"}X\x05\0\0\0model}K\0", b"T", b"ss"]).is_empty());
        assert!(found(&[b"}X\x05\0\0\0model}q\x01X\x01\0\0\0ah\x01ss"]).is_empty());
    }
}
