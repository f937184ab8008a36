//! The state dict inside a checkpoint: where it may be, and a checkpoint of what is below one place alone.

use super::{Checkpoint, Composite, Warning};
use crate::{
    error::{Error, Fault, Result},
    tensor::{Backing, Extent, Storage, StorageId, Tensor},
};
use std::{collections::HashSet, convert::Infallible, fmt, str::FromStr};

/// Which part of a checkpoint is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// [`Checkpoint::root`], or everything if there is none.
    Auto,
    /// What is named below this path. A path is the start of full names up to a dot, so that keys with dots need no
    /// quotes: `model.encoder` finds `{'model': {'encoder.weight': ..}}` as well as `{'model': {'encoder': {..}}}`. A dot
    /// at its end is left aside.
    At(String),
}

impl FromStr for Root {
    type Err = Infallible;

    /// `auto`, or a path; a key of this name is `auto.`, with a dot.
    fn from_str(text: &str) -> Result<Root, Infallible> {
        Ok(if text == AUTO { Root::Auto } else { Root::At(text.to_owned()) })
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Root::Auto => f.write_str(AUTO),
            Root::At(path) if path == AUTO => write!(f, "{path}."),
            Root::At(path) => f.write_str(path),
        }
    }
}

const AUTO: &str = "auto";

/// Keys that a message lists.
const MAX_KEYS: usize = 20;

impl Checkpoint {
    /// The path of the state dict that this checkpoint holds beside other things: the first of [`Checkpoint::roots`].
    ///
    /// `None`: the tensors stand at the top, or nothing tells which dictionary of several it is.
    pub fn root(&self) -> Option<&str> {
        self.roots.first().map(String::as_str)
    }

    /// The tensors below a root, with names from there on; what is left out is a warning, with counts.
    ///
    /// Fails with [`Error::Mismatch`] if no tensor is below the path: it lists the keys there.
    pub fn restrict(mut self, root: &Root) -> Result<Checkpoint> {
        let (path, others) = match root {
            Root::Auto => match self.roots.split_first() {
                Some((path, others)) => (path.clone(), others.to_vec()),
                None => return Ok(self),
            },
            Root::At(path) => (path.strip_suffix('.').unwrap_or(path).to_owned(), Vec::new()),
        };
        let prefix = format!("{path}.");
        if !self.tensors.iter().any(|it| it.name.starts_with(&prefix)) {
            return Err(self.nothing_below(&path));
        }
        let (mut n_tensors, mut len_bytes) = (0u64, 0u64);
        self.retain_tensors(|tensor| {
            let is_below = strip(&mut tensor.name, &prefix);
            if !is_below {
                n_tensors += 1;
                if tensor.backing != Backing::Meta {
                    len_bytes = len_bytes.saturating_add(tensor.layout.len_bytes());
                }
            }
            is_below
        });
        self.composites.retain_mut(|it| {
            // What stands right at the path itself, its parts all below.
            let is_there = it.name == path;
            if is_there {
                it.name.clear();
            }
            is_there || strip(&mut it.name, &prefix)
        });
        self.warnings.retain_mut(|it| match it {
            Warning::MetaTensor(name) => strip(name, &prefix),
            Warning::SameName { name, listed_as, .. } => strip(listed_as, &prefix) && strip(name, &prefix),
            _ => true,
        });
        self.keep_used_storages();
        self.roots = Vec::new();
        if n_tensors > 0 {
            self.warnings.push(Warning::OutsideRoot { root: path, n_tensors, len_bytes, others });
        }
        Ok(self)
    }

    fn nothing_below(&self, path: &str) -> Error {
        let mut known = path;
        // The longest start of the path that is one of names.
        while !known.is_empty() && !self.tensors.iter().any(|it| below(&it.name, known).is_some()) {
            known = known.rsplit_once('.').map_or("", |(start, _)| start);
        }
        let mut keys: Vec<&str> = Vec::new();
        let mut seen = HashSet::new();
        for rest in self.tensors.iter().filter_map(|it| below(&it.name, known)) {
            let key = rest.split('.').next().unwrap_or_default();
            if seen.insert(key) {
                keys.push(key);
            }
        }
        let n_more = keys.len().saturating_sub(MAX_KEYS);
        let shown: Vec<String> =
            keys.iter().take(MAX_KEYS).map(|it| format!("`{}`", it.escape_debug())).collect();
        let more = if n_more > 0 { format!(" and {n_more} more") } else { String::new() };
        let place = if known.is_empty() { "at the top".to_owned() } else { format!("below `{known}`") };
        let found = match self.tensors.iter().any(|it| it.name == path) {
            true => "a tensor of that name".to_owned(),
            false if keys.is_empty() => "no tensors at all".to_owned(),
            false => format!("{}{more} {place}", shown.join(", ")),
        };
        Fault::new(format!("tensors below `{}`", path.escape_debug()), found)
            .hint("look at the names with `unladen inspect`")
            .mismatch()
            .in_file(&self.path)
    }

    /// Drops the storages that no tensor views any more.
    fn keep_used_storages(&mut self) {
        let mut new_id: Vec<Option<StorageId>> = vec![None; self.storages.len()];
        let mut storages: Vec<Storage> = Vec::new();
        let old = &self.storages;
        let mut renumber = |id: &mut StorageId| {
            *id = *new_id[id.0 as usize].get_or_insert_with(|| {
                storages.push(old[id.0 as usize].clone());
                StorageId(storages.len() as u32 - 1)
            });
        };
        let mut extents: Vec<Extent> = Vec::new();
        for Tensor { backing, .. } in &mut self.tensors {
            match backing {
                Backing::Meta => {}
                Backing::Storage(id) => renumber(id),
                Backing::Extents(range) => {
                    let start = extents.len() as u32;
                    extents.extend_from_slice(&self.extents[range.start as usize..range.end as usize]);
                    extents[start as usize..].iter_mut().for_each(|it| renumber(&mut it.storage));
                    *range = start..extents.len() as u32;
                }
            }
        }
        (self.storages, self.extents) = (storages, extents);
    }
}

impl Composite {
    /// The same one in a list where `n_before` tensors stand before those of its own.
    pub fn shifted(self, n_before: u32) -> Composite {
        Composite { parts: self.parts.start + n_before..self.parts.end + n_before, ..self }
    }
}

/// What comes after a path in a name below it.
fn below<'a>(name: &'a str, path: &str) -> Option<&'a str> {
    if path.is_empty() { Some(name) } else { name.strip_prefix(path)?.strip_prefix('.') }
}

/// Takes the prefix away. False, and nothing done, if there is none.
fn strip(name: &mut String, prefix: &str) -> bool {
    let is_below = name.starts_with(prefix);
    if is_below {
        name.drain(..prefix.len());
    }
    is_below
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::{CompositeKind, Format},
        dtype::DType,
        stamp::FileStamp,
        tensor::{Dims, FileId, Layout},
    };
    use std::path::PathBuf;

    /// A byte for each name; the last two are a nested tensor.
    fn checkpoint(names: &[&str]) -> Checkpoint {
        let stamp = FileStamp {
            path: PathBuf::from("x.pt"),
            dev: 0,
            ino: 0,
            len_bytes: 99,
            mtime_ns: 0,
            packed: None,
        };
        let tensor = |(index, name): (usize, &&str)| Tensor {
            name: (*name).to_owned(),
            layout: Layout::contiguous(DType::U8, &[1]).unwrap(),
            backing: Backing::Storage(StorageId(index as u32)),
        };
        let storage = |start_byte| Storage { file: FileId(0), start_byte, len_bytes: 1, swapped: false };
        let n_tensors = names.len() as u32;
        Checkpoint {
            format: Format::Pth,
            path: stamp.path.clone(),
            files: vec![stamp],
            storages: (0..n_tensors.into()).map(storage).collect(),
            extents: Vec::new(),
            tensors: names.iter().enumerate().map(tensor).collect(),
            composites: vec![Composite {
                name: "model.n".to_owned(),
                kind: CompositeKind::Nested,
                shape: Dims::new(),
                parts: n_tensors - 2..n_tensors,
            }],
            roots: vec!["model".to_owned()],
            warnings: vec![Warning::MetaTensor("model.a".to_owned()), Warning::MetaTensor("x".to_owned())],
        }
    }

    const NAMES: [&str; 5] = ["epoch", "model.a.w", "modell.a", "model.n.x", "model.n.y"];

    #[test]
    fn a_root_strips_names_and_says_what_it_leaves_out() {
        for root in [Root::Auto, "model".parse().unwrap(), "model.".parse().unwrap()] {
            let below = checkpoint(&NAMES).restrict(&root).unwrap();
            let names: Vec<&str> = below.tensors.iter().map(|it| it.name.as_str()).collect();
            assert_eq!(names, ["a.w", "n.x", "n.y"]);
            let starts: Vec<u64> = below.storages.iter().map(|it| it.start_byte).collect();
            assert_eq!(starts, [1, 3, 4]);
            assert_eq!((below.composites[0].name.as_str(), below.composites[0].parts.clone()), ("n", 1..3));
            let left_out = Warning::OutsideRoot {
                root: "model".to_owned(),
                n_tensors: 2,
                len_bytes: 2,
                others: Vec::new(),
            };
            assert_eq!(below.warnings, [Warning::MetaTensor("a".to_owned()), left_out]);
            below.validate().unwrap();
        }
    }

    #[test]
    fn what_stands_right_at_the_path_keeps_its_parts() {
        let below = checkpoint(&NAMES).restrict(&Root::At("model.n".to_owned())).unwrap();
        assert_eq!(below.tensors.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!((below.composites[0].name.as_str(), below.composites[0].parts.clone()), ("", 0..2));
        // The integers of a quantised tensor have its own name, and so they are not below it.
        let mut quantised = checkpoint(&["model.q", "model.q.scales", "model.q.zero_points"]);
        quantised.composites[0].name = "model.q".to_owned();
        quantised.composites[0].parts = 0..3;
        let below = quantised.restrict(&Root::At("model.q".to_owned())).unwrap();
        assert_eq!((below.tensors.len(), below.composites.len()), (2, 0));
    }

    #[test]
    fn a_path_that_leads_nowhere_lists_the_keys_there() {
        let error =
            |path: &str| checkpoint(&NAMES).restrict(&Root::At(path.to_owned())).unwrap_err().to_string();
        assert!(error("mode").contains("`epoch`, `model`, `modell` at the top"), "{}", error("mode"));
        assert!(error("model.b.c").contains("`a`, `n` below `model`"), "{}", error("model.b.c"));
        assert!(error("epoch").contains("a tensor of that name"), "{}", error("epoch"));
    }

    #[test]
    fn every_root_can_be_written_and_read() {
        for root in [Root::Auto, Root::At("auto".to_owned()), Root::At("a.b".to_owned())] {
            let again: Root = root.to_string().parse().unwrap();
            let path = |root: &Root| match root {
                Root::Auto => None,
                Root::At(path) => Some(path.trim_end_matches('.').to_owned()),
            };
            assert_eq!(path(&again), path(&root));
        }
    }

    #[test]
    fn everything_is_kept_where_there_is_nothing_to_choose() {
        let mut all = checkpoint(&NAMES);
        all.roots.clear();
        assert_eq!(all.clone().restrict(&Root::Auto).unwrap(), all);
    }
}
