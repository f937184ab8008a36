//! Verification of real files: records against checksums, tensors against manifests, checkpoints against each other.

mod composites;
mod damage;

use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use unladen::{
    Checkpoint, DType, Error, Format, Limits, OpenCheckpoint, Progress,
    contents::{ReadPlan, files_of},
    open,
    save::{self, Output},
    source::{FileSet, FileSource},
    tensor::{Backing, FileId, Layout, Storage, StorageId, Tensor},
    verify::{self, Check, Checked, Comparison, Difference, Kind, Manifest, compare},
};

const BUDGET_BYTES: u64 = 64 << 20;

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/samples").join(name)
}

/// Every sample that is read.
fn samples() -> Vec<PathBuf> {
    let expected: Value = serde_json::from_slice(&fs::read(sample("expected.json")).unwrap()).unwrap();
    let names = expected.as_object().unwrap().keys();
    let read: Vec<PathBuf> = names.map(|it| sample(it)).filter(|it| open(it).is_ok()).collect();
    assert!(read.len() > 30);
    read
}

fn check(checkpoint: &OpenCheckpoint, manifest: Option<&Manifest>) -> Result<Checked, Error> {
    let check = Check { host_budget_bytes: BUDGET_BYTES, limits: Limits::default(), hashes: true, manifest };
    verify::check(checkpoint, checkpoint.files(), &check, &Progress::default())
}

/// As [`check`], without hashes.
fn check_records(checkpoint: &OpenCheckpoint) -> Checked {
    let limits = Limits::default();
    let check = Check { host_budget_bytes: BUDGET_BYTES, limits, hashes: false, manifest: None };
    verify::check(checkpoint, checkpoint.files(), &check, &Progress::default()).unwrap()
}

fn manifest_of(path: &Path) -> Manifest {
    check(&open(path).unwrap(), None).unwrap().manifest.unwrap()
}

fn compared(one: &Path, other: &Path) -> Comparison {
    let (one, other) = (open(one).unwrap(), open(other).unwrap());
    compare([(&one, one.files()), (&other, other.files())], BUDGET_BYTES, &Progress::default()).unwrap()
}

/// False if the format has no name for one of the types.
fn convert(from: &Path, to: &Path, format: Format) -> bool {
    let checkpoint = open(from).unwrap();
    let output = Output { path: to, format, overwrite: false, inputs: &checkpoint.files };
    match save::convert(&checkpoint, checkpoint.files(), &output, BUDGET_BYTES, &Progress::default()) {
        Ok(_) => true,
        Err(Error::Unsupported(_)) => false,
        Err(error) => panic!("{error}"),
    }
}

/// A safetensors file with these tensors, all of them 32-bit floats.
fn safetensors(path: &Path, tensors: &[(&str, &[u64], &[u8])]) {
    let mut data = Vec::new();
    let header = tensors.iter().map(|(name, shape, bytes)| {
        let start_byte = data.len();
        data.extend_from_slice(bytes);
        (
            (*name).to_owned(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start_byte, data.len()]}),
        )
    });
    let header = Value::Object(header.collect()).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(path, file).unwrap();
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|it| it.to_le_bytes()).collect()
}

#[test]
fn every_sample_is_whole_and_the_same_as_itself() {
    for path in samples() {
        let checkpoint = open(&path).unwrap();
        let checked = check(&checkpoint, None).unwrap();
        assert_eq!(checked.findings, [], "{}", path.display());
        let manifest = checked.manifest.unwrap();
        let mut names: Vec<&str> = checkpoint.tensors.iter().map(|it| &*it.name).collect();
        names.sort_unstable();
        assert_eq!(manifest.tensors().iter().map(|it| &*it.name).collect::<Vec<_>>(), names);
        assert_eq!(check(&checkpoint, Some(&manifest)).unwrap().findings, [], "{}", path.display());

        let records = check_records(&checkpoint);
        assert_eq!(records.findings, []);
        assert_eq!(records.n_compared, checked.n_compared);
        let comparison = compared(&path, &path);
        assert!(comparison.is_same() && !comparison.ties_differ, "{}: {comparison:?}", path.display());
        assert_eq!(comparison.n_in_both as usize, checkpoint.tensors.len());
    }
}

#[test]
fn the_hashes_of_a_manifest_are_those_of_the_rows_in_order() {
    // As `numpy` and the reference implementation give them: one tensor of 0, 1, 2, … and its transpose.
    let folder = TempDir::new().unwrap();
    let values: Vec<f32> = (0..6u8).map(f32::from).collect();
    let path = folder.path().join("a.safetensors");
    safetensors(&path, &[("a", &[2, 3], &floats(&values))]);
    let hash = manifest_of(&path).tensors()[0].blake3.unwrap();
    assert_eq!(hash, *blake3::hash(&floats(&values)).as_bytes());
    for name in ["layouts.pt", "big_endian.pt", "all_dtypes.pt"] {
        let checkpoint = open(sample(name)).unwrap();
        let loaded = checkpoint.load(unladen::Strategy::Stream).unwrap();
        for tensor in manifest_of(&sample(name)).tensors() {
            let mut hash = blake3::Hasher::new();
            let view = loaded.state.get(&tensor.name).unwrap();
            view.for_each_chunk(|chunk| {
                hash.update(chunk);
            })
            .unwrap();
            assert_eq!(tensor.blake3, Some(*hash.finalize().as_bytes()), "{name}: {}", tensor.name);
        }
    }
}

#[test]
fn the_manifest_of_a_conversion_is_the_same_and_so_are_the_tensors() {
    let folder = TempDir::new().unwrap();
    for name in ["layouts.pt", "tied.pt", "params.pt", "big_endian.pt", "align4096.pt"] {
        for format in Format::writable() {
            let path = folder.path().join(format!("{name}.{}", format.name()));
            let is_held = convert(&sample(name), &path, format);
            assert!(is_held || format == Format::Safetensors, "{name}");
            if is_held {
                assert_eq!(manifest_of(&path), manifest_of(&sample(name)), "{name} as {}", format.name());
                let comparison = compared(&sample(name), &path);
                assert!(comparison.is_same(), "{name} as {}: {comparison:?}", format.name());
                assert_eq!(comparison.ties_differ, name == "tied.pt" && format != Format::Pth);
            }
        }
    }
}

#[test]
fn records_without_checksums_are_counted_and_no_fault() {
    let checkpoint = open(sample("nocrc.pt")).unwrap();
    let checked = check_records(&checkpoint);
    assert_eq!((checked.findings.len(), checked.n_compared), (0, 0));
    assert!(checked.n_without_checksum as usize > checkpoint.storages.len());
    let plain = check_records(&open(sample("unsorted.safetensors")).unwrap());
    assert_eq!((plain.n_compared, plain.n_without_checksum, plain.n_packed), (0, 0, 0));
    assert!(plain.read_bytes > 0, "what nothing is known of is read all the same");
}

#[test]
fn expanded_views_of_any_size_are_refused_one_by_one() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.bin");
    fs::write(&path, [7; 4]).unwrap();
    let mut files = FileSet::default();
    files.push(FileSource::open(&path).unwrap());
    let huge = Layout::strided(DType::F32, &[1 << 60], &[0], 0).unwrap();
    let storage = Storage { file: FileId(0), start_byte: 0, len_bytes: 4, swapped: false };
    let checkpoint = Checkpoint {
        format: Format::Pth,
        path,
        files: files.stamps(),
        // Each its own, so that they are not tied; together they claim more bytes than a number holds.
        storages: vec![storage; 8],
        extents: Vec::new(),
        tensors: (0..8)
            .map(|it| {
                let backing = Backing::Storage(StorageId(it));
                Tensor { name: format!("huge{it}"), layout: huge.clone(), backing }
            })
            .collect(),
        composites: Vec::new(),
        roots: Vec::new(),
        warnings: Vec::new(),
    };
    checkpoint.validate().unwrap();
    let checkpoint = OpenCheckpoint::new(checkpoint, files);
    let kinds: Vec<Kind> = check(&checkpoint, None).unwrap().findings.iter().map(|it| it.kind).collect();
    assert_eq!(kinds, [Kind::Unreadable; 8]);
    assert_eq!(check_records(&checkpoint).findings, []);
    let plan = ReadPlan::new(&checkpoint, checkpoint.files(), BUDGET_BYTES, 2).unwrap();
    let open = files_of(checkpoint.files());
    for result in [
        verify::hash_tensors(&checkpoint, &open, &plan, &Progress::default()).map(|_| ()),
        compare([(&*checkpoint, checkpoint.files()); 2], BUDGET_BYTES, &Progress::default()).map(|_| ()),
    ] {
        assert!(matches!(result, Err(Error::Unsupported(_))), "{result:?}");
    }
}

#[test]
fn differences_are_told_to_the_element() {
    let folder = TempDir::new().unwrap();
    let (one, other) = (folder.path().join("one.safetensors"), folder.path().join("other.safetensors"));
    let same = floats(&[1.0, 2.0]);
    safetensors(
        &one,
        &[
            ("alone", &[1], &floats(&[0.0])),
            ("same", &[2], &same),
            ("shape", &[2], &same),
            ("bytes", &[2, 2], &floats(&[1.0, 2.0, 3.0, 4.0])),
        ],
    );
    safetensors(
        &other,
        &[
            ("bytes", &[2, 2], &floats(&[1.0, 2.0, 3.5, 2.0])),
            ("shape", &[2, 1], &same),
            ("new", &[0], &[]),
            ("same", &[2], &same),
        ],
    );
    let comparison = compared(&one, &other);
    assert!(!comparison.is_same());
    assert_eq!(comparison.only_in, [vec!["alone".to_owned()], vec!["new".to_owned()]]);
    let [(bytes, Difference::Elements(elements)), (shape, Difference::Kind { shapes, .. })] =
        &sorted_by_name(&comparison)[..]
    else {
        panic!("{comparison:?}")
    };
    assert_eq!((&**bytes, &**shape), ("bytes", "shape"));
    assert_eq!(*shapes, [vec![2], vec![2, 1]]);
    assert_eq!((elements.n_elems, elements.n_different, &elements.first_index[..]), (4, 2, &[1, 0][..]));
    assert_eq!((&elements.values, elements.max_abs_difference), (&["3.0".into(), "3.5".into()], Some(2.0)));
}

fn sorted_by_name(comparison: &Comparison) -> Vec<(String, Difference)> {
    let mut different = comparison.different.clone();
    different.sort_by(|(one, _), (other, _)| one.cmp(other));
    different
}

#[test]
fn a_tensor_of_several_parts_is_hashed_and_compared_whole() {
    let folder = TempDir::new().unwrap();
    let n_elems = (70u64 << 20) / 4;
    let paths = ["one", "other"].map(|it| folder.path().join(format!("{it}.safetensors")));
    let header =
        json!({"w": {"dtype": "F32", "shape": [n_elems], "data_offsets": [0, 4 * n_elems]}}).to_string();
    let mut end_byte = 0;
    for path in &paths {
        fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
        end_byte = 8 + header.len() as u64 + 4 * n_elems;
        // A hole: zeros that take no room.
        fs::File::options().write(true).open(path).unwrap().set_len(end_byte).unwrap();
    }
    let mut zeros = blake3::Hasher::new();
    for _ in 0..70 {
        zeros.update(&vec![0; 1 << 20]);
    }
    assert_eq!(manifest_of(&paths[0]).tensors()[0].blake3, Some(*zeros.finalize().as_bytes()));
    assert!(compared(&paths[0], &paths[1]).is_same());

    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options().write(true).open(&paths[1]).unwrap();
    file.write_all_at(&1f32.to_le_bytes(), end_byte - 4).unwrap();
    file.write_all_at(&(-2f32).to_le_bytes(), end_byte - 4 * n_elems + (40 << 20)).unwrap();
    let comparison = compared(&paths[0], &paths[1]);
    let [(_, Difference::Elements(elements))] = &comparison.different[..] else { panic!("{comparison:?}") };
    assert_eq!((elements.n_different, &elements.first_index[..]), (2, &[10 << 20][..]));
    assert_eq!(elements.max_abs_difference, Some(2.0));
}

#[test]
fn a_budget_that_is_too_small_names_one_that_is_not() {
    for name in ["layouts.pt", "sparse.pt", "nested.pt"] {
        let checkpoint = open(sample(name)).unwrap();
        let progress = Progress::default();
        let check = |host_budget_bytes, hashes| {
            let what = Check { host_budget_bytes, limits: Limits::default(), hashes, manifest: None };
            verify::check(&checkpoint, checkpoint.files(), &what, &progress).map(|_| ())
        };
        let sides = [(&*checkpoint, checkpoint.files()); 2];
        let [hash, read] = [true, false].map(|hashes| {
            let check = &check;
            move |bytes| check(bytes, hashes)
        });
        let compare = |host_budget_bytes| compare(sides, host_budget_bytes, &progress).map(|_| ());
        for run in [&hash as &dyn Fn(u64) -> Result<(), Error>, &read, &compare] {
            let error = run(4096).unwrap_err();
            let Error::OverBudget { needed_bytes, .. } = error else { panic!("4 KiB are too little") };
            assert!(error.hint().contains("--host-budget") && !error.hint().contains("strateg"), "{error}");
            assert!(run(needed_bytes - 1).is_err());
            run(needed_bytes).unwrap();
        }
    }
}

#[test]
fn whoever_asks_to_stop_is_heard() {
    let checkpoint = open(sample("layouts.pt")).unwrap();
    let progress = Progress::default();
    progress.cancel();
    let sides = [(&*checkpoint, checkpoint.files()); 2];
    let error = compare(sides, BUDGET_BYTES, &progress).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    let what =
        Check { host_budget_bytes: BUDGET_BYTES, limits: Limits::default(), hashes: false, manifest: None };
    let error = verify::check(&checkpoint, checkpoint.files(), &what, &progress).unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
}
