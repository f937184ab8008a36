//! Opens folders with one `.pt` or `.pth` file for each tensor, named after it.

use super::{
    super::{OpenOptions, assembly::Assembly, names::decode_file_name, open_source},
    natural,
};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    error::{Fault, Result},
    source::{FileSet, FileSource},
};
use std::{
    collections::HashMap,
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
    for (name, file_path) in named {
        let (mut one, files) = open_source(FileSource::open(&file_path)?, &folder.options_left(options))?;
        let [tensor] = &mut one.tensors[..] else {
            let found = "another number of them";
            return Err(Fault::new("one tensor in each file of the folder", found)
                .hint("a checkpoint file among others: open it, not its folder")
                .corrupt()
                .in_file(&file_path));
        };
        for warning in &mut one.warnings {
            if let Warning::MetaTensor(of) = warning {
                of.clone_from(&name);
            }
        }
        tensor.name = name;
        folder.append((one, files))?;
    }
    folder.finish()
}
