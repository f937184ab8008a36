//! The state dict inside a checkpoint: where it may be, and a checkpoint of what is below one place alone.

use super::{Checkpoint, Composite, Warning};
use crate::{
    error::{Error, Fault, Result},
    tensor::{Backing, Extent, Storage, StorageId, Tensor},
};
use std::{collections::HashSet, convert::Infallible, fmt, ops::Range, str::FromStr};

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
        let path = match root {
            Root::Auto => match self.roots.first() {
                Some(path) => path.clone(),
                None => return Ok(self),
            },
            Root::At(path) => path.strip_suffix('.').unwrap_or(path).to_owned(),
        };
        let prefix = format!("{path}.");
        if !self.tensors.iter().any(|it| it.name.starts_with(&prefix)) {
            return Err(self.nothing_below(&path));
        }
        // Positions of what stays, as positions in the new list.
        let mut n_kept = 0;
        let mut new_position = Vec::with_capacity(self.tensors.len() + 1);
        let mut left_out_bytes = 0u64;
        for tensor in &self.tensors {
            new_position.push(n_kept);
            if tensor.name.starts_with(&prefix) {
                n_kept += 1;
            } else if tensor.backing != Backing::Meta {
                left_out_bytes = left_out_bytes.saturating_add(tensor.layout.len_bytes());
            }
        }
        new_position.push(n_kept);
        let n_left_out = (self.tensors.len() as u64).saturating_sub(n_kept.into());
        self.tensors.retain_mut(|it| strip(&mut it.name, &prefix));
        self.composites.retain_mut(|it| {
            let Range { start, end } = it.parts;
            it.parts = new_position[start as usize]..new_position[end as usize];
            // The integers of a quantised tensor right at the path would go with its other parts.
            if it.name == path {
                it.name.clear();
            } else if !strip(&mut it.name, &prefix) {
                return false;
            }
            end - start == it.parts.end - it.parts.start
        });
        self.warnings.retain_mut(|it| match it {
            Warning::MetaTensor(name) => strip(name, &prefix),
            Warning::SameName { name, listed_as, .. } => strip(listed_as, &prefix) && strip(name, &prefix),
            _ => true,
        });
        self.keep_used_storages();
        self.roots = Vec::new();
        if n_left_out > 0 {
            let (n_tensors, len_bytes) = (n_left_out, left_out_bytes);
            self.warnings.push(Warning::OutsideRoot { root: path, n_tensors, len_bytes });
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
            let left_out = Warning::OutsideRoot { root: "model".to_owned(), n_tensors: 2, len_bytes: 2 };
            assert_eq!(below.warnings, [Warning::MetaTensor("a".to_owned()), left_out]);
            below.validate().unwrap();
        }
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
