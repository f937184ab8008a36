//! `--limit NAME=VALUE`: the fields of [`Limits`] by their names.

use crate::human;
use unladen::Limits;

/// Sets a field.
type Set = fn(&mut Limits, u64);

/// What can be set, and how.
const FIELDS: &[(&str, Set)] = &[
    ("pickle_bytes", |limits, value| limits.pickle_bytes = value),
    ("n_objects", |limits, value| limits.n_objects = count(value)),
    ("n_records", |limits, value| limits.n_records = value),
    ("header_bytes", |limits, value| limits.header_bytes = value),
    ("weight_map_bytes", |limits, value| limits.weight_map_bytes = value),
    ("n_files", |limits, value| limits.n_files = count(value)),
    ("n_tensors", |limits, value| limits.n_tensors = count(value)),
    ("depth", |limits, value| limits.depth = count(value)),
];

/// One that the user sets.
#[derive(Clone, Debug)]
pub(crate) struct Limit {
    name: &'static str,
    set: Set,
    value: u64,
}

impl Limit {
    pub(crate) fn apply(&self, limits: &mut Limits) {
        (self.set)(limits, self.value);
    }

    /// The same word again, for a command that is started by another.
    pub(crate) fn word(&self) -> String {
        format!("--limit={}={}", self.name, self.value)
    }
}

/// The command line's help.
pub(crate) fn help() -> String {
    format!(
        "Let a file claim more than by default, or less: n_tensors=10000000, header_bytes=200MiB, or none. Known are {}",
        names()
    )
}

pub(crate) fn parse(text: &str) -> Result<Limit, String> {
    let unknown = || format!("a limit is NAME=VALUE; known are {}", names());
    let (name, value) = text.split_once('=').ok_or_else(unknown)?;
    let &(name, set) = FIELDS.iter().find(|(known, _)| *known == name).ok_or_else(unknown)?;
    let value = if name.ends_with("_bytes") { human::parse_bytes(value)? } else { parse_count(value)? };
    Ok(Limit { name, set, value })
}

fn parse_count(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(u64::MAX),
        _ => text.parse().map_err(|_| format!("`{text}` is no whole number, nor `none`")),
    }
}

fn count(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn names() -> String {
    FIELDS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields as the library lists them.
    fn fields(limits: &Limits) -> Vec<(String, u64)> {
        let text = format!("{limits:?}");
        let inside = text.trim_start_matches("Limits { ").trim_end_matches(" }");
        let field =
            |it: &str| it.split_once(": ").map(|(name, value)| (name.to_owned(), value.parse().unwrap()));
        inside.split(", ").filter_map(field).collect()
    }

    #[test]
    fn every_limit_of_the_library_can_be_set_alone() {
        let before = fields(&Limits::default());
        assert_eq!(before.iter().map(|(name, _)| &**name).collect::<Vec<_>>().join(", "), names());
        for (index, (name, _)) in before.iter().enumerate() {
            let mut limits = Limits::default();
            parse(&format!("{name}=77")).unwrap().apply(&mut limits);
            let mut wanted = before.clone();
            wanted[index].1 = 77;
            assert_eq!(fields(&limits), wanted);
        }
    }

    #[test]
    fn lengths_have_units_and_counts_have_none() {
        let value = |text: &str| parse(text).map(|it| it.value);
        assert_eq!(value("header_bytes=200MiB"), Ok(200 << 20));
        assert_eq!(value("n_tensors=none"), Ok(u64::MAX));
        for wrong in ["n_tensors=5k", "n_tensors=", "n_tensors", "header_bytes=-1", "N_TENSORS=1", "=1", ""] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let words = parse("weight_map_bytes=none").unwrap().word();
        let again = parse(words.strip_prefix("--limit=").unwrap()).unwrap();
        assert_eq!((again.name, again.value), ("weight_map_bytes", u64::MAX));
    }
}
