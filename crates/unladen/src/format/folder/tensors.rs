//! Opens folders with one `.pt` or `.pth` file for each tensor, named after it.

use super::{
    super::{OpenOptions, assembly::Assembly, confine::shown, names::decode_file_name, open_source},
    natural,
};
use crate::{
    checkpoint::{Checkpoint, Composite, Format, Warning},
    error::{Fault, Result},
    source::{FileSet, FileSource},
};
use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

/// Of files with one tensor each.
pub(super) const EXTENSIONS: [&str; 2] = ["pt", "pth"];

/// Opens the folder; `None` if no file of it has such a name.
pub(super) fn open(
    path: &Path,
    names: &[String],
    options: &OpenOptions,
) -> Result<Option<(Checkpoint, FileSet)>> {
    let files = tensor_files(path, names)?;
    if files.is_empty() {
        return Ok(None);
    }
    let (mut checkpoint, files) = open_tensors(path, files, options)?;
    let hidden = names.iter().filter(|it| it.starts_with('.') && is_tensor_file(it));
    checkpoint.warnings.extend(hidden.map(|it| Warning::LeftOut(format!("the hidden file `{it}`"))));
    Ok(Some((checkpoint, files)))
}

fn is_tensor_file(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| EXTENSIONS.contains(&extension))
}

/// Tensors' names with their files, in natural order. Fails if two files stand for one tensor.
fn tensor_files(path: &Path, names: &[String]) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    let mut by_tensor = HashMap::new();
    for name in names {
        // A name that starts with a dot is a temporary file, or another tool's.
        let Some((stem, _)) =
            name.rsplit_once('.').filter(|_| !name.starts_with('.') && is_tensor_file(name))
        else {
            continue;
        };
        let tensor = decode_file_name(stem);
        if let Some(other) = by_tensor.insert(tensor.clone(), name) {
            let found = format!("`{}` and `{}`", other.escape_debug(), name.escape_debug());
            return Err(Fault::new("one file per tensor", found).tensor(tensor).corrupt().in_file(path));
        }
        files.push((tensor, path.join(name)));
    }
    files.sort_by(|(a, _), (b, _)| natural(a, b));
    Ok(files)
}

fn open_tensors(
    path: &Path,
    named: Vec<(String, PathBuf)>,
    options: &OpenOptions,
) -> Result<(Checkpoint, FileSet)> {
    let mut folder = Assembly::new(Format::Folder, path, options);
    for (name, file_path) in &named {
        let (mut one, files) = open_source(FileSource::open(file_path)?, &folder.options_left(options))?;
        check_is_one(&one, file_path).map_err(|error| error.in_file(file_path))?;
        put_below(&mut one, name);
        folder.append((one, files))?;
    }
    // The files' own names differ; those of parts may be another file's.
    if folder.checkpoint.tensors.len() > named.len() {
        let mut seen = HashSet::new();
        if let Some(twice) = folder.checkpoint.tensors.iter().find(|it| !seen.insert(&it.name)) {
            let found = "a file of that name, and another with a part of it";
            return Err(Fault::new("one tensor of a name", found)
                .tensor(&twice.name)
                .corrupt()
                .in_file(path));
        }
    }
    folder.finish()
}

/// Fails for files that hold anything but one tensor, which may be made of several: a quantised one and its scales.
fn check_is_one(one: &Checkpoint, file_path: &Path) -> Result<()> {
    let all = 0..one.tensors.len() as u32;
    let is_whole = |it: &Composite| it.name.is_empty() && it.parts == all;
    if one.tensors.len() == 1 || one.composites.iter().any(is_whole) {
        return Ok(());
    }
    let file = file_path.file_name().unwrap_or_default().to_string_lossy();
    let hint = format!("it is a checkpoint of its own: open `{}`, not its folder", shown(&file));
    let found = format!("{} of them", one.tensors.len());
    Err(Fault::new("one tensor in each file of the folder", found).hint(hint).corrupt())
}

/// Names the tensor of a file after the file, and its parts below that.
fn put_below(one: &mut Checkpoint, name: &str) {
    let is_one = one.tensors.len() == 1;
    let put = |part: &mut String| {
        // What a file calls its only tensor does not matter.
        *part = if is_one || part.is_empty() { name.to_owned() } else { format!("{name}.{part}") };
    };
    one.tensors.iter_mut().for_each(|it| put(&mut it.name));
    one.composites.iter_mut().for_each(|it| put(&mut it.name));
    for warning in &mut one.warnings {
        if let Warning::MetaTensor(of) = warning {
            put(of);
        }
    }
}
