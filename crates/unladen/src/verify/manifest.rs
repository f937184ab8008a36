//! Manifests: what the tensors of a checkpoint are, written beside it so that any copy, in any format, can be checked.
//!
//! A manifest is JSON in UTF-8, sorted by name, a tensor a line, so that the manifest of a conversion is the same file:
//!
//! ```json
//! {"unladen_manifest":2,"tensors":[
//! {"name":"s.indices","dtype":"int64","shape":[2,5],"blake3":"6e34…"},
//! {"name":"s.values","dtype":"float32","shape":[5],"blake3":"91b0…"}
//! ],"composites":[
//! {"name":"s","kind":"sparse","what":"sparse_coo","shape":[8,8],"parts":["s.indices","s.values"]}
//! ]}
//! ```
//!
//! `unladen_manifest` is the version of this format. `dtype` is PyTorch's name, `blake3` the hash, in hexadecimal, of the
//! row-major little-endian bytes of the values (views resolved), or `null` for a tensor without data. `composites` are
//! sparse, nested and quantised tensors and those of classes of their own, as [`Made`] says; version 1 does not have them,
//! so that it says nothing of scales and zero points, or of sparse tensors' sizes. Other fields are left alone.

use super::{
    check::{Finding, Kind},
    made::{self, Made},
    tree_hash::Node,
};
use crate::{
    dtype::DType,
    error::{Error, Fault, Result},
    save,
    source::FileSource,
    stamp::FileStamp,
};
use serde::{Deserialize, Deserializer, Serialize};
use std::{cmp::Ordering, collections::HashSet, fmt, io::BufReader, path::Path};

/// The version that is written.
const VERSION: u64 = 2;
/// It is read, too: it knows nothing of composites.
const VERSION_WITHOUT_COMPOSITES: u64 = 1;
/// The longest manifest that is read: of some five million tensors.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// What is known of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// Its full path.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// The hash of its row-major little-endian bytes; `None`: it has no data.
    pub blake3: Option<[u8; 32]>,
}

/// What is known of every tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Sorted by name, each name once.
    tensors: Vec<Fingerprint>,
    /// Sorted. `None`: nothing is known of them.
    composites: Option<Vec<Made>>,
}

#[derive(Deserialize)]
struct Wire {
    unladen_manifest: u64,
    tensors: Vec<WireTensor>,
    composites: Option<Vec<Made>>,
}

#[derive(Deserialize, Serialize)]
struct WireTensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    // Without this, a field that is missing would be a tensor without data.
    #[serde(deserialize_with = "present")]
    blake3: Option<String>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::deserialize(deserializer)
}

impl Manifest {
    /// Sorts what is known of plain tensors.
    ///
    /// Fails with [`Error::Corrupt`] if a name stands twice.
    pub fn new(mut tensors: Vec<Fingerprint>) -> Result<Manifest> {
        tensors.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        match tensors.windows(2).find(|it| it[0].name == it[1].name) {
            None => Ok(Manifest { tensors, composites: Some(Vec::new()) }),
            Some(twice) => Err(Fault::new("each tensor once", "two of one name")
                .tensor(&twice[0].name)
                .hint("write the manifest again with `unladen verify --write-manifest`")
                .corrupt()),
        }
    }

    /// Adds what is made of some of the tensors.
    pub fn with_composites(self, mut composites: Vec<Made>) -> Manifest {
        composites.sort_unstable();
        Manifest { composites: Some(composites), ..self }
    }

    /// The tensors, sorted by name.
    pub fn tensors(&self) -> &[Fingerprint] {
        &self.tensors
    }

    /// What is made of some of them, sorted by name. `None`: the manifest is of version 1, which does not say.
    pub fn composites(&self) -> Option<&[Made]> {
        self.composites.as_deref()
    }

    /// About what it holds in memory.
    pub fn len_bytes(&self) -> u64 {
        let each = |it: &Fingerprint| size_of::<Fingerprint>() + it.name.len() + 8 * it.shape.len() + 64;
        let composites = self.composites.iter().flatten().map(Made::len_bytes);
        self.tensors.iter().map(|it| each(it) as u64).chain(composites).sum()
    }

    /// Reads a manifest.
    ///
    /// Fails with [`Error::Corrupt`] if it is none or broken, with [`Error::Unsupported`] for another version or a
    /// type that is not known.
    pub fn read(path: &Path) -> Result<Manifest> {
        Manifest::read_file(path).map_err(|error| error.in_file(path))
    }

    fn read_file(path: &Path) -> Result<Manifest> {
        let file = FileSource::open(path)?;
        let len_bytes = file.stamp().len_bytes;
        if len_bytes > MAX_MANIFEST_BYTES {
            let expected = format!("a manifest of at most {MAX_MANIFEST_BYTES} bytes");
            return Err(Fault::new(expected, format!("{len_bytes} bytes")).unsupported());
        }
        let wire: Wire = serde_json::from_reader(BufReader::new(file.file())).map_err(|error| {
            if error.is_io() {
                return Error::io(path, "read the manifest", error.into());
            }
            Fault::new("a manifest as `unladen verify --write-manifest` writes it", error.to_string())
                .hint("name a manifest after --manifest, and the checkpoint before it")
                .corrupt()
        })?;
        if ![VERSION, VERSION_WITHOUT_COMPOSITES].contains(&wire.unladen_manifest) {
            let found = format!("version {}", wire.unladen_manifest);
            let expected = format!("a manifest of version {VERSION_WITHOUT_COMPOSITES} or {VERSION}");
            return Err(Fault::new(expected, found)
                .hint("it was written by another version of unladen; write it again")
                .unsupported());
        }
        let manifest =
            Manifest::new(wire.tensors.into_iter().map(WireTensor::checked).collect::<Result<_>>()?)?;
        match wire.composites {
            _ if wire.unladen_manifest == VERSION_WITHOUT_COMPOSITES => {
                Ok(Manifest { composites: None, ..manifest })
            }
            Some(composites) => Ok(manifest.with_composites(composites)),
            None => Err(Fault::new("a list of composites", "none")
                .hint("write the manifest again with `unladen verify --write-manifest`")
                .corrupt()),
        }
    }

    /// Fails if [`Manifest::write`] would because of what is there: better told before hashing than after.
    pub fn check_output(path: &Path, overwrite: bool, inputs: &[FileStamp]) -> Result<()> {
        save::check_file(path, overwrite, inputs)
    }

    /// Writes the manifest, whole or not at all. `inputs` are files that are never replaced.
    ///
    /// Fails with [`Error::Io`] if something of that name is there, unless it may be overwritten.
    pub fn write(&self, path: &Path, overwrite: bool, inputs: &[FileStamp]) -> Result<()> {
        save::write_file(path, overwrite, inputs, |sink| {
            // What is not known is not written either.
            let version = if self.composites.is_some() { VERSION } else { VERSION_WITHOUT_COMPOSITES };
            sink(format!("{{\"unladen_manifest\":{version},\"tensors\":[").as_bytes())?;
            for (index, tensor) in self.tensors.iter().enumerate() {
                let wire = WireTensor {
                    name: tensor.name.clone(),
                    dtype: tensor.dtype.name().to_owned(),
                    shape: tensor.shape.clone(),
                    blake3: tensor.blake3.map(|it| Hex(&it).to_string()),
                };
                sink(line(index, &wire, path)?.as_bytes())?;
            }
            if let Some(composites) = &self.composites {
                sink(b"\n],\"composites\":[")?;
                for (index, made) in composites.iter().enumerate() {
                    sink(line(index, made, path)?.as_bytes())?;
                }
            }
            sink(b"\n]}\n")
        })
    }

    /// Every way in which `found`, the tensors of the file at `path`, are not these. Tensors in `skipped` could not be
    /// read, which was said already.
    pub(super) fn differences(&self, found: &Manifest, path: &Path, skipped: &HashSet<&str>) -> Vec<Finding> {
        let finding = |kind, name: &str, expected: String, found: String| Finding {
            kind,
            path: path.to_owned(),
            record: None,
            tensors: vec![name.to_owned()],
            expected,
            found,
        };
        let (mut wanted, mut there) = (self.tensors.iter().peekable(), found.tensors.iter().peekable());
        let mut findings = Vec::new();
        loop {
            let order = match (wanted.peek(), there.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(wanted), Some(there)) => wanted.name.cmp(&there.name),
            };
            let one = if order.is_le() { wanted.next() } else { None };
            let other = if order.is_ge() { there.next() } else { None };
            match (one, other) {
                (Some(one), None) => {
                    findings.push(finding(Kind::Missing, &one.name, one.describe(), "no such tensor".into()));
                }
                (None, Some(other)) => {
                    let found = other.describe();
                    findings.push(finding(Kind::Extra, &other.name, "no such tensor".into(), found));
                }
                (Some(one), Some(other)) => {
                    let mut differs = |kind, expected, found| {
                        findings.push(finding(kind, &one.name, expected, found));
                    };
                    if one.dtype != other.dtype {
                        differs(Kind::DType, one.dtype.to_string(), other.dtype.to_string());
                    }
                    if one.shape != other.shape {
                        differs(Kind::Shape, format!("{:?}", one.shape), format!("{:?}", other.shape));
                    }
                    let is_like = one.dtype == other.dtype && one.shape == other.shape;
                    if is_like && one.blake3 != other.blake3 && !skipped.contains(&*one.name) {
                        differs(Kind::Bytes, one.describe_bytes(), other.describe_bytes());
                    }
                }
                (None, None) => {}
            }
        }
        let (Some(wanted), Some(there)) = (&self.composites, &found.composites) else { return findings };
        let has_tensor = |side: usize, name: &str| {
            let tensors = if side == 0 { &self.tensors } else { &found.tensors };
            tensors.binary_search_by(|it| it.name.as_str().cmp(name)).is_ok()
        };
        for made in made::differences([wanted, there], has_tensor) {
            let [expected, found] =
                made.map(|it| it.map_or_else(|| "plain tensors".to_owned(), |it| it.to_string()));
            let name = made.iter().flatten().next().map_or("", |it| &it.name);
            findings.push(finding(Kind::Composite, name, expected, found));
        }
        findings
    }
}

impl Fingerprint {
    fn describe(&self) -> String {
        format!("{} {:?}", self.dtype, self.shape)
    }

    fn describe_bytes(&self) -> String {
        self.blake3.as_ref().map_or("no data".to_owned(), |it| format!("bytes with BLAKE3 {}", Hex(it)))
    }
}

impl WireTensor {
    fn checked(self) -> Result<Fingerprint> {
        let tensor = |fault: Fault| fault.tensor(&self.name);
        let dtype = DType::from_name(&self.dtype).ok_or_else(|| {
            let found = format!("`{}`", self.dtype.escape_debug());
            tensor(Fault::new("a type of PyTorch's", found)).unsupported()
        })?;
        let blake3 = match &self.blake3 {
            None => None,
            Some(text) => Some(from_hex(text).ok_or_else(|| {
                let found = format!("`{}`", text.escape_debug());
                tensor(Fault::new("64 hexadecimal digits", found)).corrupt()
            })?),
        };
        Ok(Fingerprint { name: self.name, dtype, shape: self.shape, blake3 })
    }
}

/// An item of a list, on a line of its own.
fn line(index: usize, item: &impl Serialize, path: &Path) -> Result<String> {
    let json =
        serde_json::to_string(item).map_err(|error| Error::io(path, "write the manifest", error.into()))?;
    Ok(format!("{}\n{json}", if index == 0 { "" } else { "," }))
}

struct Hex<'a>(&'a Node);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn from_hex(text: &str) -> Option<Node> {
    let mut node = Node::default();
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != node.len() || !rest.is_empty() {
        return None;
    }
    for (byte, pair) in node.iter_mut().zip(pairs) {
        let [high, low] = pair.map(|it| char::from(it).to_digit(16).filter(|_| !it.is_ascii_uppercase()));
        *byte = (high? << 4 | low?) as u8;
    }
    Some(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tensor(name: &str, shape: &[u64], hash: Option<u8>) -> Fingerprint {
        Fingerprint {
            name: name.into(),
            dtype: DType::F32,
            shape: shape.to_vec(),
            blake3: hash.map(|it| [it; 32]),
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_does_not_depend_on_the_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.json");
        let odd = "a\n\"é\u{0}\u{7f}";
        let tensors =
            vec![tensor("b", &[], Some(7)), tensor(odd, &[2, 0, 3], Some(0xab)), tensor("m", &[9], None)];
        let manifest = Manifest::new(tensors.clone()).unwrap();
        manifest.write(&path, false, &[]).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), manifest);
        let mut backwards = tensors;
        backwards.reverse();
        let other = folder.path().join("other.json");
        Manifest::new(backwards).unwrap().write(&other, false, &[]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), fs::read(&other).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 6, "a tensor a line");

        let error = manifest.write(&path, false, &[]).unwrap_err();
        assert!(error.hint().contains("--force"), "{error}");
        manifest.write(&path, true, &[]).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file stays");
    }

    #[test]
    fn a_manifest_that_is_none_or_lies_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.json");
        let good = r#"{"unladen_manifest":1,"tensors":[{"name":"w","dtype":"float32","shape":[2],"blake3":null,"more":1}]}"#;
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            Manifest::read(&path)
        };
        assert_eq!(read(good).unwrap().tensors(), [tensor("w", &[2], None)]);
        for (from, to, expected) in [
            ("manifest\":1", "manifest\":3", "version 3"),
            ("manifest\":1", "manifest\":2", "composites"),
            ("float32", "float33", "float33"),
            ("null", "\"abc\"", "hexadecimal"),
            (",\"blake3\":null", "", "blake3"),
            ("[2]", "[-2]", "integer"),
            ("}]}", "}", "EOF"),
            ("}]}", "}]} more", "trailing"),
            ("[{", r#"[{"name":"w","dtype":"bool","shape":[],"blake3":null},{"#, "two of one name"),
        ] {
            let error = read(&good.replace(from, to)).unwrap_err();
            assert!(error.to_string().contains(expected) && error.to_string().contains("m.json"), "{error}");
        }
        assert!(from_hex(&"AB".repeat(32)).is_none() && from_hex(&"+1".repeat(32)).is_none());
    }

    #[test]
    fn what_is_missing_extra_or_different_is_told_tensor_by_tensor() {
        let wanted = vec![
            tensor("bytes", &[2], Some(1)),
            tensor("gone", &[2], Some(1)),
            tensor("same", &[2], Some(1)),
            tensor("shape", &[2, 3], Some(1)),
            tensor("skipped", &[2], Some(1)),
            tensor("type", &[2], Some(1)),
        ];
        let mut found = wanted.clone();
        found[0].blake3 = Some([2; 32]);
        found[1].name = "new".into();
        found[3].shape = vec![3, 2];
        found[4].blake3 = None;
        found[5].dtype = DType::F16;
        let [wanted, found] = [wanted, found].map(|it| Manifest::new(it).unwrap());
        let differences = wanted.differences(&found, Path::new("a.pth"), &HashSet::from(["skipped"]));
        let told: Vec<_> = differences.iter().map(|it| (it.kind, &*it.tensors[0])).collect();
        let expected = [
            (Kind::Bytes, "bytes"),
            (Kind::Missing, "gone"),
            (Kind::Extra, "new"),
            (Kind::Shape, "shape"),
            (Kind::DType, "type"),
        ];
        assert_eq!(told, expected);
        assert!(differences[0].found.ends_with(&"02".repeat(32)), "{}", differences[0].found);
    }
}
