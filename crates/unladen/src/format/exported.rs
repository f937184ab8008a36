//! Tells archives of `torch.export.save` and of AOTInductor (`.pt2`), which are not read: programs with their weights beside.

use super::zip::{Archive, Records};
use crate::error::{Error, Fault, Result};

/// The record that such archives have in their folder.
const MARK: &str = "archive_format";
/// How names of records begin, behind the folder, that a program and its weights are made of: for archives without the mark.
const STARTS: [&str; 4] = ["models/", "data/weights/", "data/constants/", "data/aotinductor/"];
/// The record that only checkpoints have.
const PICKLE: &str = "data.pkl";
/// The program itself in archives of the first releases, which have no folder.
const OLD_PROGRAM: &[u8] = b"serialized_exported_program.json";

/// Fails if the archive is such a one of the first releases.
pub(super) fn refuse_old(records: &Records<'_>) -> Result<()> {
    if records.get(OLD_PROGRAM).is_some() { Err(unsupported()) } else { Ok(()) }
}

/// Fails if the archive is such a one; `root` is the folder of its records, with its `/`.
pub(super) fn refuse(archive: &Archive, records: &Records<'_>, root: &[u8]) -> Result<()> {
    let has = |name: &str| records.get(&[root, name.as_bytes()].concat()).is_some();
    let mut names = archive.entries.iter().filter_map(|it| archive.name(it).strip_prefix(root));
    let is_part = |name: &[u8]| STARTS.iter().any(|it| name.starts_with(it.as_bytes()));
    if has(MARK) || (!has(PICKLE) && names.any(is_part)) { Err(unsupported()) } else { Ok(()) }
}

fn unsupported() -> Error {
    let found = "an exported program (torch.export or AOTInductor), whose weights are files inside it";
    Fault::new("a checkpoint of tensors", found)
        .hint("save its weights alone: torch.save(torch.export.load(path).state_dict, ..); of a compiled package, save those of the model that was compiled")
        .unsupported()
}
