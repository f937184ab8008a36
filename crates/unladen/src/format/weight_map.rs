//! Opens checkpoints whose files a weight map names: `model.safetensors.index.json`, `pytorch_model.bin.index.json`.

mod strays;

use super::{
    OpenOptions,
    assembly::{Assembly, check_n_files},
    confine::{Folder, ShownNames, shortened, shown},
    folder::natural,
    open_source,
};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    error::{Fault, Result},
    source::{FileSet, FileSource, ReadAt as _},
};
use foldhash::{HashMap, HashMapExt as _, fast::RandomState};
use hashbrown::HashTable;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};
use std::{borrow::Cow, collections::HashSet, fmt, hash::BuildHasher as _, path::Path};

/// Keys beside the weight map; real ones have one, `metadata`.
const MAX_OTHER_KEYS: usize = 1000;

/// True for what can only be JSON. A safetensors file starts with a length, whose high bytes are zeros.
pub(super) fn is_json(head: &[u8]) -> bool {
    let start = &head[..head.len().min(8)];
    start.trim_ascii_start().starts_with(b"{") && !start.contains(&0)
}

/// Opens the files that a weight map names, and keeps of each the tensors that the map says are there.
pub(super) fn open(index: FileSource, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let path = index.path().to_owned();
    open_shards(index, &path, options).map_err(|error| error.in_file(&path))
}

fn open_shards(index: FileSource, path: &Path, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let text = read_json(&index, options)?;
    // One file less that is open while the others are.
    drop(index);
    let map = parse(&text, options)?;
    let folder = Folder::new(path.parent().unwrap_or(path), options);
    let mut assembly = Assembly::new(Format::Sharded, path, options);
    assembly.checkpoint.warnings = map.warnings(path, &folder, options);
    let mut order: Vec<u32> = (0..map.files.len() as u32).collect();
    order.sort_by(|a, b| natural(&map.files[*a as usize].0, &map.files[*b as usize].0));
    for file in order {
        let source = folder.open(&map.files[file as usize].0)?;
        let (mut shard, files) = open_source(source, &assembly.options_left(options))?;
        map.select(file, &mut shard)?;
        assembly.append((shard, files))?;
    }
    assembly.finish()
}

/// The text of an index, which is JSON.
pub(super) fn read_json(index: &FileSource, options: &OpenOptions) -> Result<Vec<u8>> {
    let (len_bytes, most_bytes) = (index.len_bytes(), options.limits.weight_map_bytes);
    if len_bytes > most_bytes {
        let expected = format!("an index of at most {most_bytes} bytes");
        return Err(Fault::new(expected, format!("{len_bytes} bytes")).over_limit("weight_map_bytes"));
    }
    index.read_range(0..len_bytes)
}

fn parse<'a>(text: &'a [u8], options: &OpenOptions) -> Result<WeightMap<'a>> {
    let map = serde_json::from_slice::<WeightMap<'a>>(text).map_err(|error| {
        let hint = "name a checkpoint file, or the weight map (`*.index.json`) of its shards";
        Fault::new("a weight map in JSON", error.to_string()).hint(hint).corrupt()
    })?;
    check_n_files(map.files.len(), options)?;
    if map.entries.len() > options.limits.n_tensors {
        let expected = format!("at most {} tensors", options.limits.n_tensors);
        return Err(Fault::new(expected, format!("{} of them", map.entries.len())).over_limit("n_tensors"));
    }
    Ok(map)
}

/// Which tensor is in which file.
#[derive(Default)]
struct WeightMap<'a> {
    /// Tensor, and position of its file.
    entries: Vec<(Cow<'a, str>, u32)>,
    /// File, and how many tensors it holds.
    files: Vec<(Cow<'a, str>, usize)>,
    state: RandomState,
    /// Positions in the entries: the names stand there.
    by_name: HashTable<u32>,
}

impl WeightMap<'_> {
    /// What is odd about the map as a whole.
    fn warnings(&self, path: &Path, folder: &Folder<'_>, options: &OpenOptions) -> Vec<Warning> {
        let is_empty = self.entries.is_empty();
        let what = "all that the folder holds, because the weight map lists no tensors";
        let empty = is_empty.then(|| Warning::LeftOut(what.to_owned()));
        let named = self.files.iter().map(|(name, _)| &**name).collect();
        let map_name = path.file_name().unwrap_or_default().to_string_lossy();
        empty.into_iter().chain(strays::warning(folder.path(), &map_name, &named, options)).collect()
    }

    fn file_of(&self, tensor: &str) -> Option<u32> {
        let is_name = |&it: &u32| self.entries[it as usize].0 == tensor;
        let position = self.by_name.find(self.state.hash_one(tensor), is_name)?;
        Some(self.entries[*position as usize].1)
    }

    /// Keeps the tensors that the map says are in this file. Fails if one is missing.
    fn select(&self, file: u32, shard: &mut Checkpoint) -> Result<()> {
        let (name, n_listed) = &self.files[file as usize];
        let mut others = ShownNames::default();
        shard.retain_tensors(|tensor| {
            let is_listed = self.file_of(&tensor.name) == Some(file);
            if !is_listed {
                others.push(&tensor.name);
            }
            is_listed
        });
        if shard.tensors.len() != *n_listed {
            let found: HashSet<&str> = shard.tensors.iter().map(|it| it.name.as_str()).collect();
            let of_file = self.entries.iter().filter(|(_, it)| *it == file);
            let missing = of_file.map(|(name, _)| &**name).find(|name| !found.contains(name));
            let fault = Fault::new("the tensor that the weight map says is here", "no tensor of that name")
                .tensor(shortened(missing.unwrap_or_default()))
                .hint("the weight map and the file belong to different models; fetch both again");
            return Err(fault.corrupt().in_file(&shard.path));
        }
        if others.len() > 0 {
            let file = shortened(name);
            let what = format!("tensors of {file}, where the weight map does not list them: {others}");
            shard.warnings.push(Warning::LeftOut(what));
        }
        Ok(())
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for WeightMap<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(IndexVisitor)
    }
}

/// Reads the index: the weight map, and what stands beside it.
struct IndexVisitor;

impl<'de> Visitor<'de> for IndexVisitor {
    type Value = WeightMap<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut index: A) -> Result<Self::Value, A::Error> {
        let (mut map, mut others) = (None, HashSet::new());
        while let Some(Text(key)) = index.next_key()? {
            let is_twice = if key == "weight_map" {
                map.replace(index.next_value::<Entries<'de>>()?.0).is_some()
            } else {
                index.next_value::<IgnoredAny>()?;
                !others.insert(key.clone())
            };
            if is_twice {
                return Err(A::Error::custom(format_args!("key `{}` stands twice", shown(&key))));
            }
            if others.len() > MAX_OTHER_KEYS {
                return Err(A::Error::custom(format_args!("more than {MAX_OTHER_KEYS} keys")));
            }
        }
        map.ok_or_else(|| A::Error::missing_field("weight_map"))
    }
}

/// The weight map itself.
struct Entries<'a>(WeightMap<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object that says which file each tensor is in")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let mut map = WeightMap::default();
        let mut position_of: HashMap<Cow<'de, str>, u32> = HashMap::new();
        while let Some((Text(name), Text(file))) = object.next_entry()? {
            if map.file_of(&name).is_some() {
                return Err(A::Error::custom(format_args!("key `{}` stands twice", shown(&name))));
            }
            let position = *position_of.entry(file).or_insert_with_key(|file| {
                map.files.push((file.clone(), 0));
                map.files.len() as u32 - 1
            });
            map.files[position as usize].1 += 1;
            let hash = map.state.hash_one(&*name);
            map.entries.push((name, position));
            let (entries, state) = (&map.entries, &map.state);
            let rehash = |&it: &u32| state.hash_one(&*entries[it as usize].0);
            map.by_name.insert_unique(hash, entries.len() as u32 - 1, rehash);
        }
        Ok(Entries(map))
    }
}

/// A string that is borrowed from the text where it holds no escape (`Cow` alone always copies).
#[derive(Deserialize)]
pub(super) struct Text<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);
