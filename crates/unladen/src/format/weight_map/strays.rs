//! Finds the files beside a weight map that look like parts of its model and that it does not name.

use crate::{
    checkpoint::Warning,
    format::{OpenOptions, confine::shortened, folder::is_named},
};
use std::{
    collections::{BTreeSet, HashSet},
    path::Path,
};

/// Extensions of files with tensors: those that a weight map may name side by side.
const KINDS: [&[&str]; 2] = [&["safetensors"], &["bin", "pt", "pth"]];

/// Starts of names of what training programs save beside a model.
const OF_TRAINING: [&str; 6] =
    ["training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states"];

/// Names that the warning has; what else there is is counted.
const MAX_NAMES: usize = 5;

/// A warning about the files of `folder` that look like parts of the model and that the map `map_name` does not name;
/// `named` are those that it does. `None` if there are none, or if the folder cannot be listed: the map says what the
/// model is, and this is news beside it.
///
/// Left aside are files that are known for something else: variants of the model, adapters, states of training.
pub(super) fn warning(
    folder: &Path,
    map_name: &str,
    named: &HashSet<&str>,
    options: &OpenOptions,
) -> Option<Warning> {
    let kinds = kinds(map_name, named);
    let stems: HashSet<&str> = named.iter().map(|it| stem(it)).collect();
    // Folders list their files in any order: kept are the first by name.
    let mut first: BTreeSet<String> = BTreeSet::new();
    let mut n_strays = 0usize;
    for entry in std::fs::read_dir(folder).ok()?.take(options.limits.n_files) {
        let Ok(entry) = entry else { continue };
        let Ok(name) = entry.file_name().into_string() else { continue };
        if named.contains(&*name)
            || !is_of_kind(&name, &kinds)
            || is_known(&name, &stems)
            || entry.file_type().is_ok_and(|it| it.is_dir())
        {
            continue;
        }
        n_strays += 1;
        first.insert(name);
        if first.len() > MAX_NAMES {
            first.pop_last();
        }
    }
    if n_strays == 0 {
        return None;
    }
    let names: Vec<String> = first.iter().map(|it| format!("`{}`", shortened(it))).collect();
    let more = match n_strays - names.len() {
        0 => String::new(),
        n_more => format!(" and {n_more} more"),
    };
    let files = if n_strays == 1 { "1 file".to_owned() } else { format!("{n_strays} files") };
    let what = format!("{files} beside the weight map that it does not name: {}{more}", names.join(", "));
    Some(Warning::LeftOut(what))
}

/// The kinds of files that a map names; the map's own name tells where it names none.
fn kinds(map_name: &str, named: &HashSet<&str>) -> Vec<&'static [&'static str]> {
    let is_mapped = |kind: &[&str]| match named.is_empty() {
        true => map_name.split('.').any(|part| kind.contains(&part)),
        false => named.iter().any(|it| is_of_kind(it, &[kind])),
    };
    KINDS.into_iter().filter(|it| is_mapped(it)).collect()
}

fn is_of_kind(name: &str, kinds: &[&[&str]]) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    !name.starts_with('.') && kinds.iter().any(|it| it.contains(&extension))
}

/// True for files that are known not to be a part of the model of files with these stems.
fn is_known(name: &str, stems: &HashSet<&str>) -> bool {
    let own = stem(name);
    if stems.contains(own) {
        return false;
    }
    // `model.fp16` is a variant of `model`, and the other way round.
    let model = |it: &str| it.split_once('.').map_or(it.len(), |(model, _)| model.len());
    let is_variant = stems.iter().any(|it| it.get(..model(it)) == own.get(..model(own)));
    is_variant || is_named(name) || OF_TRAINING.iter().any(|it| name.starts_with(it))
}

/// A file's name without its extension and without its number: `model` of `model-00001-of-00002.safetensors`.
fn stem(name: &str) -> &str {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let is_number = |it: &str| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit());
    let without_number = || {
        let (rest, n_files) = stem.rsplit_once("-of-")?;
        let (rest, number) = rest.rsplit_once('-')?;
        (is_number(n_files) && is_number(number)).then_some(rest)
    };
    without_number().unwrap_or(stem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn warned(map_name: &str, named: &[&str], others: &[&str]) -> String {
        let folder = tempfile::tempdir().unwrap();
        others.iter().chain(named).for_each(|it| fs::write(folder.path().join(it), "").unwrap());
        fs::create_dir(folder.path().join("folder.safetensors")).unwrap();
        let named = named.iter().copied().collect();
        let warning = warning(folder.path(), map_name, &named, &OpenOptions::default());
        warning.map(|it| it.to_string()).unwrap_or_default()
    }

    const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    const MAP: &str = "model.safetensors.index.json";

    #[test]
    fn files_that_may_be_forgotten_parts_are_counted_and_named() {
        let text = warned(MAP, &SHARDS, &["model-00003-of-00002.safetensors"]);
        assert!(text.contains("1 file") && text.contains("`model-00003-of-00002.safetensors`"), "{text}");
        // Shards of another save, and the same model in another form.
        for name in [
            "model-00001-of-00004.safetensors",
            "model.safetensors",
            "consolidated.safetensors",
            "extra.safetensors",
        ] {
            assert!(warned(MAP, &SHARDS, &[name]).contains(name), "{name}");
        }
        let many: Vec<String> = (0..9).map(|it| format!("x{it}.safetensors")).collect();
        let text = warned(MAP, &SHARDS, &many.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(text.contains("9 files") && text.contains("`x4.safetensors` and 4 more"), "{text}");
    }

    #[test]
    fn files_that_are_something_else_are_left_in_peace() {
        let others = [
            "model.fp16-00001-of-00002.safetensors",
            "model.fp16.safetensors",
            "adapter_model.safetensors",
            "diffusion_pytorch_model.safetensors",
            "pytorch_model-00001-of-00002.bin",
            "training_args.bin",
            "optimizer.pt",
            "config.json",
            ".model-00003-of-00002.safetensors",
            "model-00001-of-00002.safetensors.tmp",
        ];
        assert_eq!(warned(MAP, &SHARDS, &others), "");
        let variant = ["model.fp16-00001-of-00001.safetensors"];
        assert_eq!(warned("model.safetensors.index.fp16.json", &variant, &SHARDS), "");
        let bins = ["pytorch_model-00001-of-00001.bin"];
        let others = ["training_args.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", SHARDS[0]];
        assert_eq!(warned("pytorch_model.bin.index.json", &bins, &others), "");
    }

    #[test]
    fn a_map_without_files_has_the_kind_of_its_name_and_a_folder_that_is_not_listed_no_strays() {
        assert!(warned(MAP, &[], &["a.safetensors", "b.bin"]).contains("1 file beside"));
        assert!(warned("x.bin.index.json", &[], &["a.safetensors", "b.bin"]).contains("`b.bin`"));
        let nowhere = warning(Path::new("/nowhere/at/all"), MAP, &HashSet::new(), &OpenOptions::default());
        assert_eq!(nowhere, None);
    }

    #[test]
    fn a_long_folder_is_read_so_far_and_no_further() {
        let folder = tempfile::tempdir().unwrap();
        (0..20).for_each(|it| fs::write(folder.path().join(format!("{it}.bin")), "").unwrap());
        let mut options = OpenOptions::default();
        options.limits.n_files = 7;
        let text = warning(folder.path(), "x.bin.index.json", &HashSet::new(), &options).unwrap().to_string();
        assert!(text.contains("7 files"), "{text}");
    }
}
