//! Finds the files of one model by their numbers: `model-00001-of-00003.safetensors`, where no weight map names them.

use super::{
    OpenOptions,
    assembly::{Assembly, check_n_files},
    confine::{Folder, shortened, shown},
    open_source,
};
use crate::{
    checkpoint::{Checkpoint, Format},
    error::{Fault, Result},
    source::FileSet,
};
use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    path::Path,
};

/// What the files may be; the first kind that there is counts, as where a weight map names them.
const EXTENSIONS: [&str; 2] = ["safetensors", "bin"];

/// How the names of files begin that hold shards of tensors, not tensors: PyTorch's distributed saves as safetensors.
const SPLIT_START: &str = "shard-";

/// What the files of one model have in common: the place of the extension, what stands before the numbers, how many.
type Kind<'a> = (usize, &'a str, u32);

/// The files of the only numbered model of a folder, in order; `None` if no name is numbered.
///
/// Fails with [`Error::Corrupt`](crate::Error::Corrupt) if one is missing, with
/// [`Error::Unsupported`](crate::Error::Unsupported) if there are several models.
pub(super) fn find(names: &[String]) -> Result<Option<Vec<&str>>> {
    let mut kinds: BTreeMap<Kind<'_>, BTreeMap<u32, &str>> = BTreeMap::new();
    for name in names {
        let Some((kind, number)) = numbers(name) else { continue };
        match kinds.entry(kind).or_default().entry(number) {
            Entry::Vacant(place) => {
                place.insert(name.as_str());
            }
            Entry::Occupied(other) => {
                let found = format!("`{}` and `{}`", shown(other.get()), shown(name));
                return Err(Fault::new("one file of each number", found).corrupt());
            }
        }
    }
    let mut kinds = kinds.into_iter();
    let Some(((extension, prefix, n_files), files)) = kinds.next() else { return Ok(None) };
    if prefix.starts_with(SPLIT_START) {
        let found = format!("shards of tensors (`{}-*`)", shown(prefix));
        return Err(Fault::new("numbered files with whole tensors", found)
            .hint("put them together with torch.distributed.checkpoint's `consolidate_safetensors_files`")
            .unsupported());
    }
    if let Some(((_, other, n_others), _)) = kinds.next().filter(|((it, ..), _)| *it == extension) {
        let found = format!("`{}-*-of-{n_files}` and `{}-*-of-{n_others}`", shown(prefix), shown(other));
        return Err(Fault::new("the numbered files of one model, or a weight map", found)
            .hint("open the files one by one, or move one of the models to another folder")
            .unsupported());
    }
    match (1..=n_files).find(|it| !files.contains_key(it)) {
        None => Ok(Some(files.into_values().collect())),
        Some(missing) => {
            let expected = format!("{n_files} files `{}-*-of-*.{}`", shown(prefix), EXTENSIONS[extension]);
            Err(Fault::new(expected, format!("{} of them, without number {missing}", files.len()))
                .hint("the download or copy is incomplete: bring the missing file, or open a file by itself")
                .corrupt())
        }
    }
}

/// Takes a name apart: what it has in common with the others, and its number.
fn numbers(name: &str) -> Option<(Kind<'_>, u32)> {
    let number = |it: &str| it.bytes().all(|it| it.is_ascii_digit()).then(|| it.parse::<u32>().ok())?;
    let (stem, extension) = name.rsplit_once('.')?;
    let extension = EXTENSIONS.iter().position(|it| *it == extension)?;
    let (rest, n_files) = stem.rsplit_once("-of-")?;
    let (prefix, position) = rest.rsplit_once('-')?;
    let (n_files, position) = (number(n_files)?, number(position)?);
    (1..=n_files).contains(&position).then_some(((extension, prefix, n_files), position))
}

/// Opens these files as one checkpoint. Fails if two hold a tensor of one name.
pub(super) fn open(path: &Path, names: &[&str], options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    check_n_files(names.len(), options)?;
    let folder = Folder::new(path, options);
    let mut assembly = Assembly::new(Format::Sharded, path, options);
    let mut n_tensors = Vec::with_capacity(names.len());
    for name in names {
        let source = folder.open(name)?;
        assembly.append(open_source(source, &assembly.options_left(options))?)?;
        n_tensors.push(assembly.checkpoint.tensors.len());
    }
    let mut seen = HashMap::with_capacity(assembly.checkpoint.tensors.len());
    for (position, tensor) in assembly.checkpoint.tensors.iter().enumerate() {
        if let Some(first) = seen.insert(tensor.name.as_str(), position) {
            let [one, other] = [first, position].map(|it| names[n_tensors.partition_point(|&end| end <= it)]);
            return Err(Fault::new(
                "each tensor in one of the files",
                format!("one in {one} and in {other}"),
            )
            .tensor(shortened(&tensor.name))
            .hint("the files belong to different models, or are not meant to be one; open them one by one")
            .corrupt());
        }
    }
    assembly.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Result<Option<Vec<String>>> {
        let names: Vec<String> = names.iter().map(|it| (*it).to_owned()).collect();
        find(&names).map(|it| it.map(|files| files.into_iter().map(str::to_owned).collect()))
    }

    #[test]
    fn numbered_files_come_in_their_order() {
        let files = found(&["b-00002-of-00002.bin", "config.json", "b-00001-of-00002.bin"]).unwrap().unwrap();
        assert_eq!(files, ["b-00001-of-00002.bin", "b-00002-of-00002.bin"]);
        let both = ["m-1-of-1.bin", "m-1-of-1.safetensors"];
        assert_eq!(found(&both).unwrap().unwrap(), ["m-1-of-1.safetensors"]);
        assert_eq!(
            found(&["model.safetensors", "a-of-b.bin", "x-3-of-2.bin", "x-0-of-2.bin"]).unwrap(),
            None
        );
        assert_eq!(
            found(&["x-99999999999-of-99999999999.bin", "x-+1-of-2.bin", "x--of-.bin"]).unwrap(),
            None
        );
    }

    #[test]
    fn missing_files_and_several_models_are_errors() {
        let missing = found(&["m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"]).unwrap_err();
        assert!(missing.to_string().contains("without number 2"), "{missing}");
        assert!(found(&["m-1-of-4000000000.bin"]).is_err());
        assert!(found(&["a-1-of-1.bin", "b-1-of-1.bin"]).is_err());
        assert!(found(&["a-1-of-2.bin", "a-01-of-2.bin", "a-2-of-2.bin"]).is_err());
        let split = found(&["shard-00001-model-00001-of-00001.safetensors"]).unwrap_err();
        assert!(split.hint().contains("consolidate"), "{split}");
    }
}
