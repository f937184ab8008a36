//! Opens what Accelerate offloads to disk: an `index.json` of dtypes and shapes, and the plain bytes of each tensor in a
//! file `<name>.dat`, in row-major order and the writing machine's byte order, which is little-endian.

use super::{
    OpenOptions,
    assembly::{Assembly, check_n_files},
    confine::{Folder, ShownNames, shortened, shown},
    folder::natural,
    weight_map::{Text, read_json},
};
use crate::{
    checkpoint::{Checkpoint, Format, Warning},
    dtype::DType,
    error::{Fault, Result},
    source::{FileSet, FileSource, ReadAt as _},
    tensor::{Backing, FileId, Layout, Storage, StorageId, Tensor},
};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};
use std::{borrow::Cow, collections::HashSet, fmt, path::Path};

/// The index.
pub(super) const INDEX: &str = "index.json";
/// What the names of the other files end with.
const BYTES: &str = ".dat";

/// True if a folder's files look like offloaded tensors.
pub(super) fn is_here(names: &[String]) -> bool {
    names.iter().any(|it| it == INDEX) && names.iter().any(|it| it.ends_with(BYTES))
}

/// Opens the folder, of which `names` are the files.
pub(super) fn open(path: &Path, names: &[String], options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let folder = Folder::new(path, options);
    let index = folder.open(INDEX)?;
    read(&index, &folder, names, options).map_err(|error| error.in_file(index.path()))
}

/// Opens the folder of this index, whatever else is in it.
pub(super) fn open_index(index: FileSource, options: &OpenOptions) -> Result<(Checkpoint, FileSet)> {
    let path = index.path();
    let folder = Folder::new(path.parent().unwrap_or(path), options);
    read(&index, &folder, &[], options).map_err(|error| error.in_file(path))
}

fn read(
    index: &FileSource,
    folder: &Folder<'_>,
    names: &[String],
    options: &OpenOptions,
) -> Result<(Checkpoint, FileSet)> {
    let text = read_json(index, options)?;
    let mut entries = serde_json::from_slice::<Index<'_>>(&text)
        .map_err(|error| Fault::new("an index of offloaded tensors in JSON", error.to_string()).corrupt())?
        .0;
    check_n_files(entries.len(), options)?;
    if entries.len() > options.limits.n_tensors {
        let expected = format!("at most {} tensors", options.limits.n_tensors);
        return Err(Fault::new(expected, format!("{} of them", entries.len())).over_limit("n_tensors"));
    }
    entries.sort_by(|(a, _), (b, _)| natural(a, b));
    let mut assembly = Assembly::new(Format::Offload, folder.path(), options);
    for (name, entry) in &entries {
        let opened = open_tensor(folder, name, entry);
        assembly.append(opened.map_err(|error| error.in_tensor(&shortened(name)))?)?;
    }
    let listed: HashSet<&str> = entries.iter().map(|(name, _)| &**name).collect();
    let mut strays = ShownNames::default();
    let of_names = names.iter().filter(|it| it.strip_suffix(BYTES).is_some_and(|it| !listed.contains(it)));
    of_names.for_each(|it| strays.push(it));
    if strays.len() > 0 {
        assembly
            .checkpoint
            .warnings
            .push(Warning::LeftOut(format!("files that the index does not list: {strays}")));
    }
    assembly.finish()
}

fn open_tensor(folder: &Folder<'_>, name: &str, entry: &Entry<'_>) -> Result<(Checkpoint, FileSet)> {
    if entry.safetensors_file.is_some() {
        return Err(Fault::new("offloaded bytes", "a reference to a safetensors file elsewhere")
            .hint("open the model that was offloaded")
            .unsupported());
    }
    let (Some(Text(dtype)), Some(shape)) = (&entry.dtype, &entry.shape) else {
        return Err(Fault::new("a dtype and a shape", "neither, or one of them").corrupt());
    };
    let Some(dtype) = DType::from_name(dtype).filter(|it| it.is_in_pytorch()) else {
        return Err(Fault::new("a dtype of NumPy, or bfloat16", format!("`{}`", shown(dtype))).unsupported());
    };
    let layout = Layout::contiguous(dtype, shape)?;
    let source = folder.open(&format!("{name}{BYTES}"))?;
    let len_bytes = source.len_bytes();
    // NumPy maps no empty file: without elements there is a byte that means nothing.
    if len_bytes != layout.len_bytes() && layout.n_elems() > 0 {
        let expected = format!("{} bytes, a {dtype} of shape {shape:?}", layout.len_bytes());
        return Err(Fault::new(expected, format!("{len_bytes} bytes"))
            .hint("the file and the index are from different saves, or the copy is incomplete")
            .corrupt()
            .in_file(source.path()));
    }
    let storage = Storage { file: FileId(0), start_byte: 0, len_bytes, swapped: false };
    let tensor = Tensor { name: name.to_owned(), layout, backing: Backing::Storage(StorageId(0)) };
    let stamp = source.stamp().clone();
    let one = Checkpoint {
        format: Format::Offload,
        path: stamp.path.clone(),
        files: vec![stamp],
        storages: vec![storage],
        extents: Vec::new(),
        tensors: vec![tensor],
        composites: Vec::new(),
        roots: Vec::new(),
        warnings: Vec::new(),
    };
    let mut files = FileSet::default();
    files.push(source);
    Ok((one, files))
}

/// Tensors by name, in the file's order.
struct Index<'a>(Vec<(Cow<'a, str>, Entry<'a>)>);

/// What the index says of a tensor.
#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(borrow)]
    dtype: Option<Text<'a>>,
    shape: Option<Vec<u64>>,
    /// Instead of bytes of its own: where they are.
    safetensors_file: Option<IgnoredAny>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Index<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(IndexVisitor)
    }
}

struct IndexVisitor;

impl<'de> Visitor<'de> for IndexVisitor {
    type Value = Index<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a dtype and a shape for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut index: A) -> Result<Self::Value, A::Error> {
        let (mut entries, mut seen) = (Vec::new(), HashSet::new());
        while let Some((Text(name), entry)) = index.next_entry()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format_args!("key `{}` stands twice", shown(&name))));
            }
            entries.push((name, entry));
        }
        Ok(Index(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// Opens a folder with this index and these files.
    fn opened(index: &str, files: &[(&str, usize)]) -> Result<(Checkpoint, FileSet)> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(INDEX), index).unwrap();
        for (name, len_bytes) in files {
            std::fs::write(dir.path().join(name), vec![1; *len_bytes]).unwrap();
        }
        super::super::open(dir.path(), &OpenOptions::default())
    }

    #[test]
    fn tensors_are_as_long_as_the_index_says() {
        let index = r#"{"b.w":{"dtype":"bfloat16","shape":[2,3]},"a":{"dtype":"float32","shape":[]},
            "e":{"shape":[0,4],"dtype":"int64"}}"#;
        let (checkpoint, files) = opened(index, &[("b.w.dat", 12), ("a.dat", 4), ("e.dat", 1)]).unwrap();
        let names: Vec<_> = checkpoint.tensors.iter().map(|it| it.name.as_str()).collect();
        assert_eq!((checkpoint.format, files.len(), names), (Format::Offload, 3, vec!["a", "b.w", "e"]));
        assert!(checkpoint.warnings.is_empty());
        for len_bytes in [0, 11, 13] {
            let error = opened(index, &[("b.w.dat", len_bytes), ("a.dat", 4), ("e.dat", 0)]).unwrap_err();
            assert!(
                error.to_string().contains("b.w.dat") && error.to_string().contains("12 bytes"),
                "{error}"
            );
        }
    }

    #[test]
    fn files_beside_the_index_are_named() {
        let index = r#"{"a":{"dtype":"uint8","shape":[2]}}"#;
        let (checkpoint, _) = opened(index, &[("a.dat", 2), ("b.dat", 2)]).unwrap();
        assert!(checkpoint.warnings[0].to_string().contains("b.dat"), "{:?}", checkpoint.warnings);
    }

    #[test]
    fn what_the_index_must_not_say_is_an_error() {
        let a = |fields: &str| format!(r#"{{"a":{{{fields}}}}}"#);
        for (index, what) in [
            (a(r#""dtype":"float32""#), "a dtype and a shape"),
            (a(r#""dtype":">f4","shape":[1]"#), ">f4"),
            (a(r#""dtype":"object","shape":[1]"#), "object"),
            (a(r#""dtype":"uint8","shape":[-1]"#), "-1"),
            (a(r#""dtype":"uint8","shape":[4294967296,4294967296,4294967296]"#), "2^63"),
            (a(r#""dtype":"uint8","dtype":"uint8","shape":[1]"#), "duplicate"),
            (a(r#""safetensors_file":"/etc/passwd","weight_name":"a""#), "elsewhere"),
            (
                r#"{"a":{"dtype":"uint8","shape":[4]},"a":{"dtype":"uint8","shape":[4]}}"#.into(),
                "stands twice",
            ),
            (r#"{"../a":{"dtype":"uint8","shape":[4]}}"#.into(), "own folder"),
            (r#"{"b":{"dtype":"uint8","shape":[4]}}"#.into(), "none of that name"),
            ("[]".into(), "JSON"),
        ] {
            let error = opened(&index, &[("a.dat", 4)]).unwrap_err();
            assert!(error.to_string().contains(what), "{index}: {error}");
            assert!(matches!(error, Error::Corrupt(_) | Error::Unsupported(_)));
        }
    }
}
