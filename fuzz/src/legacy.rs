//! Files of the format before PyTorch 1.6: five pickles, and the storages behind them, each behind its number of elements.

use crate::{
    one_in, perhaps_lie,
    pickle::{self, Ids, Pickle, STORAGES, storage_bytes, text},
};
use arbitrary::{Result, Unstructured};

const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

/// A file.
pub fn file(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let object = pickle::write(u, Ids::Legacy)?;
    around(u, object)
}

/// A file around a pickle, and the storages that it names.
pub fn around(u: &mut Unstructured<'_>, object: Pickle) -> Result<Vec<u8>> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(b"\x80\x02M");
    out.extend(perhaps_lie(u, 1001u16)?.to_le_bytes());
    out.push(b'.');
    out.extend_from_slice(b"\x80\x02}X\x0d\0\0\0little_endian\x88s.");
    out.extend_from_slice(&object.bytes);
    let mut storages: Vec<(usize, u64)> = object.used.into_iter().collect();
    match u.int_in_range(0..=23)? {
        21 => drop(storages.pop()),
        22 => storages.push((0, 4)),
        23 => storages.reverse(),
        _ => {}
    }
    out.extend_from_slice(b"\x80\x02](");
    for &(index, _) in &storages {
        text(&mut out, if one_in(u, 32)? { "10" } else { STORAGES[index].0 });
    }
    out.extend_from_slice(b"e.");
    for (index, n_elems) in storages {
        out.extend(perhaps_lie(u, n_elems)?.to_le_bytes());
        out.extend(storage_bytes(index as u8));
    }
    Ok(out)
}
