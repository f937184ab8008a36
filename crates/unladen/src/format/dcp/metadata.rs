//! Reads the `.metadata` of a distributed checkpoint: which tensors there are, in which chunks, and where each chunk's bytes
//! are. It is the pickle of a few classes of PyTorch's, which are read as data like every other pickle.

use super::super::{
    OpenOptions,
    confine::{ShownNames, shortened, shown},
    pickle::{self, Arena, Meaning, Value},
    rebuild::{Visits, unsigned},
    roots,
};
use crate::{
    checkpoint::Warning,
    dtype::DType,
    error::{Error, Fault, Result},
    tensor::{Dims, MAX_DIMS},
};
use foldhash::{HashMap, HashMapExt as _, HashSet, HashSetExt as _};
use std::ops::Range;

/// Bytes of a name that cost as much as a visited value.
const NAME_BYTES_PER_VISIT: usize = 8;
/// Classes whose modules start so are PyTorch's own, and expected here.
const OWN_MODULES: &[u8] = b"torch.distributed.";
/// The folder's own path stands in the metadata as an object, whose class has moved.
const PATHS: &[u8] = b"pathlib";

const HINT: &str = "convert it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`";

/// What the metadata say.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    /// In the order of the state dict.
    pub(super) tensors: Vec<SplitTensor>,
    /// Those of one tensor behind each other.
    pub(super) chunks: Vec<Chunk>,
    /// What is no tensor, in the order of the state dict.
    pub(super) objects: Vec<Object>,
    /// Keys of the outermost dictionary that may be a state dict's, the likeliest first.
    pub(super) roots: Vec<String>,
    /// Names of the files, each once.
    pub(super) files: Vec<String>,
    pub(super) warnings: Vec<Warning>,
}

/// A tensor that is stored in chunks.
#[derive(Debug)]
pub(super) struct SplitTensor {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) size: Dims,
    /// Positions in [`Metadata::chunks`].
    pub(super) chunks: Range<usize>,
}

/// A box of a tensor, and where it is.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Index of its first element in the tensor.
    pub(super) at: Dims,
    pub(super) size: Dims,
    /// Position in [`Metadata::files`].
    pub(super) file: u32,
    /// In the file.
    pub(super) bytes: Range<u64>,
}

/// A number, a string or whatever else is no tensor: pickled, in an archive of its own.
#[derive(Debug)]
pub(super) struct Object {
    pub(super) name: String,
    /// Tensors that come before it in the state dict.
    pub(super) n_before: usize,
    /// Position in [`Metadata::files`], and where in that file. `None`: nothing says where.
    pub(super) place: Option<(u32, Range<u64>)>,
}

/// Reads the pickle. Fails with [`Error::Unsupported`] for what no version of PyTorch writes, or writes with extensions.
pub(super) fn read(bytes: &[u8], options: &OpenOptions) -> Result<Metadata> {
    let mut pickle = pickle::read(bytes, 0, &options.limits)?;
    if let Some(key) = pickle.arena.merge_duplicate_keys(1).first() {
        return Err(Fault::new("each key once", format!("key `{}` twice", shown(key))).corrupt());
    }
    let arena = &pickle.arena;
    let mut reader = Reader {
        arena,
        visits: Visits::new(bytes.len()),
        stored: HashMap::new(),
        objects: HashMap::new(),
        file_of: HashMap::new(),
        metadata: Metadata::default(),
        max_chunks: options.limits.n_tensors,
    };
    let root = reader.object(pickle.root, "Metadata")?;
    let storage_data = reader.field(root, "storage_data")?;
    let state_dict = reader.field(root, "state_dict_metadata")?;
    reader.list_stored(storage_data)?;
    reader.read_tensors(state_dict)?;
    if let Some(Value::Dict(paths)) = reader.optional(root, "planner_data")? {
        reader.find_roots(paths)?;
    }
    let Reader { stored, mut metadata, .. } = reader;
    if !stored.is_empty() {
        metadata.warnings.push(Warning::LeftOut(format!("{} chunks that belong to no tensor", stored.len())));
    }
    metadata.warnings.extend(unknown_symbols(arena));
    Ok(metadata)
}

/// Which chunk of which tensor: the tensor's name, and the index of the chunk's first element.
type ChunkKey<'a> = (&'a [u8], Dims);

struct Reader<'a> {
    arena: &'a Arena<'a>,
    visits: Visits,
    /// Where the chunks are that no tensor has claimed yet.
    stored: HashMap<ChunkKey<'a>, Value>,
    /// Where what is no tensor is.
    objects: HashMap<&'a [u8], Value>,
    file_of: HashMap<&'a [u8], u32>,
    metadata: Metadata,
    max_chunks: usize,
}

impl<'a> Reader<'a> {
    /// Collects the places of all chunks.
    fn list_stored(&mut self, storage_data: Value) -> Result<()> {
        let arena = self.arena;
        let Value::Dict(dict) = storage_data else {
            return Err(malformed("a dictionary as storage_data", "something else"));
        };
        for &(key, place) in &arena.dicts[dict as usize].items {
            let key = self.object(key, "MetadataIndex")?;
            let name = self.field(key, "fqn")?;
            let name = self.name(name)?;
            // What is no tensor has no place in one.
            let Some(at) = self.optional(key, "offset")? else {
                self.objects.insert(name, place);
                continue;
            };
            let at = self.dims(at)?;
            if self.stored.insert((name, at), place).is_some() {
                let found = format!("two for a chunk of `{}`", shown(&String::from_utf8_lossy(name)));
                return Err(malformed("one place for each chunk", &found));
            }
        }
        Ok(())
    }

    fn read_tensors(&mut self, state_dict: Value) -> Result<()> {
        let arena = self.arena;
        let Value::Dict(dict) = state_dict else {
            return Err(malformed("a dictionary as state_dict_metadata", "something else"));
        };
        let mut objects = ShownNames::default();
        for &(key, value) in &arena.dicts[dict as usize].items {
            let bytes = self.name(key)?;
            let Ok(name) = std::str::from_utf8(bytes) else {
                return Err(malformed("names in UTF-8", "other bytes"));
            };
            if self.class_of(value) == Some(&b"BytesStorageMetadata"[..]) {
                objects.push(name);
                let place = self.objects.remove(bytes).map(|it| self.place(it)).transpose()?;
                let n_before = self.metadata.tensors.len();
                self.metadata.objects.push(Object { name: name.to_owned(), n_before, place });
                continue;
            }
            self.read_tensor(bytes, name, value).map_err(|error| error.in_tensor(&shortened(name)))?;
        }
        if objects.len() > 0 {
            let what = format!(
                "what is stored as pickled objects, not as tensors (`inspect --tree` shows it): {objects}"
            );
            self.metadata.warnings.push(Warning::LeftOut(what));
        }
        Ok(())
    }

    /// Names are flat, and the planner says which keys each was made of.
    fn find_roots(&mut self, paths: u32) -> Result<()> {
        let arena = self.arena;
        let mut tensors: HashSet<&[u8]> = HashSet::new();
        let names: Vec<&str> = self.metadata.tensors.iter().map(|it| &*it.name).collect();
        tensors.extend(names.iter().map(|it| it.as_bytes()));
        let mut tops: HashSet<&[u8]> = HashSet::new();
        for &(name, path) in &arena.dicts[paths as usize].items {
            let (Value::Str(name), Some(path)) = (name, arena.sequence(path)) else { continue };
            self.visits.spend(1 + path.len() as u64)?;
            let is_named = path.len() > 1 && path.iter().all(|it| matches!(it, Value::Str(_)));
            if let (Some(&Value::Str(top)), true) = (path.first(), is_named)
                && tensors.contains(arena.bytes(name))
            {
                tops.insert(arena.bytes(top));
            }
        }
        let found = roots::KNOWN.iter().filter(|it| tops.contains(it.as_bytes()));
        let found = found.map(|it| (*it).to_owned()).collect();
        self.metadata.roots = found;
        Ok(())
    }

    fn read_tensor(&mut self, bytes: &'a [u8], name: &str, value: Value) -> Result<()> {
        if self.metadata.tensors.len() >= self.max_chunks {
            let expected = format!("at most {} tensors", self.max_chunks);
            return Err(Fault::new(expected, "more of them").over_limit("n_tensors"));
        }
        let tensor = self.object(value, "TensorStorageMetadata")?;
        let properties = self.field(tensor, "properties")?;
        let dtype = self.dtype(properties)?;
        let size = self.field(tensor, "size")?;
        let size = self.dims(size)?;
        let chunks = self.field(tensor, "chunks")?;
        let Some(chunks) = self.arena.sequence(chunks) else {
            return Err(malformed("a list of chunks", "something else"));
        };
        let first_chunk = self.metadata.chunks.len();
        for &chunk in chunks {
            if self.metadata.chunks.len() >= self.max_chunks {
                let expected = format!("at most {} chunks of tensors", self.max_chunks);
                return Err(Fault::new(expected, "more of them").over_limit("n_tensors"));
            }
            let chunk = self.object(chunk, "ChunkStorageMetadata")?;
            let at = self.field(chunk, "offsets")?;
            let at = self.dims(at)?;
            let sizes = self.field(chunk, "sizes")?;
            let sizes = self.dims(sizes)?;
            if at.len() != size.len() || sizes.len() != size.len() {
                let found = format!("a chunk of {} dimensions at {}", sizes.len(), at.len());
                return Err(malformed(&format!("chunks of {} dimensions", size.len()), &found));
            }
            self.visits.spend((bytes.len() / NAME_BYTES_PER_VISIT) as u64)?;
            let Some(place) = self.stored.remove(&(bytes, at.clone())) else {
                return Err(malformed(
                    &format!("a place for the chunk at {at:?}, and no other there"),
                    "none",
                ));
            };
            let (file, range) = self.place(place)?;
            self.metadata.chunks.push(Chunk { at, size: sizes, file, bytes: range });
        }
        let chunks = first_chunk..self.metadata.chunks.len();
        self.metadata.tensors.push(SplitTensor { name: name.to_owned(), dtype, size, chunks });
        Ok(())
    }

    /// Where the bytes of a chunk are: a file, and the range in it.
    fn place(&mut self, place: Value) -> Result<(u32, Range<u64>)> {
        let place = self.object(place, "_StorageInfo")?;
        if let Some(transforms) = self.optional(place, "transform_descriptors")?
            && self.arena.sequence(transforms).is_none_or(|it| !it.is_empty())
        {
            let hint = "load it with PyTorch and the extensions that it was saved with, and save it again";
            return Err(Fault::new(
                "chunks as they are",
                "ones that an extension changed (transform_descriptors)",
            )
            .hint(hint)
            .unsupported());
        }
        let name = self.field(place, "relative_path")?;
        let name = self.name(name)?;
        let start_byte = unsigned(self.field(place, "offset")?)?;
        let len_bytes = unsigned(self.field(place, "length")?)?;
        let Some(end_byte) = start_byte.checked_add(len_bytes) else {
            return Err(malformed("a chunk inside its file", "one that ends beyond any"));
        };
        if let Some(&file) = self.file_of.get(name) {
            return Ok((file, start_byte..end_byte));
        }
        let Ok(text) = std::str::from_utf8(name) else {
            return Err(malformed("file names in UTF-8", "other bytes"));
        };
        let file = self.metadata.files.len() as u32;
        self.metadata.files.push(text.to_owned());
        self.file_of.insert(name, file);
        Ok((file, start_byte..end_byte))
    }

    /// The dtype of a tensor's properties, whose state is a tuple that begins with it.
    fn dtype(&mut self, properties: Value) -> Result<DType> {
        let state = match properties {
            Value::Call(call) => self.arena.calls[call as usize].state,
            other => other,
        };
        let dtype = match state {
            // Properties may share one long dictionary.
            Value::Dict(dict) => self.optional(dict, "dtype")?,
            Value::Tuple(run) => self.arena.run(run).first().copied(),
            _ => None,
        };
        match dtype.map(|it| self.arena.meaning(it)) {
            Some(Meaning::DType(dtype)) => Ok(dtype),
            _ => Err(malformed("properties with a dtype", "others")),
        }
    }

    fn dims(&mut self, value: Value) -> Result<Dims> {
        let items =
            self.arena.sequence(value).ok_or_else(|| malformed("a tuple of sizes", "something else"))?;
        if items.len() > MAX_DIMS {
            let found = format!("{} dimensions", items.len());
            return Err(Fault::new(format!("at most {MAX_DIMS} dimensions"), found).unsupported());
        }
        self.visits.spend(items.len() as u64)?;
        items.iter().map(|&it| unsigned(it)).collect()
    }

    fn name(&mut self, value: Value) -> Result<&'a [u8]> {
        let Value::Str(text) = value else { return Err(malformed("a name", "something else")) };
        let name = self.arena.bytes(text);
        self.visits.spend((name.len() / NAME_BYTES_PER_VISIT) as u64)?;
        Ok(name)
    }

    /// The name of the class that an object is of.
    fn class_of(&self, value: Value) -> Option<&'a [u8]> {
        let Value::Call(call) = value else { return None };
        let Value::Symbol(class) = self.arena.calls[call as usize].function else { return None };
        let symbol = &self.arena.symbols[class as usize];
        symbol.module.starts_with(OWN_MODULES).then_some(symbol.name)
    }

    /// The attributes of an object of this class, as a dictionary.
    fn object(&mut self, value: Value, class: &str) -> Result<u32> {
        let found = self.class_of(value);
        if found != Some(class.as_bytes()) {
            let found = found.map_or_else(|| "something else".into(), String::from_utf8_lossy);
            return Err(malformed(&format!("an object `{class}`"), &shown(&found)));
        }
        let Value::Call(call) = value else { return Err(malformed("an object", "something else")) };
        match self.arena.calls[call as usize].state {
            Value::Dict(dict) => {
                // Looking for a field goes through all of them, and objects may share them.
                self.visits.spend(1 + self.arena.dicts[dict as usize].items.len() as u64)?;
                Ok(dict)
            }
            _ => Err(malformed(&format!("attributes of `{class}`"), "none")),
        }
    }

    fn optional(&mut self, object: u32, field: &str) -> Result<Option<Value>> {
        self.visits.spend(self.arena.dicts[object as usize].items.len() as u64)?;
        Ok(self.arena.get(object, field).filter(|&it| it != Value::None))
    }

    fn field(&mut self, object: u32, field: &str) -> Result<Value> {
        self.optional(object, field)?.ok_or_else(|| malformed(&format!("a field `{field}`"), "none"))
    }
}

fn malformed(expected: &str, found: &str) -> Error {
    Fault::new(format!("metadata of a distributed checkpoint with {expected}"), found).hint(HINT).corrupt()
}

/// Names of code that have no business here.
fn unknown_symbols(arena: &Arena<'_>) -> Option<Warning> {
    let strays = arena.symbols.iter();
    let is_own = |module: &[u8]| module.starts_with(OWN_MODULES) || module.starts_with(PATHS);
    let strays = strays.filter(|it| it.meaning == Meaning::Unknown && !is_own(it.module));
    let mut names: Vec<String> = strays.take(MAX_STRAYS).map(|it| shortened(&it.to_string())).collect();
    names.sort_unstable();
    names.dedup();
    (!names.is_empty()).then_some(Warning::UnknownSymbols(names))
}

/// Symbols that a warning names.
const MAX_STRAYS: usize = 50;
