//! Checkpoints with packed records: every way of loading brings the bytes that were packed, within its budget, and unpacks
//! no record more often than it must.

use flate2::{Compress, Compression, FlushCompress};
use sha2::{Digest as _, Sha256};
use std::{
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tempfile::NamedTempFile;
use unladen::{
    Casts, Checkpoint, DType, Error, Format, Intent, IoPath, LoadPlan, Machine, OpenCheckpoint, PlanOptions,
    Progress, RunOptions, StateDict, Strategy, TensorBuffer,
    contents::{ReadPlan, files_of},
    plan::Step,
    source::{FileSet, FileSource, RawRead},
    stamp::{Encoding, Packed},
    tensor::{Backing, FileId, Layout, Storage, StorageId, Tensor},
    verify::hash_tensors,
};

/// Counts what comes from the file.
#[derive(Debug)]
struct Counted {
    inner: Box<dyn RawRead>,
    n_bytes: Arc<AtomicU64>,
}

impl RawRead for Counted {
    fn read_at(&self, is_direct: bool, start_byte: u64, target: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read_at(is_direct, start_byte, target)?;
        self.n_bytes.fetch_add(n as u64, Relaxed);
        Ok(n)
    }
}

/// A file of packed records, each a storage.
struct Case {
    _file: NamedTempFile,
    open: OpenCheckpoint,
    /// The row-major bytes of each tensor.
    expected: Vec<Vec<u8>>,
    n_read: Arc<AtomicU64>,
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; 2 * bytes.len() + 1000];
    let mut deflate = Compress::new(Compression::fast(), false);
    deflate.compress(bytes, &mut packed, FlushCompress::Finish).unwrap();
    packed.truncate(deflate.total_out() as usize);
    packed
}

/// Noise of five bits a byte, which shrinks to two thirds; another one in each record.
fn content(record: u64, len_bytes: usize) -> Vec<u8> {
    let mut state = record;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 59) as u8
    };
    (0..len_bytes).map(|_| next()).collect()
}

/// Records of these lengths, and views of them: name, record, layout.
fn case(lens_bytes: &[usize], views: Vec<(&str, u32, Layout)>) -> Case {
    let mut file = NamedTempFile::new().unwrap();
    let records: Vec<Vec<u8>> =
        lens_bytes.iter().zip(0..).map(|(&len_bytes, record)| content(record, len_bytes)).collect();
    let mut places = Vec::new();
    let mut end_byte = 0;
    for (number, record) in records.iter().enumerate() {
        let gap = vec![0xEE; 777 * number % 5000];
        let (encoding, packed) = match number % 4 {
            3 => (Encoding::Latin1, record.iter().map(|&it| char::from(it)).collect::<String>().into_bytes()),
            _ => (Encoding::Deflate, deflated(record)),
        };
        file.write_all(&gap).unwrap();
        file.write_all(&packed).unwrap();
        places.push((encoding, end_byte + gap.len() as u64, packed.len() as u64));
        end_byte += (gap.len() + packed.len()) as u64;
    }
    file.write_all(&[0; 100]).unwrap();
    file.as_file().sync_all().unwrap();

    let n_read = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&n_read);
    let source = FileSource::open(file.path()).unwrap();
    let source = source.with_raw(|inner| Box::new(Counted { inner, n_bytes: counted }));
    let archive = source.stamp().clone();
    let stamps = places.iter().zip(&records).map(|(&(encoding, start_byte, len_bytes), record)| {
        let packed = Packed {
            name: "a record".into(),
            encoding,
            start_byte,
            len_bytes,
            file_len_bytes: archive.len_bytes,
            crc32: Some(crc32fast::hash(record)),
        };
        archive.of_packed(record.len() as u64, packed)
    });
    let stamps: Vec<_> = stamps.collect();
    let mut files = FileSet::default();
    files.push_shared(Arc::new(source));
    stamps.iter().for_each(|it| files.push_packed(it.clone()).unwrap());
    let storages = records.iter().zip(1..).map(|(record, file)| {
        let len_bytes = record.len() as u64;
        Storage { file: FileId(file), start_byte: 0, len_bytes, swapped: file == 3 }
    });
    let tensors = views.into_iter().map(|(name, record, layout)| Tensor {
        name: name.to_owned(),
        layout,
        backing: Backing::Storage(StorageId(record)),
    });
    let checkpoint = Checkpoint {
        format: Format::Pth,
        path: file.path().to_owned(),
        files: files.stamps(),
        storages: storages.collect(),
        extents: Vec::new(),
        tensors: tensors.collect(),
        composites: Vec::new(),
        roots: Vec::new(),
        warnings: Vec::new(),
    };
    checkpoint.validate().unwrap();
    let open = OpenCheckpoint::new(checkpoint, files);
    let expected = open.tensors.iter().map(|it| expected(&open, &records, it)).collect();
    Case { _file: file, open, expected, n_read }
}

fn plain(dtype: DType, shape: &[u64]) -> Layout {
    Layout::contiguous(dtype, shape).unwrap()
}

fn strided(dtype: DType, shape: &[u64], stride: &[u64], offset: u64) -> Layout {
    Layout::strided(dtype, shape, stride, offset).unwrap()
}

const MIB: usize = 1 << 20;

/// A bit of everything: what is plain, sliced, permuted, expanded, tied, in the other byte order, empty.
fn mixed() -> Case {
    let views = vec![
        ("plain", 0, plain(DType::F32, &[3 * MIB as u64 / 4])),
        ("transposed", 1, strided(DType::F32, &[700, 1000], &[1, 700], 0)),
        ("swapped", 2, plain(DType::I16, &[500, 1000])),
        ("tied swapped", 2, plain(DType::I16, &[500, 1000])),
        ("first", 3, plain(DType::F16, &[10])),
        ("second", 3, strided(DType::F16, &[100, 100], &[100, 1], 5000)),
        ("third", 3, strided(DType::F16, &[40_000], &[2], 20_000)),
        ("tied first", 3, plain(DType::F16, &[10])),
        ("expanded", 4, strided(DType::I64, &[5, 7, 20], &[0, 1, 0], 3)),
        ("columns", 5, strided(DType::U8, &[2000, 300], &[1000, 2], 100)),
        ("none", 6, plain(DType::F32, &[0, 3])),
        ("scalar", 7, plain(DType::F64, &[])),
    ];
    case(&[3 * MIB, 2_800_000, MIB, 300_000, 80, 2_000_000, 0, 8], views)
}

/// The row-major bytes of a tensor, an element at a time.
fn expected(open: &OpenCheckpoint, records: &[Vec<u8>], tensor: &Tensor) -> Vec<u8> {
    let Backing::Storage(storage) = tensor.backing else { panic!("a tensor in one storage") };
    let (record, swapped) = (&records[storage.0 as usize], open.storages[storage.0 as usize].swapped);
    let layout = &tensor.layout;
    let size = layout.dtype().size_bytes() as usize;
    let mut bytes = Vec::new();
    for number in 0..layout.n_elems() {
        let (mut rest, mut elem) = (number, layout.offset_elems());
        for (len, step) in layout.shape().iter().zip(layout.stride()).rev() {
            elem += rest % len * step;
            rest /= len;
        }
        let at = elem as usize * size;
        bytes.extend_from_slice(&record[at..at + size]);
        if swapped {
            let last = bytes.len();
            bytes[last - size..].reverse();
        }
    }
    bytes
}

fn packed_bytes(case: &Case) -> u64 {
    case.open.files.iter().filter_map(|it| it.packed.as_ref()).map(|it| it.len_bytes).sum()
}

fn assert_loaded(case: &Case, state: &StateDict<'_>, context: &str) {
    assert_eq!(state.len(), case.open.tensors.len(), "{context}");
    for ((tensor, expected), (name, view)) in case.open.tensors.iter().zip(&case.expected).zip(state.iter()) {
        assert_eq!((&*tensor.name, tensor.layout.shape()), (name, view.shape), "{context}");
        assert!(view.host_bytes().unwrap() == *expected, "{name}, {context}");
    }
}

fn run(case: &Case, plan: &LoadPlan, context: &str) -> u64 {
    case.n_read.store(0, Relaxed);
    let loaded = case.open.run(plan, RunOptions::default()).unwrap_or_else(|it| panic!("{it}, {context}"));
    assert_eq!(loaded.peaks, plan.predicted(), "{context}");
    assert!(!loaded.state.is_mapped(), "{context}");
    assert_loaded(case, &loaded.state, context);
    case.n_read.load(Relaxed)
}

#[test]
fn every_strategy_loads_what_was_packed_by_every_way_to_read() {
    let case = mixed();
    let n_files = case.open.files().len();
    for strategy in Strategy::all() {
        for path in IoPath::all() {
            for (n_threads, host_budget_bytes) in [(1, u64::MAX), (3, u64::MAX), (3, 4 << 20)] {
                let context = format!("{strategy}, {path}, {n_threads} threads, {host_budget_bytes}");
                let options = PlanOptions {
                    n_threads: Some(n_threads),
                    host_budget_bytes,
                    intent: Intent::ReadOnly,
                    ..PlanOptions::new(strategy)
                };
                let machine =
                    Machine { io: vec![path; n_files], places_pages: true, ..Machine::plain(2, n_files) };
                let plan = match LoadPlan::new(&case.open, &options, &machine) {
                    // What holds a second copy of everything on the host has no place in 4 MiB.
                    Err(Error::OverBudget { .. }) if host_budget_bytes < u64::MAX => continue,
                    other => other.unwrap_or_else(|it| panic!("{it}, {context}")),
                };
                assert!(plan.overhead_bytes() <= host_budget_bytes, "{context}");
                assert!(plan.io()[1..].iter().all(|it| !it.is_past_cache()), "{context}");
                assert!(!plan.steps().iter().any(|it| matches!(it, Step::Map { .. })), "{context}");
                let n_read = run(&case, &plan, &context);
                if matches!(strategy, Strategy::Stream | Strategy::Meta | Strategy::Naive | Strategy::Mmap) {
                    // Each record once, and the pages around it.
                    let most = packed_bytes(&case) + 8 * 4 * 4096;
                    assert!(n_read <= most, "{n_read} of {}, {context}", packed_bytes(&case));
                }
            }
        }
    }
}

#[test]
fn no_record_is_unpacked_twice_however_many_threads_there_are() {
    // Tensors in a row of one record, large ones and small ones, some of them cast on their way.
    let len = 1 << 20;
    let views = vec![
        ("a", 0, plain(DType::F32, &[len])),
        ("b", 0, strided(DType::F32, &[10], &[1], len)),
        ("c", 0, strided(DType::F32, &[1000, 1000], &[1, 1000], len + 10_000)),
        ("d", 0, strided(DType::F32, &[100], &[1], 2 * len + 50_000)),
        ("e", 0, strided(DType::F32, &[len / 2], &[1], 2 * len + 50_100)),
        ("other", 1, plain(DType::F32, &[len])),
    ];
    let case = case(&[11 * MIB, 4 * MIB], views);
    for casts in ["keep", "bf16", "a=bf16,e=f64"] {
        for n_threads in [1, 8] {
            for path in [IoPath::Buffered, IoPath::Direct] {
                let options = PlanOptions {
                    n_threads: Some(n_threads),
                    casts: Casts::parse(casts).unwrap(),
                    ..PlanOptions::new(Strategy::Stream)
                };
                let machine = Machine { io: vec![path; 3], ..Machine::plain(2, 3) };
                for plan in [
                    LoadPlan::new(&case.open, &options, &machine).unwrap(),
                    LoadPlan::into_caller_memory(&case.open, &options, &machine).unwrap(),
                ] {
                    case.n_read.store(0, Relaxed);
                    if plan.weights_bytes() > 0 {
                        case.open.run(&plan, RunOptions::default()).unwrap();
                    } else {
                        fill(&case, &options);
                    }
                    let n_read = case.n_read.load(Relaxed);
                    let most = packed_bytes(&case) + 2 * 4 * 4096;
                    assert!(
                        n_read <= most,
                        "{n_read} of {most}, {casts}, {n_threads} threads, {path}: {plan:#?}"
                    );
                }
            }
        }
    }
}

/// Loads into memory of the caller's.
fn fill(case: &Case, options: &PlanOptions) {
    let mut buffers: Vec<(String, Vec<u64>, DType, Vec<u8>)> = Vec::new();
    for tensor in &case.open.tensors {
        let dtype = options.casts.dtype_of(&tensor.name, tensor.layout.dtype()).unwrap();
        let len_bytes = tensor.layout.n_elems() * dtype.size_bytes();
        let shape = tensor.layout.shape().to_vec();
        buffers.push((tensor.name.clone(), shape, dtype, vec![0; len_bytes as usize]));
    }
    let buffers = buffers.iter_mut().map(|(name, shape, dtype, bytes)| {
        (name.as_str(), TensorBuffer { dtype: *dtype, shape: &shape[..], bytes: &mut bytes[..] })
    });
    let loaded = case.open.load_into_buffers(buffers.collect(), options, RunOptions::default()).unwrap();
    if options.casts == Casts::default() {
        assert_loaded(case, &loaded.state, "the caller's memory");
    }
}

#[test]
fn memory_of_the_caller_is_filled_with_what_was_packed() {
    let case = mixed();
    for path in IoPath::all() {
        fill(&case, &PlanOptions { io: Some(path), ..PlanOptions::default() });
    }
}

/// The hash of every tensor, in 4 MiB.
fn assert_hashes(case: &Case, path: Option<IoPath>) -> u64 {
    case.n_read.store(0, Relaxed);
    let budget_bytes = 4 << 20;
    let plan = match path {
        Some(path) => ReadPlan::for_paths(&case.open, vec![path; case.open.files().len()], budget_bytes, 2),
        None => ReadPlan::new(&case.open, case.open.files(), budget_bytes, 2),
    };
    let files = files_of(case.open.files());
    let hashes = hash_tensors(&case.open, &files, &plan.unwrap(), &Progress::default()).unwrap();
    assert_eq!(hashes.len(), case.open.tensors.len());
    for (id, hash) in hashes {
        let tensor = case.open.tensor(id);
        let expected = Sha256::digest(&case.expected[id.0 as usize]);
        let expected: String = expected.iter().map(|it| format!("{it:02x}")).collect();
        assert_eq!(hash, expected, "{}", tensor.name);
    }
    case.n_read.load(Relaxed)
}

#[test]
fn hashes_are_those_of_what_was_packed() {
    let case = mixed();
    assert_hashes(&case, None);
    for path in IoPath::all() {
        assert_hashes(&case, Some(path));
    }
}

#[test]
fn a_tensor_larger_than_the_budget_streams_within_it() {
    let (rows, columns) = (3000u64, 2048u64);
    let views = vec![
        ("plain", 0, plain(DType::F32, &[rows, columns])),
        ("transposed", 1, strided(DType::F32, &[columns, rows], &[1, columns], 0)),
    ];
    let len_bytes = (rows * columns * 4) as usize;
    let case = case(&[len_bytes, len_bytes], views);
    let options = PlanOptions { host_budget_bytes: 4 << 20, ..PlanOptions::new(Strategy::Stream) };
    let plan = case.open.plan(&options).unwrap();
    assert!(plan.overhead_bytes() <= 4 << 20 && len_bytes > 4 << 20);
    let n_read = run(&case, &plan, "a small budget");
    assert!(n_read <= packed_bytes(&case) + 16 * 4096);
    // Row by row of the transposed one, it is gone through several times, but not for each row.
    let n_read = assert_hashes(&case, None);
    assert!(n_read <= 64 * packed_bytes(&case), "{n_read}");
}

#[test]
fn a_damaged_record_is_an_error_and_the_next_load_works() {
    let case = mixed();
    let path: &Path = &case.open.path;
    let good = std::fs::read(path).unwrap();
    let times = std::fs::metadata(path).unwrap().modified().unwrap();
    let packed = case.open.files[2].packed.clone().unwrap();
    let mut broken = good.clone();
    broken[packed.start_byte as usize + packed.len_bytes as usize / 2] ^= 0xff;
    let write = |bytes: &[u8]| {
        std::fs::write(path, bytes).unwrap();
        // As if it had been so when it was opened.
        std::fs::File::options().write(true).open(path).unwrap().set_modified(times).unwrap();
    };
    for strategy in Strategy::all() {
        let plan = case.open.plan(&PlanOptions::unlimited(strategy)).unwrap();
        write(&broken);
        let error = case.open.run(&plan, RunOptions::default()).unwrap_err();
        let Error::Corrupt(fault) = &error else { panic!("{strategy}: {error}") };
        assert!(fault.path == path && fault.expected.contains("a record"), "{strategy}: {error}");
        assert!(fault.offset_bytes.is_some_and(|it| it >= packed.start_byte), "{strategy}: {error}");
        write(&good);
        run(&case, &plan, "a mended file");
    }
}
