//! Opens folders: one of Hugging Face's, a distributed checkpoint, offloaded tensors, numbered files, or one file per tensor.

mod named;
mod order;
mod tensors;

pub(super) use {named::is_named, order::natural};

use super::{
    OpenOptions,
    confine::{ShownNames, shortened, shown},
    dcp, numbered, offload, open_file,
};
use crate::{
    checkpoint::{Checkpoint, Warning},
    error::{Error, Fault, Result},
    source::FileSet,
};
use std::path::Path;

/// What the metadata are named that each rank of a distributed checkpoint wrote for itself.
const RANK_METADATA: (&str, &str) = ("__", ".metadata");

/// Starts of names that tell a model split by rank: DeepSpeed's and Megatron's files and folders.
const RANK_STARTS: [&str; 3] = ["mp_rank_", "zero_pp_rank_", "bf16_zero_pp_rank_"];
/// Ends of such names.
const RANK_ENDS: [&str; 3] = ["_model_states.pt", "-model_states.pt", "_optim_states.pt"];
/// The folder of a step is named so, with a number behind.
const STEP_START: &str = "global_step";
/// A file in which Megatron says which of its folders is the last.
const RANK_MARKER: &str = "latest_checkpointed_iteration.txt";

/// Extensions of files that may be checkpoints, and that a folder is not opened for.
const CHECKPOINTS: [&str; 9] = ["bin", "ckpt", "pkl", "pickle", "th", "tar", "pt2", "model", "weights"];

/// Opens a folder, see [`format::open`](super::open) for the order of what it may be.
pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let names = list(path)?;
    let (mut checkpoint, files) = open_names(path, &names, options).map_err(|error| error.in_file(path))?;
    checkpoint.path = path.to_owned();
    Ok((checkpoint, files))
}

fn open_names(path: &Path, names: &[String], options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    if let Some(model) = named::find(names) {
        return open_named(path, &model, options);
    }
    if names.iter().any(|it| it == dcp::METADATA) {
        return dcp::open(path, options);
    }
    if offload::is_here(names) {
        return offload::open(path, names, options);
    }
    refuse_ranks(names)?;
    if let Some(files) = numbered::find(names)? {
        return numbered::open(path, &files, options);
    }
    if let Some(opened) = tensors::open(path, names, options)? {
        return Ok(opened);
    }
    let mut safetensors = names.iter().filter(|it| it.ends_with(".safetensors"));
    match (safetensors.next(), safetensors.next()) {
        (Some(only), None) => open_file(&path.join(only), options),
        (Some(_), Some(_)) => {
            let found = "several safetensors files without a weight map";
            let hint = "open them one by one, or bring the model's weight map (`*.index.json`)";
            Err(Fault::new("a folder with one model", found).hint(hint).unsupported())
        }
        (None, _) => Err(no_checkpoint(path, names)),
    }
}

/// The error of a folder that is no checkpoint. It may hold one.
fn no_checkpoint(path: &Path, names: &[String]) -> Error {
    if names.iter().any(|it| it.ends_with(dcp::CHUNKS)) {
        let found = "chunks of one (`.distcp`) without the `.metadata` that says what they are";
        return Fault::new("a distributed checkpoint", found)
            .hint("bring the folder's `.metadata`; it is written last, so without it the save did not end")
            .corrupt();
    }
    let is_one = |name: &str| {
        let extension = name.rsplit_once('.').map(|(_, extension)| extension);
        !name.starts_with('.') && extension.is_some_and(|it| CHECKPOINTS.contains(&it))
    };
    let mut files = ShownNames::default();
    names.iter().filter(|it| is_one(it)).for_each(|it| files.push(it));
    let shown = files.to_string();
    let shown = shown.escape_debug();
    let mut folders = ShownNames::default();
    let is_folder = |name: &&String| !name.starts_with('.') && path.join(name).is_dir();
    names.iter().filter(is_folder).for_each(|it| folders.push(it));
    let (found, hint) = match files.len() {
        0 if folders.len() > 0 => {
            ("folders in it", format!("open the one that you mean: {}", folders.to_string().escape_debug()))
        }
        0 => ("none in it", "a folder of tensors holds one .pt or .pth file for each".to_owned()),
        1 => ("none by the names of its files", format!("open the file itself: {shown}")),
        _ => ("none by the names of its files", format!("open the file itself, one of {shown}")),
    };
    Fault::new("a folder with a checkpoint", found).hint(hint).corrupt()
}

/// Opens the model of one of Hugging Face's folders, and says what it passes over.
fn open_named(path: &Path, model: &named::Named<'_>, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let all = |names: &[&str]| {
        let mut shown = ShownNames::default();
        names.iter().for_each(|it| shown.push(it));
        shown
    };
    if !model.equals.is_empty() {
        let found = format!("`{}` and {}", shown(model.file), all(&model.equals).to_string().escape_debug());
        let hint = "open the one that you mean by its own name";
        return Err(Fault::new("one model in the folder", found).hint(hint).unsupported());
    }
    let (mut checkpoint, files) = open_file(&path.join(model.file), options)?;
    if !model.others.is_empty() {
        let what = format!("{}, because `{}` comes first", all(&model.others), shortened(model.file));
        checkpoint.warnings.push(Warning::LeftOut(what));
    }
    Ok((checkpoint, files))
}

/// Fails for folders in which each file holds the part of a model that one process had.
fn refuse_ranks(names: &[String]) -> Result<()> {
    let (start, end) = RANK_METADATA;
    if let Some(name) = names.iter().find(|it| it.starts_with(start) && it.ends_with(end)) {
        let found = format!("metadata that each rank wrote for itself (`{}`)", shown(name));
        return Err(Fault::new("a distributed checkpoint with one `.metadata` file", found)
            .hint("load it with PyTorch on as many ranks, and save it again with `use_collectives=True`")
            .unsupported());
    }
    let is_step = |name: &str| {
        name.strip_prefix(STEP_START)
            .is_some_and(|it| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit()))
    };
    let is_of_rank = |name: &&String| {
        RANK_STARTS.iter().any(|it| name.starts_with(it))
            || RANK_ENDS.iter().any(|it| name.ends_with(it))
            || *name == RANK_MARKER
            || is_step(name)
    };
    let Some(name) = names.iter().find(is_of_rank) else { return Ok(()) };
    let found = format!("one that DeepSpeed or Megatron split by rank (`{}`)", shown(name));
    Err(Fault::new("a folder with a whole model", found)
        .hint("open one rank's file (`mp_rank_00_model_states.pt`), or merge the ranks with the framework's own script")
        .unsupported())
}

/// The names of a folder's files. A name that is not UTF-8 names no tensor: an error if it looks as if it should.
fn list(path: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(path).map_err(|error| Error::io(path, "list the folder", error))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(path, "list the folder", error))?;
        match entry.file_name().into_string() {
            Ok(name) => names.push(name),
            Err(name) => {
                let extension = Path::new(&name).extension();
                if tensors::EXTENSIONS.iter().any(|it| extension == Some(it.as_ref())) {
                    let found = format!("`{}`", name.display());
                    let hint = "rename the file, or move it out of the folder";
                    let fault = Fault::new("file names in UTF-8, the names of tensors", found);
                    return Err(fault.hint(hint).unsupported().in_file(path));
                }
            }
        }
    }
    // Folders list their files in any order; what is chosen and said must not depend on it.
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests;
