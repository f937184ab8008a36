//! Round trips, with the `zip` and `safetensors` crates as judges, and saves that must leave nothing behind.

use super::*;
use crate::error::Error;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{ErrorKind, Read as _},
    path::PathBuf,
};

/// A model in memory: entries, and their data by number.
struct Model {
    entries: Vec<Entry>,
    data: Vec<Vec<u8>>,
}

fn entry(name: &str, dtype: DType, shape: &[u64], data: usize) -> Entry {
    Entry { name: name.into(), dtype, shape: shape.into(), data }
}

/// Types, ties, an empty tensor, a scalar, and names that no file could have.
fn model() -> Model {
    let entries = vec![
        entry("wte.weight", DType::F32, &[2, 3], 0),
        entry("a/b\0%", DType::BF16, &[5], 1),
        entry("empty", DType::I64, &[0, 4], 2),
        entry("head.weight", DType::F32, &[2, 3], 0),
        entry(".scalar \"ä\"", DType::U8, &[], 3),
        entry("large", DType::F64, &[64, 1024], 4),
    ];
    let len_bytes = [24, 10, 0, 1, 64 * 1024 * 8];
    let data = len_bytes.iter().map(|&len| (0..len).map(|it: u32| (it * 7 % 251) as u8).collect()).collect();
    Model { entries, data }
}

impl Model {
    fn bytes(&self, name: &str) -> &[u8] {
        let entry = self.entries.iter().find(|it| it.name == name).unwrap();
        &self.data[entry.data]
    }

    fn write(&self, output: &Output<'_>, progress: &Progress) -> Result<Vec<Warning>> {
        let mut read =
            |data: usize, sink: &mut Sink<'_>| self.data[data].chunks(1000).try_for_each(&mut *sink);
        write(output, &self.entries, &mut read, progress)
    }
}

fn output(path: &Path, format: Format) -> Output<'_> {
    Output { path, format, overwrite: false, inputs: &[] }
}

/// More than any conversion here takes.
const BUDGET_BYTES: u64 = 64 << 20;

const FORMATS: [(Format, &str); 3] =
    [(Format::Pth, "out.pth"), (Format::Safetensors, "out.safetensors"), (Format::Folder, "out")];

/// Records of an archive: name, offset of the payload, bytes (their checksum compared by the reader).
fn records(path: &Path) -> Vec<(String, u64, Vec<u8>)> {
    let mut archive = zip::ZipArchive::new(File::open(path).unwrap()).unwrap();
    let n_records = archive.len();
    let read = |at: usize| {
        let mut record = archive.by_index(at).unwrap();
        assert_eq!(record.compression(), zip::CompressionMethod::Stored);
        let mut bytes = Vec::new();
        record.read_to_end(&mut bytes).unwrap();
        (record.name().unwrap().into_owned(), record.data_start().unwrap(), bytes)
    };
    (0..n_records).map(read).collect()
}

fn listing(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn a_pth_file_has_the_records_of_pytorch_aligned_and_tied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("my.model.pth");
    let model = model();
    let progress = Progress::default();
    assert_eq!(model.write(&output(&path, Format::Pth), &progress).unwrap(), []);
    let records = records(&path);
    let names: Vec<&str> = records.iter().map(|(name, ..)| name.strip_prefix("my.model/").unwrap()).collect();
    let storages = ["data/0", "data/1", "data/2", "data/3", "data/4"];
    let around = ["data.pkl", ".format_version", ".storage_alignment", "byteorder"];
    assert_eq!(names, [&around[..], &storages, &["version", ".data/serialization_id"]].concat());
    assert!(records.iter().all(|(_, start_byte, _)| start_byte % 64 == 0));
    for (number, data) in model.data.iter().enumerate() {
        assert_eq!(&records[4 + number].2, data);
    }
    let id = &records[10].2;
    assert!(id.len() == 40 && id.iter().all(u8::is_ascii_digit));
    let written: u64 = model.data.iter().map(|it| it.len() as u64).sum();
    assert_eq!(progress.get(), (written, written));
    assert_eq!(listing(folder.path()), ["my.model.pth"]);
}

#[test]
fn the_same_tensors_make_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|it| folder.path().join(it).join("out.pth"));
    for path in &paths {
        fs::create_dir(path.parent().unwrap()).unwrap();
        model().write(&output(path, Format::Pth), &Progress::default()).unwrap();
    }
    assert_eq!(fs::read(&paths[0]).unwrap(), fs::read(&paths[1]).unwrap());
}

#[test]
fn more_storages_than_a_zip_end_can_count_are_all_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.pth");
    let entries: Vec<Entry> = (0..66_000).map(|it| entry(&format!("t{it}"), DType::U8, &[1], it)).collect();
    let mut read = |data: usize, sink: &mut Sink<'_>| sink(&[data as u8]);
    write(&output(&path, Format::Pth), &entries, &mut read, &Progress::default()).unwrap();
    let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
    assert_eq!(archive.len(), 66_006);
    let mut byte = [0];
    archive.by_name("out/data/65999").unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(byte, [(65_999 % 256) as u8]);
}

#[test]
fn file_names_that_cannot_name_a_root_give_way_to_archive() {
    for (path, root) in [
        ("x/a.b.c.pt", "a.b.c"),
        ("gewichte-ü.pth", "archive"),
        ("a\nb.pth", "archive"),
        ("...pt", "archive"),
    ] {
        assert_eq!(pth::root(Path::new(path)), root);
    }
}

/// What the reference library needs to serialise a tensor.
struct Reference<'a>(::safetensors::Dtype, Vec<usize>, &'a [u8]);

impl ::safetensors::View for Reference<'_> {
    fn dtype(&self) -> ::safetensors::Dtype {
        self.0
    }
    fn shape(&self) -> &[usize] {
        &self.1
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.2.into()
    }
    fn data_len(&self) -> usize {
        self.2.len()
    }
}

#[test]
fn a_safetensors_file_is_what_the_reference_library_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    let in_safetensors = |it: &DType| it.safetensors_name().is_some();
    let mut model = model();
    for dtype in DType::all().filter(in_safetensors) {
        model.data.push(vec![1; 2 * dtype.size_bytes() as usize]);
        model.entries.push(entry(&format!("every {dtype}"), dtype, &[2], model.data.len() - 1));
    }
    let warnings = model.write(&output(&path, Format::Safetensors), &Progress::default()).unwrap();
    assert_eq!(warnings, [Warning::TiesWrittenOut { n_tensors: 1, len_bytes: 24 }]);
    let reference = model.entries.iter().map(|it| {
        let name = it.dtype.safetensors_name().unwrap();
        let dtype: ::safetensors::Dtype = serde_json::from_str(&format!("\"{name}\"")).unwrap();
        let shape = it.shape.iter().map(|&size| size as usize).collect();
        (&it.name, Reference(dtype, shape, &model.data[it.data]))
    });
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let expected = ::safetensors::serialize(reference, Some(metadata)).unwrap();
    assert_eq!(fs::read(&path).unwrap(), expected);
}

#[test]
fn floats_of_4_and_6_bits_are_counted_one_by_one_in_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    let dtypes = [("f4", DType::F4x2), ("e2m3", DType::F6E2M3), ("e3m2", DType::F6E3M2)];
    let numbered = dtypes.iter().enumerate();
    let entries = numbered.map(|(data, (name, dtype))| entry(name, *dtype, &[2, 3], data)).collect();
    Model { entries, data: vec![(1..7).collect(); 3] }
        .write(&output(&path, Format::Safetensors), &Progress::default())
        .unwrap();
    let bytes = fs::read(&path).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    use ::safetensors::Dtype;
    for (name, dtype, n_columns) in
        [("f4", Dtype::F4, 6), ("e2m3", Dtype::F6_E2M3, 4), ("e3m2", Dtype::F6_E3M2, 4)]
    {
        let tensor = file.tensor(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (dtype, &[2, n_columns][..]));
        assert_eq!(tensor.data(), [1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn dtypes_that_a_format_lacks_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (format, dtype, shape) in [
        (Format::Safetensors, DType::C128, &[1u64][..]),
        (Format::Safetensors, DType::Bits8, &[1]),
        (Format::Safetensors, DType::F4x2, &[]),
        (Format::Safetensors, DType::F6E2M3, &[1]),
        (Format::Pth, DType::F6E2M3, &[1]),
        (Format::Pth, DType::QI8, &[1]),
        (Format::Folder, DType::QU4x2, &[1]),
    ] {
        let len_bytes = dtype.size_bytes() as usize;
        let model = Model { entries: vec![entry("w", dtype, shape, 0)], data: vec![vec![0; len_bytes]] };
        let path = folder.path().join("out");
        let error = model.write(&output(&path, format), &Progress::default()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Unsupported(_)), "{text}");
        assert!(text.contains("`w`") && text.contains(dtype.name()), "{text}");
        assert_eq!(listing(folder.path()), Vec::<String>::new());
    }
}

#[test]
fn a_folder_has_a_file_per_tensor_under_a_name_that_cannot_escape() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let model = model();
    let warnings = model.write(&output(&path, Format::Folder), &Progress::default()).unwrap();
    assert_eq!(warnings, [Warning::TiesWrittenOut { n_tensors: 1, len_bytes: 24 }]);
    assert_eq!(listing(folder.path()), ["out"]);
    let files: BTreeMap<String, PathBuf> = listing(&path)
        .into_iter()
        .map(|file| {
            (crate::format::names::decode_file_name(file.strip_suffix(".pt").unwrap()), path.join(file))
        })
        .collect();
    assert_eq!(files.len(), model.entries.len());
    for entry in &model.entries {
        let records = records(&files[&entry.name]);
        assert_eq!(records[4].2, model.bytes(&entry.name), "{}", entry.name);
    }
}

#[test]
fn a_failing_or_short_or_long_read_leaves_nothing() {
    for (format, name) in FORMATS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let entries = [entry("first", DType::U8, &[4], 0), entry("second", DType::U8, &[4], 1)];
        type Attempt<'a> = &'a dyn Fn(&mut Sink<'_>) -> Result<()>;
        let attempts: [Attempt<'_>; 3] = [
            &|_| Err(Error::io(Path::new("in"), "read", ErrorKind::UnexpectedEof.into())),
            &|sink| sink(&[0; 3]),
            &|sink| sink(&[0; 5]),
        ];
        for (attempt, expected) in attempts.into_iter().zip(["Io", "Mismatch", "Mismatch"]) {
            let mut read = |data, sink: &mut Sink<'_>| if data == 0 { sink(&[0; 4]) } else { attempt(sink) };
            let result = write(&output(&path, format), &entries, &mut read, &Progress::default());
            let error = result.unwrap_err();
            assert_eq!(error.kind(), expected, "{error}");
            assert_eq!(listing(folder.path()), Vec::<String>::new());
        }
    }
}

#[test]
fn cancelling_in_the_middle_leaves_nothing() {
    for (format, name) in FORMATS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let progress = Progress::default();
        let entries: Vec<Entry> = (0..9).map(|it| entry(&format!("t{it}"), DType::U8, &[4], it)).collect();
        let mut read = |data: usize, sink: &mut Sink<'_>| {
            if data == 5 {
                assert_eq!(listing(folder.path()).len(), 1, "something is being written");
                progress.cancel();
            }
            sink(&[0; 4])
        };
        let error = write(&output(&path, format), &entries, &mut read, &progress).unwrap_err();
        assert!(matches!(error, Error::Cancelled { .. }), "{error}");
        assert_eq!(listing(folder.path()), Vec::<String>::new());
    }
}

#[test]
fn what_is_there_already_is_replaced_only_on_request() {
    for (format, name) in FORMATS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let write = |model: &Model, overwrite| {
            model.write(&Output { overwrite, ..output(&path, format) }, &Progress::default())
        };
        write(&model(), false).unwrap();
        let error = write(&model(), false).unwrap_err();
        assert!(
            matches!(&error, Error::Io { source, .. } if source.kind() == ErrorKind::AlreadyExists),
            "{error}"
        );
        let other = Model { entries: vec![entry("only", DType::U8, &[1], 0)], data: vec![vec![9]] };
        write(&other, true).unwrap();
        assert_eq!(listing(folder.path()), [name]);
        if format == Format::Folder {
            assert_eq!(listing(&path), ["only.pt"]);
        }
    }
}

#[test]
fn an_input_is_never_replaced() {
    for (format, name) in FORMATS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        model().write(&output(&path, format), &Progress::default()).unwrap();
        let input = if format == Format::Folder { path.join("large.pt") } else { path.clone() };
        let inputs = [crate::source::FileSource::open(&input).unwrap().stamp().clone()];
        let to_itself = Output { overwrite: true, inputs: &inputs, ..output(&path, format) };
        let error = model().write(&to_itself, &Progress::default()).unwrap_err();
        assert!(matches!(error, Error::Mismatch(_)), "{error}");
        assert!(input.exists());
    }
}

#[test]
fn folders_with_other_things_and_devices_are_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("home");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("diary.txt"), "dear").unwrap();
    for (format, path) in
        [(Format::Folder, &*path), (Format::Pth, &path), (Format::Pth, Path::new("/dev/null"))]
    {
        let output = Output { overwrite: true, ..output(path, format) };
        let error = model().write(&output, &Progress::default()).unwrap_err();
        assert!(matches!(error, Error::Mismatch(_)), "{error}");
    }
    assert_eq!(listing(&path), ["diary.txt"]);
}

#[test]
fn a_model_larger_than_the_disk_is_refused_before_the_first_byte() {
    for (format, name) in FORMATS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let entries = [entry("huge", DType::U8, &[1 << 62], 0)];
        let mut read = |_: usize, _: &mut Sink<'_>| panic!("nothing to read for");
        let error = write(&output(&path, format), &entries, &mut read, &Progress::default()).unwrap_err();
        assert!(
            matches!(&error, Error::Io { source, .. } if source.kind() == ErrorKind::StorageFull),
            "{error}"
        );
        assert!(error.to_string().contains("are free"), "{error}");
        assert_eq!(listing(folder.path()), Vec::<String>::new());
    }
}

#[test]
fn entries_that_contradict_each_other_are_refused() {
    let pairs = [
        [entry("w", DType::U8, &[1], 0), entry("w", DType::U8, &[1], 1)],
        [entry("a", DType::U8, &[4], 0), entry("b", DType::F32, &[1], 0)],
        [entry("a", DType::U8, &[4], 0), entry("b", DType::U8, &[3], 0)],
    ];
    for entries in pairs {
        let mut read = |_: usize, sink: &mut Sink<'_>| sink(&[0]);
        let error =
            write(&output(Path::new("x.pth"), Format::Pth), &entries, &mut read, &Progress::default())
                .unwrap_err();
        assert!(matches!(error, Error::Mismatch(_)), "{error}");
    }
}

#[test]
fn the_name_says_the_format_unless_the_caller_does() {
    let format = |path: &str, explicit| format_for_path(Path::new(path), explicit);
    assert_eq!(format("a/b.PTH", None).unwrap(), Format::Pth);
    assert_eq!(format("pytorch_model.bin", None).unwrap(), Format::Pth);
    assert_eq!(format("b.safetensors", None).unwrap(), Format::Safetensors);
    assert_eq!(format("params", None).unwrap(), Format::Folder);
    assert_eq!(format("params.v2/", None).unwrap(), Format::Folder);
    assert_eq!(format("a.zip", Some(Format::Pth)).unwrap(), Format::Pth);
    assert!(matches!(format("a.gguf", None), Err(Error::Unsupported(_))));
}

#[test]
fn a_checkpoint_that_changes_while_it_is_converted_leaves_nothing() {
    use crate::{
        source::FileSource,
        tensor::{FileId, Storage, StorageId, Tensor},
    };
    let folder = tempfile::tempdir().unwrap();
    let (input, path) = (folder.path().join("in"), folder.path().join("out.pth"));
    fs::write(&input, [1, 2, 3, 4]).unwrap();
    let mut files = FileSet::default();
    files.push(FileSource::open(&input).unwrap());
    let layout = Layout::contiguous(DType::U8, &[4]).unwrap();
    let checkpoint = Checkpoint {
        format: Format::Pth,
        path: input.clone(),
        files: files.stamps(),
        storages: vec![Storage { file: FileId(0), start_byte: 0, len_bytes: 4, swapped: false }],
        extents: Vec::new(),
        tensors: vec![Tensor { name: "w".into(), layout, backing: Backing::Storage(StorageId(0)) }],
        composites: Vec::new(),
        roots: Vec::new(),
        warnings: Vec::new(),
    };
    convert(&checkpoint, &files, &output(&path, Format::Pth), BUDGET_BYTES, &Progress::default()).unwrap();
    assert_eq!(records(&path)[4].2, [1, 2, 3, 4]);
    fs::remove_file(&path).unwrap();
    let to_itself = Output { overwrite: true, ..output(&input, Format::Pth) };
    let error = convert(&checkpoint, &files, &to_itself, BUDGET_BYTES, &Progress::default()).unwrap_err();
    assert!(matches!(error, Error::Mismatch(_)), "{error}");

    fs::write(&input, [5, 6, 7, 8, 9]).unwrap();
    let error = convert(&checkpoint, &files, &output(&path, Format::Pth), BUDGET_BYTES, &Progress::default())
        .unwrap_err();
    assert!(matches!(error, Error::Mismatch(_)), "{error}");
    assert_eq!(listing(folder.path()), ["in"]);
}
