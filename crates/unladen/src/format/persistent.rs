//! Persistent ids of storages, taken apart.

use super::{
    pickle::{Arena, Meaning, Value},
    rebuild::unsigned,
};
use crate::{
    dtype::DType,
    error::{Fault, Result},
};

/// What a persistent id says about a storage.
#[derive(Debug)]
pub(super) struct StorageClaim<'a> {
    /// `None`: untyped bytes.
    pub(super) dtype: Option<DType>,
    pub(super) key: &'a [u8],
    pub(super) n_elems: u64,
    /// The part of it that is meant, in files of the first releases.
    pub(super) view: Option<ViewClaim<'a>>,
}

/// A part of a storage that is a storage of its own.
#[derive(Debug)]
pub(super) struct ViewClaim<'a> {
    pub(super) key: &'a [u8],
    pub(super) offset_elems: u64,
    pub(super) n_elems: u64,
}

impl StorageClaim<'_> {
    /// Bytes of an element.
    pub(super) fn elem_bytes(&self) -> u64 {
        self.dtype.map_or(1, DType::size_bytes)
    }
}

/// Takes ('storage', class, key, location, number of elements) apart; the location is where the storage was once. With
/// `has_view`, the part of the storage that is meant stands behind it, or `None`.
pub(super) fn storage_claim<'a>(arena: &'a Arena<'_>, id: Value, has_view: bool) -> Result<StorageClaim<'a>> {
    let items = arena.sequence(id).unwrap_or_default();
    let (claim, view) = match (items, has_view) {
        (&[kind, class, key, location, n_elems], false) => {
            ([kind, class, key, location, n_elems], Value::None)
        }
        (&[kind, class, key, location, n_elems, view], true) => ([kind, class, key, location, n_elems], view),
        _ => return Err(malformed(items.len())),
    };
    let [kind, class, key, location, n_elems] = claim;
    let (Some(kind), Some(key), Some(_)) = (text(arena, kind), text(arena, key), text(arena, location))
    else {
        return Err(malformed(items.len()));
    };
    if kind != b"storage" {
        let found = format!("`{}`", String::from_utf8_lossy(kind).escape_debug());
        return Err(Fault::new("a persistent id of a storage", found).corrupt());
    }
    let dtype = storage_class(arena, class)?;
    let view = match view {
        Value::None => None,
        view => {
            let &[key, offset, n_elems] = arena.sequence(view).unwrap_or_default() else {
                return Err(malformed(items.len()));
            };
            let key = text(arena, key).ok_or_else(|| malformed(items.len()))?;
            Some(ViewClaim { key, offset_elems: unsigned(offset)?, n_elems: unsigned(n_elems)? })
        }
    };
    Ok(StorageClaim { dtype, key, n_elems: unsigned(n_elems)?, view })
}

/// The element type of a class of storages; `None`: untyped bytes.
pub(super) fn storage_class(arena: &Arena<'_>, class: Value) -> Result<Option<DType>> {
    match arena.meaning(class) {
        Meaning::Storage(dtype) => Ok(dtype),
        _ => {
            let found = match class {
                Value::Symbol(symbol) => arena.symbols[symbol as usize].to_string(),
                _ => "no class".to_owned(),
            };
            Err(Fault::new("a class of storages", found.escape_debug().to_string()).unsupported())
        }
    }
}

/// Text, which Python 2 wrote as bytes.
pub(super) fn text<'a>(arena: &'a Arena<'_>, value: Value) -> Option<&'a [u8]> {
    match value {
        Value::Str(text) | Value::Bytes(text) => Some(arena.bytes(text)),
        _ => None,
    }
}

fn malformed(n_items: usize) -> crate::Error {
    let expected = "a persistent id of a storage, its class, key, location and size";
    Fault::new(expected, format!("{n_items} other values")).corrupt()
}
