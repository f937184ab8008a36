//! Distributed checkpoints, composed by hand.

use super::{load, load_opened, refused, refused_with, warnings, write::*};
use std::{fs, ops::Range, os::unix::fs::symlink, path::Path};
use tempfile::TempDir;
use unladen::{
    DType, Format, Limits, OpenOptions, Progress,
    checkpoint::Root,
    format::{TreeStyle, tree},
    open, open_with,
    verify::{self, Check, Kind},
};

const MODULE: &str = "torch.distributed.checkpoint.metadata";

/// Where a chunk lies, in its tensor and in the files.
#[derive(Clone, Debug)]
struct Chunk {
    at: Vec<u64>,
    size: Vec<u64>,
    file: String,
    start_byte: u64,
    len_bytes: u64,
}

#[derive(Clone, Debug)]
struct Tensor {
    name: &'static str,
    dtype: &'static str,
    size: Vec<u64>,
    chunks: Vec<Chunk>,
}

/// A checkpoint before it is written.
#[derive(Clone, Debug, Default)]
struct Save {
    tensors: Vec<Tensor>,
    files: Vec<(String, Vec<u8>)>,
    /// What is no tensor: its name, its file, and the bytes there.
    objects: Vec<(&'static str, String, Range<u64>)>,
    /// The keys that a name was made of.
    paths: Vec<(&'static str, Vec<&'static str>)>,
    /// Extensions that the chunks went through.
    transforms: Vec<&'static str>,
}

/// The value of an element of a tensor of this width.
fn value(tensor: usize, width: u64, row: u64, column: u64) -> f32 {
    (1000 * tensor) as f32 + (row * width + column) as f32
}

impl Save {
    /// Adds a matrix in chunks: file, first row and column, rows and columns. Every second one is stored transposed.
    fn matrix(&mut self, name: &'static str, size: [u64; 2], chunks: &[(&str, [u64; 2], [u64; 2])]) {
        let number = self.tensors.len();
        let chunks = chunks.iter().enumerate().map(|(index, (file, at, size_of_chunk))| {
            let [rows, columns] = *size_of_chunk;
            let is_transposed = index % 2 == 1;
            let elements: Vec<(u64, u64)> = if is_transposed {
                (0..columns).flat_map(|column| (0..rows).map(move |row| (row, column))).collect()
            } else {
                (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).collect()
            };
            let bytes: Vec<u8> = elements
                .iter()
                .flat_map(|(row, column)| value(number, size[1], at[0] + row, at[1] + column).to_le_bytes())
                .collect();
            let stride = if is_transposed { [1, rows] } else { [columns, 1] };
            let archive = archive(size_of_chunk, &stride, &bytes);
            let (start_byte, len_bytes) = self.store(file, archive);
            Chunk {
                at: at.to_vec(),
                size: size_of_chunk.to_vec(),
                file: (*file).to_owned(),
                start_byte,
                len_bytes,
            }
        });
        let chunks = chunks.collect();
        self.tensors.push(Tensor { name, dtype: "float32", size: size.to_vec(), chunks });
    }

    /// Adds a tensor of one chunk, as it is.
    fn whole(&mut self, name: &'static str, size: &[u64], bytes: &[u8]) {
        let stride: Vec<u64> = (1..=size.len()).map(|dim| size[dim..].iter().product()).collect();
        let (start_byte, len_bytes) = self.store("__0_0.distcp", archive(size, &stride, bytes));
        let at = vec![0; size.len()];
        let chunk = Chunk { at, size: size.to_vec(), file: "__0_0.distcp".into(), start_byte, len_bytes };
        self.tensors.push(Tensor { name, dtype: "float32", size: size.to_vec(), chunks: vec![chunk] });
    }

    /// Adds what is no tensor.
    fn object(&mut self, name: &'static str, file: &str, value: &Py) {
        let (start_byte, len_bytes) = self.store(file, archive_of(value, None));
        self.objects.push((name, file.to_owned(), start_byte..start_byte + len_bytes));
    }

    fn store(&mut self, file: &str, archive: Vec<u8>) -> (u64, u64) {
        let position = self.files.iter().position(|(name, _)| name == file).unwrap_or_else(|| {
            self.files.push((file.to_owned(), Vec::new()));
            self.files.len() - 1
        });
        let bytes = &mut self.files[position].1;
        let start_byte = bytes.len() as u64;
        bytes.extend(&archive);
        (start_byte, archive.len() as u64)
    }

    fn metadata(&self) -> Py {
        let (mut listed, mut stored) = (Vec::new(), Vec::new());
        for tensor in &self.tensors {
            let properties = Py::Object(
                Box::new(Py::Global(MODULE, "TensorProperties")),
                Box::new(Py::Tuple(vec![Py::Global("torch", tensor.dtype), Py::None, Py::Int(0)])),
            );
            let chunks = tensor.chunks.iter().map(|chunk| {
                let fields = vec![("offsets", size(&chunk.at)), ("sizes", size(&chunk.size))];
                object(MODULE, "ChunkStorageMetadata", fields)
            });
            let fields = vec![
                ("properties", properties),
                ("size", size(&tensor.size)),
                ("chunks", Py::List(chunks.collect())),
            ];
            listed.push((text(tensor.name), object(MODULE, "TensorStorageMetadata", fields)));
            for (index, chunk) in tensor.chunks.iter().enumerate() {
                let key = vec![
                    ("fqn", text(tensor.name)),
                    ("index", Py::Int(index as i64)),
                    ("offset", size(&chunk.at)),
                ];
                let mut place = vec![
                    ("relative_path", text(&chunk.file)),
                    ("offset", Py::Int(chunk.start_byte as i64)),
                    ("length", Py::Int(chunk.len_bytes as i64)),
                ];
                if !self.transforms.is_empty() {
                    let transforms = self.transforms.iter().map(|it| text(it)).collect();
                    place.push(("transform_descriptors", Py::List(transforms)));
                }
                let place = object("torch.distributed.checkpoint.filesystem", "_StorageInfo", place);
                stored.push((object(MODULE, "MetadataIndex", key), place));
            }
        }
        for (name, file, bytes) in &self.objects {
            let class = Py::Global(MODULE, "BytesStorageMetadata");
            listed.push((text(name), Py::Object(Box::new(class), Box::new(Py::None))));
            let place = vec![
                ("relative_path", text(file)),
                ("offset", Py::Int(bytes.start as i64)),
                ("length", Py::Int((bytes.end - bytes.start) as i64)),
            ];
            let place = object("torch.distributed.checkpoint.filesystem", "_StorageInfo", place);
            stored.push((object(MODULE, "MetadataIndex", vec![("fqn", text(name))]), place));
        }
        let keys = |keys: &[&str]| Py::Tuple(keys.iter().map(|it| text(it)).collect());
        let paths: Vec<_> = self.paths.iter().map(|(name, path)| (text(name), keys(path))).collect();
        let fields = vec![
            ("state_dict_metadata", Py::Dict(listed)),
            ("planner_data", if paths.is_empty() { Py::None } else { Py::Dict(paths) }),
            ("storage_data", Py::Dict(stored)),
            ("version", text("1.0.0")),
        ];
        object(MODULE, "Metadata", fields)
    }

    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".metadata"), pickle(&self.metadata())).unwrap();
        for (name, bytes) in &self.files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }
}

/// A matrix in rows over two ranks, one in a grid, one whole, a scalar, and one without elements.
fn good() -> Save {
    let mut save = Save::default();
    let [one, two] = ["__0_0.distcp", "__1_0.distcp"];
    save.matrix("rows", [5, 4], &[(one, [0, 0], [3, 4]), (two, [3, 0], [2, 4])]);
    let grid = [(one, [0, 0], [2, 3]), (two, [0, 3], [2, 4]), (two, [2, 0], [4, 3]), (one, [2, 3], [4, 4])];
    save.matrix("grid", [6, 7], &grid);
    save.whole("whole", &[2, 3], &counting(1, 24));
    save.whole("scalar", &[], &counting(50, 4));
    save.whole("empty", &[0, 3], &[]);
    save.object("optimizer.param_groups", two, &Py::List(vec![text("lr"), Py::None]));
    save.object("step", "__2_0.distcp", &Py::Int(7));
    save
}

fn matrix(number: usize, rows: u64, columns: u64) -> (DType, Vec<u64>, Vec<u8>) {
    let elements = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
    let bytes = elements.flat_map(|(row, column)| value(number, columns, row, column).to_le_bytes());
    (DType::F32, vec![rows, columns], bytes.collect())
}

#[test]
fn chunks_of_several_ranks_make_whole_tensors_by_every_strategy() {
    let dir = good().write();
    let loaded = load(dir.path());
    assert_eq!(
        loaded.keys().map(String::as_str).collect::<Vec<_>>(),
        ["empty", "grid", "rows", "scalar", "whole"]
    );
    assert_eq!(loaded["rows"], matrix(0, 5, 4));
    assert_eq!(loaded["grid"], matrix(1, 6, 7));
    assert_eq!(loaded["whole"], (DType::F32, vec![2, 3], counting(1, 24)));
    assert_eq!(loaded["scalar"], (DType::F32, vec![], counting(50, 4)));
    assert_eq!(load(&dir.path().join(".metadata")), loaded);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!((checkpoint.format, checkpoint.files().len()), (Format::Dcp, 3));
    assert_eq!(checkpoint.path, dir.path());
    let warnings = warnings(&checkpoint);
    assert!(warnings.contains("`optimizer.param_groups`, `step`"), "{warnings}");
    // The classes of the metadata are known; names of others are not.
    assert_eq!(checkpoint.warnings.iter().filter(|it| it.to_string().contains("names code")).count(), 0);
}

fn tree_of(path: &Path, style: TreeStyle) -> String {
    let mut shown = String::new();
    tree(path, &OpenOptions::default(), style, &mut |piece| {
        shown.push_str(piece);
        Ok(())
    })
    .unwrap();
    shown
}

#[test]
fn what_is_no_tensor_stands_in_the_tree_and_its_records_are_verified() {
    let dir = good().write();
    let text = tree_of(dir.path(), TreeStyle::default());
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[1], "  'rows': tensor float32 [5, 4] `rows`");
    assert_eq!(lines[6..], ["  'optimizer.param_groups': ['lr', None]", "  'step': 7", "}"]);
    let json = tree_of(dir.path(), TreeStyle { json: true, full: false });
    assert!(json.ends_with("\"optimizer.param_groups\":[\"lr\",null],\"step\":7}\n"), "{json}");

    // 5 chunks of three records and a tensor without elements; two values of two records.
    let file = dir.path().join("__2_0.distcp");
    let mut bytes = fs::read(&file).unwrap();
    let findings = |n_compared: u64| {
        let checkpoint = open(dir.path()).unwrap();
        let check =
            Check { host_budget_bytes: 64 << 20, limits: Limits::default(), hashes: false, manifest: None };
        let checked = verify::check(&checkpoint, checkpoint.files(), &check, &Progress::default()).unwrap();
        assert_eq!(checked.n_compared, n_compared);
        checked.findings
    };
    let n_chunks = 2 + 4 + 3;
    assert_eq!(findings(3 * n_chunks + 2 * 2), []);
    let place = bytes.windows(2).position(|it| it == b"K\x07" || it == b"\x07\0").unwrap();
    bytes[place + 1] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let findings = findings(3 * n_chunks + 2 * 2);
    let [finding] = &findings[..] else { panic!("{findings:?}") };
    assert_eq!((finding.kind, &finding.path, &finding.tensors[..]), (Kind::Checksum, &file, &[][..]));
}

#[test]
fn a_path_leads_to_tensors_to_values_and_into_them() {
    let dir = good().write();
    let at = |path: &str| {
        let options = OpenOptions { root: Some(Root::At(path.to_owned())), ..OpenOptions::default() };
        let mut shown = String::new();
        tree(dir.path(), &options, TreeStyle::default(), &mut |piece| {
            shown.push_str(piece);
            Ok(())
        })
        .map(|()| shown)
    };
    assert_eq!(at("rows").unwrap(), "tensor float32 [5, 4] `rows`\n");
    assert_eq!(at("step").unwrap(), "7\n");
    assert_eq!(at("optimizer").unwrap(), "{\n  'optimizer.param_groups': ['lr', None]\n}\n");
    assert_eq!(at("optimizer.param_groups.0").unwrap(), "'lr'\n");
    for (path, found) in [
        ("nope", "`step` at the top"),
        ("optimizer.nope", "`param_groups` below `optimizer`"),
        ("optimizer.param_groups.2", "`0`, `1` at the top"),
    ] {
        let error = at(path).unwrap_err();
        assert_eq!(error.kind(), "Mismatch");
        assert!(error.to_string().contains(found), "{error}");
    }
}

#[test]
fn a_value_that_is_no_tensor_stands_where_nothing_else_does() {
    refuses(|save| save.objects[0].2.start -= 1, "chunks share no bytes");
    refuses(|save| save.objects[1].2.end += 1, "`step`");
    refuses(|save| save.objects[1].1 = "../x".to_owned(), "own folder");
    refuses(|save| save.objects[1].1 = "missing".to_owned(), "none of that name");
    refuses(
        |save| {
            let first = save.objects[1].clone();
            save.objects.push(("again", first.1, first.2));
        },
        "chunks share no bytes",
    );
}

#[test]
fn the_state_dict_inside_is_found_by_the_keys_that_names_were_made_of() {
    let mut save = Save::default();
    for name in ["model.a.w", "ema.w", "model.b"] {
        save.whole(name, &[1], &counting(1, 4));
    }
    // Two keys of one name each, as the names alone would not tell.
    save.paths = vec![
        ("model.a.w", vec!["model", "a.w"]),
        ("ema.w", vec!["ema", "w"]),
        ("model.b", vec!["model.b"]),
        ("step", vec!["module", "step"]),
    ];
    let dir = save.write();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.roots, ["model", "ema"]);
    let options = OpenOptions { root: Some(Root::Auto), ..OpenOptions::default() };
    let part = open_with(dir.path(), &options).unwrap();
    let names: Vec<&str> = part.tensors.iter().map(|it| &*it.name).collect();
    assert_eq!(names, ["a.w", "b"]);
    assert!(warnings(&part).contains("not below `model`; meant may be `ema`"), "{}", warnings(&part));
    save.paths.clear();
    assert_eq!(open(save.write().path()).unwrap().roots, [""; 0]);
}

#[test]
fn chunks_that_no_metadata_name_are_told() {
    let dir = good().write();
    fs::copy(dir.path().join("__1_0.distcp"), dir.path().join("__7_0.distcp")).unwrap();
    let told = warnings(&open(dir.path()).unwrap());
    assert!(told.contains("files that `.metadata` does not name: `__7_0.distcp`"), "{told}");
    fs::remove_file(dir.path().join(".metadata")).unwrap();
    let error = refused(dir.path());
    assert!(error.contains("without the `.metadata`"), "{error}");
    // By itself such a file is two archives or more.
    let error = refused(&dir.path().join("__1_0.distcp"));
    assert!(error.contains("another one behind the first"), "{error}");
}

/// Applies a change to a good checkpoint, which must be refused with these words.
#[track_caller]
fn refuses(change: impl FnOnce(&mut Save), what: &str) {
    let mut save = good();
    change(&mut save);
    let error = refused(save.write().path());
    assert!(error.contains(what), "{error}");
}

#[test]
fn chunks_with_a_hole_an_overlap_or_outside_their_tensor_are_refused() {
    refuses(|save| drop(save.tensors[0].chunks.pop()), "1 extents with 12 elements");
    refuses(|save| save.tensors[0].chunks[1].at = vec![2, 0], "extents");
    refuses(|save| save.tensors[0].chunks[1].at = vec![4, 0], "inside the tensor");
    refuses(|save| save.tensors[0].chunks[1].at = vec![1 << 40, 0], "inside the tensor");
    refuses(|save| save.tensors[0].chunks[1].at = vec![0, 0], "one place for each chunk");
    refuses(|save| save.tensors[0].size = vec![6, 4], "24 elements once");
    refuses(|save| save.tensors[0].size = vec![1 << 62, 4], "2^63");
    refuses(|save| save.tensors[0].size = vec![20], "chunks of 1 dimensions");
}

#[test]
fn chunks_that_are_not_what_the_metadata_say_are_refused() {
    refuses(|save| save.tensors[0].dtype = "bfloat16", "bfloat16");
    refuses(|save| save.tensors[0].dtype = "no_dtype", "properties with a dtype");
    refuses(|save| save.tensors[0].chunks[0].size = vec![4, 3], "as the metadata say");
    refuses(|save| save.transforms = vec!["zstd"], "transform_descriptors");
    // Four bytes that stand for a terabyte.
    let expanded = |save: &mut Save| {
        let (start_byte, len_bytes) = save.store("__0_0.distcp", archive(&[1 << 38], &[0], &[0; 4]));
        let chunk =
            Chunk { at: vec![0], size: vec![1 << 38], file: "__0_0.distcp".into(), start_byte, len_bytes };
        save.tensors.push(Tensor {
            name: "vast",
            dtype: "float32",
            size: vec![1 << 38],
            chunks: vec![chunk],
        });
    };
    refuses(expanded, "stored bytes");
    refuses(|save| save.tensors[1].name = "rows", "`rows` twice");
}

#[test]
fn ranges_outside_a_file_inside_each_other_or_of_no_archive_are_refused() {
    let in_rows = |change: fn(&mut Chunk)| move |save: &mut Save| change(&mut save.tensors[0].chunks[0]);
    refuses(in_rows(|it| it.start_byte = 1 << 40), "at least");
    refuses(in_rows(|it| it.len_bytes = 1 << 62), "at least");
    refuses(in_rows(|it| it.len_bytes -= 1), "`rows`");
    refuses(in_rows(|it| it.start_byte += 1), "`rows`");
    refuses(in_rows(|it| it.len_bytes = 0), "an empty file");
    refuses(|save| save.tensors[0].chunks[0].start_byte = u64::MAX, "from 0 to 2^63");
    let twice = |save: &mut Save| {
        let first = save.tensors[0].chunks[0].clone();
        save.tensors.push(Tensor {
            name: "again",
            size: vec![3, 4],
            chunks: vec![first],
            ..save.tensors[0].clone()
        });
    };
    refuses(twice, "chunks share no bytes");
}

#[test]
fn files_outside_the_folder_are_refused() {
    for name in ["../x", "../../etc/passwd", "/etc/passwd", "a/b", "", ".."] {
        refuses(|save| save.tensors[0].chunks[0].file = name.to_owned(), "own folder");
    }
    refuses(|save| save.tensors[0].chunks[0].file = "missing".to_owned(), "none of that name");
    refuses(|save| save.tensors[0].chunks[0].file = ".metadata".to_owned(), "rows");
    let dir = good().write();
    let (file, outside) = (dir.path().join("__0_0.distcp"), tempfile::tempdir().unwrap());
    fs::rename(&file, outside.path().join("x")).unwrap();
    symlink(outside.path().join("x"), &file).unwrap();
    assert!(refused(dir.path()).contains("a link to"));
    let options = OpenOptions { follow_links: true, ..OpenOptions::default() };
    assert_eq!(load_opened(&open_with(dir.path(), &options).unwrap()).len(), 5);
}

#[test]
fn metadata_of_another_shape_are_refused() {
    for value in [
        Py::None,
        Py::Dict(vec![]),
        object(MODULE, "Metadata", vec![]),
        object(
            MODULE,
            "Metadata",
            vec![("state_dict_metadata", Py::Dict(vec![])), ("storage_data", Py::None)],
        ),
        object("evil", "Metadata", vec![("state_dict_metadata", Py::Dict(vec![]))]),
        object(
            MODULE,
            "Metadata",
            vec![("state_dict_metadata", Py::List(vec![])), ("storage_data", Py::Dict(vec![]))],
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".metadata"), pickle(&value)).unwrap();
        assert!(refused(dir.path()).contains(".metadata"), "{value:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    for bytes in [&b""[..], b"\x80\x04", b"PK\x03\x04", b"{}"] {
        fs::write(dir.path().join(".metadata"), bytes).unwrap();
        assert!(refused(dir.path()).contains(".metadata"));
    }
}

#[test]
fn code_that_metadata_name_is_reported_and_not_run() {
    let save = good();
    let Py::Object(class, state) = save.metadata() else { panic!("an object") };
    let Py::Dict(mut fields) = *state else { panic!("fields") };
    fields[1].1 = Py::Call(Box::new(Py::Global("os", "system")), vec![text("true")]);
    let dir = save.write();
    fs::write(dir.path().join(".metadata"), pickle(&Py::Object(class, Box::new(Py::Dict(fields))))).unwrap();
    assert!(warnings(&open(dir.path()).unwrap()).contains("os.system"));
}

#[test]
fn limits_hold_for_chunks_and_files() {
    let dir = good().write();
    let limits = |change: fn(&mut Limits)| {
        let mut options = OpenOptions::default();
        change(&mut options.limits);
        options
    };
    assert!(refused_with(dir.path(), &limits(|it| it.n_files = 1)).contains("at most 1 files"));
    assert!(refused_with(dir.path(), &limits(|it| it.n_tensors = 4)).contains("at most 4 chunks"));
    assert!(refused_with(dir.path(), &limits(|it| it.pickle_bytes = 100)).contains("at most 100 bytes"));
}

#[test]
fn thousands_of_chunks_open_and_load() {
    let mut save = Save::default();
    let chunks: Vec<(String, [u64; 2], [u64; 2])> =
        (0..2500).map(|it| (format!("__{}_0.distcp", it % 5), [it / 50 * 2, it % 50 * 3], [2, 3])).collect();
    let chunks: Vec<_> = chunks.iter().map(|(file, at, size)| (&**file, *at, *size)).collect();
    save.matrix("grid", [100, 150], &chunks);
    let dir = save.write();
    assert_eq!(load(dir.path())["grid"], matrix(0, 100, 150));
}

#[test]
fn every_cut_of_the_metadata_is_an_error() {
    let dir = good().write();
    let whole = fs::read(dir.path().join(".metadata")).unwrap();
    for len in (0..whole.len()).step_by(7) {
        fs::write(dir.path().join(".metadata"), &whole[..len]).unwrap();
        refused(dir.path());
    }
}
