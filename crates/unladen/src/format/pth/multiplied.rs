//! Files whose objects refer to each other many times over: what that makes us do and hold stays in proportion to the file.

use super::tests::{key, open, tensor};
use crate::error::Error;
use std::collections::HashSet;

/// A dictionary with so many numbers as keys.
fn long_dict(n_keys: u32) -> Vec<u8> {
    let items = (0..n_keys).flat_map(|it| [&[b'J'][..], &it.to_le_bytes(), b"N"].concat());
    [b"}(".to_vec(), items.collect(), b"u".to_vec()].concat()
}

fn assert_refused(parts: &[&[u8]]) {
    let error = open(parts).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains("multiplies"), "{error}");
}

#[test]
fn objects_that_share_a_long_dictionary_of_attributes_are_refused() {
    let object: &[u8] = b"h\x02)Rh\x01b";
    assert_refused(&[b"(", &long_dict(20_000), b"q\x01cm\nC\nq\x02", &object.repeat(20_000), b"t"]);
}

#[test]
fn tensors_that_share_a_long_dictionary_of_flags_are_refused() {
    let plain = tensor(0, 1);
    // The same call with a seventh argument.
    let flagged = [&plain[..plain.len() - 2], b"h\x01tR"].concat();
    assert_refused(&[b"(", &long_dict(20_000), b"q\x01", &flagged.repeat(2_000), b"t"]);
    let few = open(&[b"(", &long_dict(20), b"q\x01", &flagged.repeat(2_000), b"t"]).unwrap();
    assert_eq!(few.tensors.len(), 2_000);
}

#[test]
fn a_long_name_above_many_tensors_is_refused() {
    let inner = [b"](".to_vec(), tensor(0, 1).repeat(900), b"e".to_vec()].concat();
    assert_refused(&[b"}", &key(&"n".repeat(1 << 20)), &inner, b"s"]);
    let short = open(&[b"}", &key(&"n".repeat(100)), &inner, b"s"]).unwrap();
    assert_eq!(short.tensors.len(), 900);
}

#[test]
fn names_that_collide_many_times_are_numbered_without_counting_anew() {
    // All ways to write twelve `x` in keys of one or several: the same path each time.
    const N_LEVELS: u8 = 12;
    let mut parts = vec![b"(".to_vec(), tensor(0, 1), b"q\x00".to_vec()];
    for level in 1..=N_LEVELS {
        parts.push(b"}(".to_vec());
        for n_x in 1..=level {
            parts.extend([key(&vec!["x"; n_x.into()].join(".")), vec![b'h', level - n_x]]);
        }
        parts.push(vec![b'u', b'q', level]);
    }
    // Only the last one is the checkpoint; the others are dropped with the mark below them.
    parts.push(b"1".to_vec());
    let pickle = parts.concat();
    let padding = [&b"B"[..], &(1u32 << 20).to_le_bytes(), &vec![0; 1 << 20]].concat();
    let checkpoint = open(&[&pickle, b"(", &padding, &[b'h', N_LEVELS], b"t"]).unwrap();
    assert_eq!(checkpoint.tensors.len(), 1 << (N_LEVELS - 1));
    let names: HashSet<&str> = checkpoint.tensors.iter().map(|it| &*it.name).collect();
    let last = format!("1{}~{}", ".x".repeat(N_LEVELS.into()), 1 << (N_LEVELS - 1));
    assert!(names.len() == checkpoint.tensors.len() && names.contains(&*last));
}
