//! Every strategy, on random checkpoints: the same bytes as a plain walk over the elements, and a ledger that equals the
//! prediction after every step.

use proptest::prelude::*;
use std::{io::Write, path::Path};
use tempfile::NamedTempFile;
use unladen::{
    Checkpoint, DType, Error, Format, LoadPlan, OpenCheckpoint, PlanOptions, Progress, RunOptions, Strategy,
    TensorBuffer,
    engine::{self, Io, Run},
    memory::{Held, Ledger},
    source::{FileSet, FileSource},
    stamp::FileStamp,
    tensor::{Backing, Dims, Extent, FileId, Layout, Storage, StorageId, Tensor},
};

/// A checkpoint over a file of pseudo-random bytes.
struct Case {
    _file: NamedTempFile,
    bytes: Vec<u8>,
    open: OpenCheckpoint,
}

fn case(len_bytes: usize, storages: Vec<Storage>, tensors: Vec<Tensor>, extents: Vec<Extent>) -> Case {
    let mut file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> =
        (0..len_bytes as u32).map(|it| (it.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    file.write_all(&bytes).unwrap();
    let mut files = FileSet::default();
    files.push(FileSource::open(file.path()).unwrap());
    let checkpoint = Checkpoint {
        format: Format::Pth,
        path: file.path().to_owned(),
        files: files.stamps(),
        storages,
        extents,
        tensors,
        composites: Vec::new(),
        roots: Vec::new(),
        warnings: Vec::new(),
    };
    checkpoint.validate().unwrap();
    Case { _file: file, bytes, open: OpenCheckpoint::new(checkpoint, files) }
}

/// The row-major bytes of a tensor, an element at a time.
fn expected(case: &Case, index: usize) -> Vec<u8> {
    let tensor = &case.open.tensors[index];
    let size = tensor.layout.dtype().size_bytes();
    let mut bytes = Vec::new();
    for number in 0..tensor.layout.n_elems() {
        let mut at = vec![0; tensor.layout.shape().len()];
        let mut rest = number;
        for dim in (0..at.len()).rev() {
            (at[dim], rest) = (rest % tensor.layout.shape()[dim], rest / tensor.layout.shape()[dim]);
        }
        let (id, _) = case.open.iter().nth(index).unwrap();
        let piece = case.open.pieces(id).find(|piece| {
            at.iter()
                .zip(piece.at)
                .zip(piece.layout.shape())
                .all(|((&at, &low), &len)| at >= low && at < low + len)
        });
        let piece = piece.expect("extents cover the tensor");
        let elem = piece.layout.offset_elems()
            + at.iter()
                .zip(piece.at)
                .zip(piece.layout.stride())
                .map(|((at, low), step)| (at - low) * step)
                .sum::<u64>();
        let start = (case.open.storage_of(&piece).start_byte + elem * size) as usize;
        let mut element = case.bytes[start..start + size as usize].to_vec();
        piece.resolve.apply(tensor.layout.dtype(), &mut element);
        bytes.extend(element);
    }
    bytes
}

fn load(case: &Case, plan: &LoadPlan) -> Vec<(String, Vec<u64>, Vec<u8>)> {
    let predicted: Vec<_> = plan.walk().collect();
    let mut n_steps = 0;
    let mut compare = |number: usize, held| {
        assert_eq!(held, predicted[number], "after {:?}", plan.steps()[number]);
        n_steps += 1;
    };
    let progress = Progress::default();
    let options =
        RunOptions { progress: Some(&progress), after_step: Some(&mut compare), ..RunOptions::default() };
    let loaded = case.open.run(plan, options).unwrap();
    assert_eq!(n_steps, predicted.len());
    assert_eq!(loaded.peaks, plan.predicted());
    let (done_bytes, total_bytes) = progress.get();
    assert_eq!(done_bytes, total_bytes);
    let tensors = loaded.state.iter().map(|(name, view)| {
        let mut bytes = Vec::new();
        view.for_each_chunk(|chunk| bytes.extend_from_slice(chunk)).unwrap();
        (name.to_owned(), view.shape.to_vec(), bytes)
    });
    tensors.collect()
}

fn assert_every_strategy_loads(case: &Case) {
    for strategy in Strategy::all() {
        for n_threads in [1, 3] {
            let plan = case
                .open
                .plan(&PlanOptions { n_threads: Some(n_threads), ..PlanOptions::unlimited(strategy) })
                .unwrap();
            let loaded = load(case, &plan);
            let with_data =
                case.open.tensors.iter().enumerate().filter(|(_, it)| it.backing != Backing::Meta);
            let mut n_expected = 0;
            for ((index, tensor), (name, shape, bytes)) in with_data.zip(&loaded) {
                assert_eq!((&tensor.name, tensor.layout.shape()), (name, &shape[..]), "{strategy}");
                assert!(*bytes == expected(case, index), "{strategy}: {tensor:?}");
                n_expected += 1;
            }
            assert_eq!(loaded.len(), n_expected, "{strategy}");
        }
    }
}

fn storage(start_byte: u64, len_bytes: u64, swapped: bool) -> Storage {
    Storage { file: FileId(0), start_byte, len_bytes, swapped }
}

prop_compose! {
    fn any_view()(
        dims in prop::collection::vec((0u64..6, 0u64..20), 0..4),
        dtype in prop::sample::select(DType::all().collect::<Vec<_>>()),
        offset in 0u64..9, storage in 0u32..4, conj in any::<bool>(), neg in any::<bool>(), plain in any::<bool>(),
    ) -> (Layout, StorageId) {
        let (shape, stride): (Vec<u64>, Vec<u64>) = dims.into_iter().unzip();
        let contiguous = Layout::contiguous(dtype, &shape).unwrap();
        let stride = if plain { contiguous.stride().to_vec() } else { stride };
        let layout = Layout::strided(dtype, &shape, &stride, offset).unwrap().with_view(conj && !plain, neg && !plain);
        (layout, StorageId(storage))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_strategy_loads_the_same_bytes_and_keeps_to_its_prediction(
        views in prop::collection::vec(any_view(), 0..12), gaps in prop::collection::vec(0u64..9000, 4),
        swapped in prop::collection::vec(any::<bool>(), 4),
    ) {
        let mut start_byte = 0;
        let storages: Vec<_> = gaps.iter().zip(swapped).map(|(gap, swapped)| {
            start_byte += gap + 6000;
            storage(start_byte - 6000, 6000, swapped)
        }).collect();
        let mut tensors: Vec<_> = views.into_iter().enumerate().map(|(number, (layout, storage))| {
            Tensor { name: format!("t{number}"), layout, backing: Backing::Storage(storage) }
        }).collect();
        // A tie, and a tensor without data.
        if let Some(first) = tensors.first().cloned() {
            tensors.push(Tensor { name: "tied".to_owned(), ..first });
        }
        let layout = Layout::contiguous(DType::F32, &[1 << 40]).unwrap();
        tensors.insert(0, Tensor { name: "meta".to_owned(), layout, backing: Backing::Meta });
        assert_every_strategy_loads(&case(start_byte as usize, storages, tensors, Vec::new()));
    }
}

#[test]
fn a_tensor_in_several_extents_is_put_together() {
    let half = |offset| Layout::strided(DType::I16, &[40, 25], &[25, 1], offset).unwrap();
    let extents = vec![
        Extent { storage: StorageId(0), layout: half(3), at: Dims::from_slice(&[0, 25]) },
        Extent { storage: StorageId(1), layout: half(0), at: Dims::from_slice(&[0, 0]) },
        // Transposed, and in the other byte order.
        Extent {
            storage: StorageId(1),
            layout: Layout::strided(DType::I16, &[10, 50], &[1, 10], 1000).unwrap(),
            at: Dims::from_slice(&[40, 0]),
        },
    ];
    let layout = Layout::contiguous(DType::I16, &[50, 50]).unwrap();
    let tensors = vec![Tensor { name: "sharded".to_owned(), layout, backing: Backing::Extents(0..3) }];
    let storages = vec![storage(100, 2100, false), storage(5001, 3000, true)];
    assert_every_strategy_loads(&case(9000, storages, tensors, extents));
}

#[test]
fn chunks_far_smaller_than_the_tensor_bring_it_whole() {
    // 40 MB, once as it is and once transposed: several reads in place, several staging buffers.
    let (rows, columns) = (2000u64, 5000u64);
    let tensor = |name: &str, shape: [u64; 2], stride: [u64; 2]| Tensor {
        name: name.to_owned(),
        layout: Layout::strided(DType::F32, &shape, &stride, 0).unwrap(),
        backing: Backing::Storage(StorageId(0)),
    };
    let tensors = vec![
        tensor("plain", [rows, columns], [columns, 1]),
        tensor("transposed", [columns, rows], [1, columns]),
    ];
    let case = case(40_000_321, vec![storage(321 - 1, 40_000_000, false)], tensors, Vec::new());
    let plan =
        case.open.plan(&PlanOptions { n_threads: Some(2), ..PlanOptions::new(Strategy::Stream) }).unwrap();
    let loaded = load(&case, &plan);
    assert!(loaded[0].2 == case.bytes[320..40_000_320]);
    let element = |row: usize, column: usize| &case.bytes[320 + 4 * (row * columns as usize + column)..][..4];
    for (row, column) in [(0, 0), (1, 0), (0, 1), (1999, 4999), (1023, 777)] {
        assert_eq!(&loaded[1].2[4 * (column * rows as usize + row)..][..4], element(row, column));
    }
    // Two staging buffers beside the two tensors, far smaller than either.
    let staging_bytes = plan.overhead_bytes() - plan.bookkeeping_bytes();
    assert!((1 << 20..=3 << 20).contains(&staging_bytes), "{staging_bytes}");
}

#[test]
fn tied_tensors_share_their_bytes() {
    let layout = Layout::contiguous(DType::F32, &[100]).unwrap();
    let tensor = |name: &str| Tensor {
        name: name.to_owned(),
        layout: layout.clone(),
        backing: Backing::Storage(StorageId(0)),
    };
    let case = case(4096, vec![storage(64, 400, false)], vec![tensor("a"), tensor("b")], Vec::new());
    for strategy in Strategy::all() {
        let loaded = case.open.load(strategy).unwrap();
        let at = |name| loaded.state.get(name).unwrap().host_bytes().unwrap().as_ptr();
        assert_eq!(at("a"), at("b"), "{strategy}");
    }
}

#[test]
fn memory_of_the_caller_is_filled_in_place() {
    let layout = Layout::contiguous(DType::F32, &[100]).unwrap();
    let transposed = Layout::strided(DType::F32, &[5, 20], &[1, 5], 0).unwrap();
    let tensor = |name: &str, layout: &Layout| Tensor {
        name: name.to_owned(),
        layout: layout.clone(),
        backing: Backing::Storage(StorageId(0)),
    };
    let tensors = vec![tensor("a", &layout), tensor("b", &transposed)];
    let case = case(4096, vec![storage(64, 400, false)], tensors, Vec::new());
    let plan = PlanOptions::default();
    fn buffer<'a>(shape: &'a [u64], bytes: &'a mut [u8]) -> TensorBuffer<'a> {
        TensorBuffer { dtype: DType::F32, shape, bytes }
    }
    let (mut a, mut b) = ([0u8; 400], [0u8; 400]);
    {
        let buffers = [("a", buffer(&[100], &mut a[..])), ("b", buffer(&[5, 20], &mut b[..]))];
        let loaded = case.open.load_into_buffers(buffers.into(), &plan, RunOptions::default());
        assert_eq!(loaded.unwrap().state.len(), 2);
    }
    assert_eq!((a.to_vec(), b.to_vec()), (expected(&case, 0), expected(&case, 1)));

    for (dtype, shape, len) in
        [(DType::F32, &[99u64][..], 400), (DType::I32, &[100], 400), (DType::F32, &[100], 399)]
    {
        let wrong = |_: &str, _: &Layout| Some(TensorBuffer { dtype, shape, bytes: Vec::leak(vec![0; len]) });
        let error = case.open.load_into(wrong, &plan, RunOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Mismatch(_)) && error.to_string().contains("`a`"), "{error}");
    }
    let error = case.open.load_into(|_, _| None, &plan, RunOptions::default()).unwrap_err();
    assert!(error.to_string().contains("found none"), "{error}");
    let stranger = [("c", buffer(&[100], &mut a[..]))];
    let error = case.open.load_into_buffers(stranger.into(), &plan, RunOptions::default()).unwrap_err();
    assert!(error.to_string().contains("`c`"), "{error}");
}

#[test]
fn a_file_that_changed_since_it_was_opened_is_refused() {
    let layout = Layout::contiguous(DType::U8, &[4000]).unwrap();
    let tensors = vec![Tensor { name: "t".to_owned(), layout, backing: Backing::Storage(StorageId(0)) }];
    let case = case(4096, vec![storage(0, 4096, false)], tensors, Vec::new());
    let path: &Path = &case.open.path;
    std::fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"more").unwrap();
    for strategy in Strategy::all() {
        let error = case.open.load(strategy).unwrap_err();
        assert!(matches!(error, Error::Mismatch(_)), "{strategy}: {error}");
    }
}

#[test]
fn a_cancelled_load_gives_everything_back() {
    let layout = Layout::contiguous(DType::U8, &[4000]).unwrap();
    let tensors = vec![Tensor { name: "t".to_owned(), layout, backing: Backing::Storage(StorageId(0)) }];
    let case = case(4096, vec![storage(0, 4096, false)], tensors, Vec::new());
    for strategy in Strategy::all() {
        let progress = Progress::default();
        let plan = case.open.plan(&PlanOptions::unlimited(strategy)).unwrap();
        let mut cancel = |number: usize, _| {
            if number == 0 {
                progress.cancel();
            }
        };
        let ledger = Ledger::new();
        let run = Run {
            io: Io { path: &case.open.path, files: case.open.files(), progress: &progress },
            names: &|id| &case.open.tensor(id).name,
            ledger: ledger.clone(),
            open_gpu: &unladen::cuda::Context::open,
            initial_values: None,
            adopt: &mut |_| panic!("nothing of the caller's"),
            after_step: &mut cancel,
        };
        assert!(matches!(engine::run(&plan, run), Err(Error::Cancelled { .. })), "{strategy}");
        let (held, peaks) = ledger.get();
        assert_eq!(held, Held::default(), "{strategy}");
        assert!(peaks.host_rss_bytes > 0, "{strategy} had taken something");
    }
}

#[test]
fn views_that_claim_more_than_any_machine_has_are_refused_before_a_read() {
    let layout = Layout::strided(DType::F32, &[1 << 55], &[0], 0).unwrap();
    let tensors = vec![Tensor { name: "t".to_owned(), layout, backing: Backing::Storage(StorageId(0)) }];
    let case = case(4096, vec![storage(0, 4096, false)], tensors, Vec::new());
    let error = case.open.load(Strategy::Stream).unwrap_err();
    assert!(matches!(error, Error::OverBudget { .. }), "{error}");
}

#[test]
fn a_plan_for_another_checkpoint_is_refused() {
    let layout = Layout::contiguous(DType::U8, &[4000]).unwrap();
    let tensors = vec![Tensor { name: "t".to_owned(), layout, backing: Backing::Storage(StorageId(0)) }];
    let [one, other] =
        [(); 2].map(|()| case(4096, vec![storage(0, 4096, false)], tensors.clone(), Vec::new()));
    let plan = one.open.plan(&PlanOptions::default()).unwrap();
    assert!(one.open.run(&plan, RunOptions::default()).is_ok());
    let error = other.open.run(&plan, RunOptions::default()).unwrap_err();
    assert!(matches!(error, Error::Mismatch(_)) && error.to_string().contains("made for"), "{error}");
}

#[test]
fn extents_with_a_hole_or_an_overlap_are_refused() {
    let layout = Layout::contiguous(DType::U8, &[10, 10]).unwrap();
    let tensors = vec![Tensor { name: "sharded".to_owned(), layout, backing: Backing::Extents(0..2) }];
    let rows = |n: u64| Layout::contiguous(DType::U8, &[n, 10]).unwrap();
    let extent =
        |n: u64, at: u64| Extent { storage: StorageId(0), layout: rows(n), at: Dims::from_slice(&[at, 0]) };
    for (extents, is_whole) in [
        (vec![extent(5, 0), extent(5, 5)], true),
        (vec![extent(5, 0), extent(4, 5)], false),
        (vec![extent(6, 0), extent(4, 5)], false),
        (vec![extent(6, 0), extent(6, 5)], false),
    ] {
        let checkpoint = Checkpoint {
            format: Format::Pth,
            path: "test".into(),
            files: vec![FileStamp {
                path: "test".into(),
                dev: 0,
                ino: 0,
                len_bytes: 100,
                mtime_ns: 0,
                packed: None,
            }],
            storages: vec![storage(0, 100, false)],
            extents,
            tensors: tensors.clone(),
            composites: Vec::new(),
            roots: Vec::new(),
            warnings: Vec::new(),
        };
        assert_eq!(checkpoint.validate().is_ok(), is_whole, "{checkpoint:?}");
    }
}

#[test]
fn many_small_files_load_whole_and_a_change_in_any_of_them_is_noticed() {
    // More files than stay open.
    let dir = tempfile::tempdir().unwrap();
    let (mut files, mut storages, mut tensors) = (FileSet::default(), Vec::new(), Vec::new());
    for number in 0..300u32 {
        let path = dir.path().join(number.to_string());
        std::fs::write(&path, [number as u8; 64]).unwrap();
        files.push(FileSource::open(&path).unwrap());
        storages.push(Storage { file: FileId(number), start_byte: 0, len_bytes: 64, swapped: false });
        let layout = Layout::contiguous(DType::U8, &[64]).unwrap();
        let backing = Backing::Storage(StorageId(number));
        tensors.push(Tensor { name: number.to_string(), layout, backing });
    }
    let checkpoint = Checkpoint {
        format: Format::Folder,
        path: dir.path().to_owned(),
        files: files.stamps(),
        storages,
        extents: Vec::new(),
        tensors,
        composites: Vec::new(),
        roots: Vec::new(),
        warnings: Vec::new(),
    };
    let open = OpenCheckpoint::new(checkpoint, files);
    for strategy in Strategy::all() {
        let loaded = open.load(strategy).unwrap();
        let is_right = loaded
            .state
            .iter()
            .all(|(name, view)| view.host_bytes().unwrap() == [name.parse::<u32>().unwrap() as u8; 64]);
        assert!(loaded.state.len() == 300 && is_right, "{strategy}");
        assert_eq!(loaded.peaks, open.plan(&PlanOptions::unlimited(strategy)).unwrap().predicted());
    }
    // Slots are used again: a plan of many small steps needs few.
    assert!(open.plan(&PlanOptions::unlimited(Strategy::PerTensor)).unwrap().n_slots() < 10);

    std::fs::write(dir.path().join("299"), [0; 65]).unwrap();
    for strategy in Strategy::all() {
        let error = open.load(strategy).unwrap_err();
        assert!(
            matches!(error, Error::Mismatch(_)) && error.to_string().contains("299"),
            "{strategy}: {error}"
        );
    }
}
