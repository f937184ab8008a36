//! Opens folders: one file per tensor, or what Hugging Face's `save_pretrained` writes.

use super::{OpenOptions, names::decode_file_name, open_file};
use crate::{
    checkpoint::{Checkpoint, Composite, Format, Warning},
    error::{Error, Fault, Result},
    source::{FileSet, FileSource},
    tensor::{Backing, FileId, Storage, StorageId},
};
use std::{
    cmp::Ordering,
    collections::HashMap,
    path::{Path, PathBuf},
};

/// The whole model in one file, in the order in which Hugging Face's own loader looks for them.
const WHOLE_MODELS: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];
/// What stands in a folder of PyTorch's distributed checkpoints.
const DISTRIBUTED: &str = ".metadata";
/// What the names of weight maps end with.
const WEIGHT_MAP: &str = ".index.json";
/// Files with one tensor each.
const TENSOR_FILES: [&str; 2] = ["pt", "pth"];

/// Opens a folder.
pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let names = list(path)?;
    let unsupported = |found: String, hint: &str| {
        Err(Fault::new("a folder with one file, or one file per tensor", found)
            .hint(hint)
            .unsupported()
            .in_file(path))
    };
    if let Some(map) = names.iter().find(|it| it.ends_with(WEIGHT_MAP)) {
        let hint = "open its shards one by one, or save the model again in one file";
        return unsupported(format!("a sharded checkpoint (weight map `{}`)", map.escape_debug()), hint);
    }
    if names.iter().any(|it| it == DISTRIBUTED) {
        let hint = "convert it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`";
        return unsupported("a distributed checkpoint of PyTorch (DCP, `.metadata`)".into(), hint);
    }
    if let Some(whole) = WHOLE_MODELS.iter().find(|whole| names.iter().any(|it| it == *whole)) {
        return named_by_folder(path, whole, options);
    }
    let stems = tensor_files(path, &names)?;
    if !stems.is_empty() {
        let (mut checkpoint, files) = open_tensors(path, stems, options)?;
        let hidden = names.iter().filter(|it| it.starts_with('.') && is_tensor_file(it));
        checkpoint.warnings.extend(hidden.map(|it| Warning::LeftOut(format!("the hidden file `{it}`"))));
        return Ok((checkpoint, files));
    }
    let mut safetensors = names.iter().filter(|it| it.ends_with(".safetensors"));
    match (safetensors.next(), safetensors.next()) {
        (Some(only), None) => named_by_folder(path, only, options),
        (Some(_), Some(_)) => {
            unsupported("several safetensors files without a weight map".into(), "open them one by one")
        }
        (None, _) => Err(Fault::new("a folder with a checkpoint", "none in it")
            .hint("a folder of tensors holds one .pt or .pth file for each")
            .corrupt()
            .in_file(path)),
    }
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
                if TENSOR_FILES.iter().any(|it| extension == Some(it.as_ref())) {
                    let found = format!("`{}`", name.display());
                    let hint = "rename the file, or move it out of the folder";
                    let fault = Fault::new("file names in UTF-8, the names of tensors", found);
                    return Err(fault.hint(hint).unsupported().in_file(path));
                }
            }
        }
    }
    Ok(names)
}

fn named_by_folder(path: &Path, name: &str, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let (checkpoint, files) = open_file(&path.join(name), options)?;
    Ok((Checkpoint { path: path.to_owned(), ..checkpoint }, files))
}

fn is_tensor_file(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| TENSOR_FILES.contains(&extension))
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
    let mut files = FileSet::default();
    let mut folder = Checkpoint {
        format: Format::Folder,
        path: path.to_owned(),
        files: Vec::new(),
        storages: Vec::new(),
        extents: Vec::new(),
        tensors: Vec::new(),
        composites: Vec::new(),
        roots: Vec::new(),
        warnings: Vec::new(),
    };
    for (name, file_path) in named {
        let source = FileSource::open(&file_path)?;
        let mut one = super::parse(&source, source.stamp().clone(), options)?;
        let (Some(mut tensor), None) = (one.tensors.pop(), one.tensors.pop()) else {
            let found = "another number of them";
            return Err(Fault::new("one tensor in each file of the folder", found)
                .hint("a checkpoint file among others: open it, not its folder")
                .corrupt()
                .in_file(&file_path));
        };
        let (file, first_storage) = (FileId(folder.files.len() as u32), folder.storages.len() as u32);
        if let Backing::Storage(storage) = &mut tensor.backing {
            *storage = StorageId(first_storage + storage.0);
        }
        let n_before = folder.tensors.len() as u32;
        let composites =
            one.composites.into_iter().map(|it| Composite { name: name.clone(), ..it.shifted(n_before) });
        folder.composites.extend(composites);
        tensor.name = name;
        folder.tensors.push(tensor);
        folder.storages.extend(one.storages.into_iter().map(|it| Storage { file, ..it }));
        folder.warnings.extend(one.warnings.into_iter().map(|it| match it {
            Warning::MetaTensor(_) => Warning::MetaTensor(folder.tensors[file.0 as usize].name.clone()),
            other => other,
        }));
        folder.files.extend(one.files);
        files.push(source);
    }
    folder.validate()?;
    Ok((folder, files))
}

/// Compares names as people do: `h.2` comes before `h.10`.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a.as_bytes(), b.as_bytes());
    loop {
        let n_digits = |it: &[u8]| it.iter().take_while(|it| it.is_ascii_digit()).count();
        let (n_left, n_right) = (n_digits(left), n_digits(right));
        if n_left > 0 && n_right > 0 {
            let number = |it: &[u8]| it.iter().position(|&it| it != b'0').unwrap_or(it.len());
            let (digits_left, digits_right) =
                (&left[number(&left[..n_left])..n_left], &right[number(&right[..n_right])..n_right]);
            let order =
                digits_left.len().cmp(&digits_right.len()).then_with(|| digits_left.cmp(digits_right));
            if order.is_ne() {
                return order;
            }
            (left, right) = (&left[n_left..], &right[n_right..]);
            continue;
        }
        match (left.split_first(), right.split_first()) {
            // Equal but for leading zeros: any order that is always the same.
            (None, None) => return a.cmp(b),
            (Some((x, rest_left)), Some((y, rest_right))) if x == y => {
                (left, right) = (rest_left, rest_right)
            }
            (x, y) => return x.map(|it| it.0).cmp(&y.map(|it| it.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_sort_by_value() {
        let mut names = ["h.10.b", "h.2.b", "h.2.a", "h", "h.02.b", "i"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["h", "h.2.a", "h.02.b", "h.2.b", "h.10.b", "i"]);
    }

    #[test]
    fn folders_without_a_checkpoint_say_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(open(folder.path(), &OpenOptions::default()).unwrap_err(), Error::Corrupt(_)));
        std::fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
        let error = open(folder.path(), &OpenOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains("sharded"), "{error}");
    }

    #[test]
    fn no_tensor_file_of_a_folder_is_left_out_in_silence() {
        use std::os::unix::ffi::OsStrExt;
        let samples = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/samples/per_tensor"));
        let folder = tempfile::tempdir().unwrap();
        let tensor = std::fs::read_dir(samples).unwrap().map(|it| it.unwrap().path()).next().unwrap();
        std::fs::copy(&tensor, folder.path().join("w.pt")).unwrap();
        std::fs::copy(&tensor, folder.path().join(".w.pt")).unwrap();
        let (checkpoint, _) = open(folder.path(), &OpenOptions::default()).unwrap();
        assert_eq!(checkpoint.tensors.len(), 1);
        let warnings: String = checkpoint.warnings.iter().map(ToString::to_string).collect();
        assert!(warnings.contains("`.w.pt`"), "{warnings}");

        let name = std::ffi::OsStr::from_bytes(b"w\xff.pt");
        std::fs::copy(&tensor, folder.path().join(name)).unwrap();
        assert!(matches!(open(folder.path(), &OpenOptions::default()).unwrap_err(), Error::Unsupported(_)));
    }

    #[test]
    fn distributed_checkpoints_are_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".metadata"), "").unwrap();
        let error = open(folder.path(), &OpenOptions::default()).unwrap_err();
        assert!(error.to_string().contains("DCP"), "{error}");
    }

    #[test]
    fn a_folder_with_one_model_opens_as_the_model() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        std::fs::write(folder.path().join("optimizer.pt"), "no checkpoint").unwrap();
        std::fs::write(folder.path().join("model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
        let (checkpoint, files) = open(folder.path(), &OpenOptions::default()).unwrap();
        assert_eq!((checkpoint.format, files.len()), (Format::Safetensors, 1));
        assert_eq!(checkpoint.path, folder.path());
    }
}
