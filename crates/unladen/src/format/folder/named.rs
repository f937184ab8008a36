//! Which file of a folder is the model, by the names that Hugging Face's libraries give: the first of several counts.

/// In the order in which these libraries look for them, their own models first, then diffusers' parts, then adapters.
const NAMES: [&str; 10] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
];

/// What the names of weight maps end with.
const WEIGHT_MAPS: [&str; 2] = [".safetensors.index.json", ".index.json"];

/// Parts of the longest of these names between dots, with a variant.
const MAX_PARTS: usize = 5;

/// The model of a folder.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Named<'a> {
    /// The file to open: a model, or the weight map of one.
    pub(super) file: &'a str,
    /// Others that would have been as good, if there are any.
    pub(super) equals: Vec<&'a str>,
    /// Others that come after it.
    pub(super) others: Vec<&'a str>,
}

/// The model of a folder with these files; `None` without any of these names.
pub(super) fn find(names: &[String]) -> Option<Named<'_>> {
    let mut found: Vec<(usize, &str)> =
        names.iter().filter_map(|name| rank(name).map(|rank| (rank, &**name))).collect();
    found.sort_unstable();
    let &(first_rank, file) = found.first()?;
    let n_first = found.partition_point(|(rank, _)| *rank == first_rank);
    Some(Named {
        file,
        equals: found[1..n_first].iter().map(|it| it.1).collect(),
        others: found[n_first..].iter().map(|it| it.1).collect(),
    })
}

/// True for the names that such a model has, whole or by its weight map.
pub(in crate::format) fn is_named(name: &str) -> bool {
    rank(name).is_some()
}

/// The lower, the sooner: plain names, then variants of them (`model.fp16.safetensors`), then other weight maps.
fn rank(name: &str) -> Option<usize> {
    let position = |name: &str| NAMES.iter().position(|it| *it == name);
    if let Some(plain) = position(name) {
        return Some(plain);
    }
    let parts: Vec<&str> = name.split('.').collect();
    let without = |skipped: usize| {
        let others = parts.iter().enumerate().filter(|(index, _)| *index != skipped).map(|(_, part)| *part);
        others.collect::<Vec<_>>().join(".")
    };
    // A name with more parts is none of these, and a numbered file is a part of a model.
    let n_places = if parts.len() <= MAX_PARTS { parts.len() - 1 } else { 0 };
    let variant =
        (1..n_places).filter(|it| !parts[*it].contains("-of-")).find_map(|it| position(&without(it)));
    let map = || WEIGHT_MAPS.iter().position(|it| name.ends_with(it) && !name.starts_with('.'));
    variant.map(|it| NAMES.len() + it).or_else(|| map().map(|it| 2 * NAMES.len() + it))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Option<(String, usize, usize)> {
        let names: Vec<String> = names.iter().map(|it| (*it).to_owned()).collect();
        find(&names).map(|it| (it.file.to_owned(), it.equals.len(), it.others.len()))
    }

    #[test]
    fn the_order_is_that_of_the_libraries() {
        let is = |names: &[&str], file: &str| {
            assert_eq!(found(names).map(|it| it.0).as_deref(), Some(file), "{names:?}");
        };
        is(&["pytorch_model.bin", "model.safetensors"], "model.safetensors");
        is(&["pytorch_model.bin", "model.safetensors.index.json"], "model.safetensors.index.json");
        is(&["pytorch_model.bin.index.json", "model.safetensors.index.json"], "model.safetensors.index.json");
        is(&["model.fp16.safetensors", "model.safetensors"], "model.safetensors");
        is(&["model.fp16.safetensors", "pytorch_model.bin"], "pytorch_model.bin");
        is(&["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json");
        is(
            &["diffusion_pytorch_model.safetensors.fp16.index.json", "x.index.json"],
            "diffusion_pytorch_model.safetensors.fp16.index.json",
        );
        is(&["adapter_model.safetensors", "adapter_config.json"], "adapter_model.safetensors");
        is(&["x.bin.index.json", "x.safetensors.index.json"], "x.safetensors.index.json");
    }

    #[test]
    fn numbered_files_and_others_are_no_models() {
        for name in [
            "model.fp16-00001-of-00002.safetensors",
            "model-00001-of-00002.safetensors",
            "optimizer.bin",
            "model.safetensors.tmp",
            "index.json",
            ".index.json",
            "model..a.b.c.d.safetensors",
            "model",
            "",
        ] {
            assert_eq!(found(&[name]), None, "{name}");
        }
    }

    #[test]
    fn equals_and_others_are_told_apart() {
        let names = ["model.fp16.safetensors", "model.bf16.safetensors", "pytorch_model.fp16.bin"];
        assert_eq!(found(&names), Some(("model.bf16.safetensors".to_owned(), 1, 1)));
    }
}
