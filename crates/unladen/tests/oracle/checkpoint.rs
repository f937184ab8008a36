//! Random checkpoints over real files: several of them, with gaps of any size, some deflated, and tensors that view them in
//! every way.

use crate::{
    RawRead,
    faulty::{Before, Fault, Faulty},
    random::Rng,
};
use flate2::{Compress, Compression, FlushCompress};
use std::{path::PathBuf, sync::Arc};
use tempfile::TempDir;
use unladen::{
    Checkpoint, DType, Format, OpenCheckpoint,
    source::{FileSet, FileSource},
    stamp::{Encoding, Packed},
    tensor::{Backing, Dims, Extent, FileId, Layout, Storage, StorageId, Tensor},
};

/// A checkpoint that is not open yet, and what its files hold.
pub(crate) struct Case {
    folder: TempDir,
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) bytes: Vec<Vec<u8>>,
    /// For each file, where its bytes stand in it deflated, and how many they are then; `None`: it holds them as they are.
    packed: Vec<Option<(u64, u64)>>,
    pub(crate) storages: Vec<Storage>,
    pub(crate) extents: Vec<Extent>,
    pub(crate) tensors: Vec<Tensor>,
}

impl Case {
    /// Files with these bytes, and nothing in them yet.
    pub(crate) fn of_files(bytes: Vec<Vec<u8>>) -> Case {
        let folder = TempDir::new().unwrap();
        let paths: Vec<PathBuf> =
            (0..bytes.len()).map(|it| folder.path().join(format!("{it}.bin"))).collect();
        paths.iter().zip(&bytes).for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
        let packed = vec![None; bytes.len()];
        Case { folder, paths, bytes, packed, storages: Vec::new(), extents: Vec::new(), tensors: Vec::new() }
    }

    /// Deflates what a file holds, between other bytes, unless its tensors cannot be read from that.
    pub(crate) fn pack(&mut self, rng: &mut Rng, file: usize) {
        let bytes = &self.bytes[file];
        // What does not shrink grows.
        let mut deflated = vec![0; 2 * bytes.len() + 1000];
        let mut deflate = Compress::new(Compression::fast(), false);
        deflate.compress(bytes, &mut deflated, FlushCompress::Finish).unwrap();
        deflated.truncate(deflate.total_out() as usize);
        let before = rng.below(9000) as usize;
        let container = [&rng.bytes(before)[..], &deflated, &rng.bytes(50)].concat();
        std::fs::write(&self.paths[file], container).unwrap();
        self.packed[file] = Some((before as u64, deflated.len() as u64));
        if self.opened(Fault::Short(usize::MAX), Arc::new(|_, _, _| {})).0.validate().is_err() {
            std::fs::write(&self.paths[file], &self.bytes[file]).unwrap();
            self.packed[file] = None;
        }
    }

    /// Number of files and of what is packed in them.
    pub(crate) fn n_files(&self) -> usize {
        self.paths.len() + self.packed.iter().flatten().count()
    }

    /// One file with one tensor of bytes that fills it.
    pub(crate) fn of_bytes(len_bytes: usize) -> Case {
        let mut case = Case::of_files(vec![Rng::new(len_bytes as u64).bytes(len_bytes)]);
        case.add_storage(0, 0, len_bytes as u64, false);
        case.add_tensor("t", Layout::contiguous(DType::U8, &[len_bytes as u64]).unwrap(), 0);
        case
    }

    pub(crate) fn add_storage(&mut self, file: u32, start_byte: u64, len_bytes: u64, swapped: bool) {
        self.storages.push(Storage { file: FileId(file), start_byte, len_bytes, swapped });
    }

    pub(crate) fn add_tensor(&mut self, name: &str, layout: Layout, storage: u32) {
        let backing = Backing::Storage(StorageId(storage));
        self.tensors.push(Tensor { name: name.to_owned(), layout, backing });
    }

    pub(crate) fn open(&self) -> OpenCheckpoint {
        self.open_with(Fault::Short(usize::MAX), Arc::new(|_, _, _| {}))
    }

    /// Opens the files, each behind the same fault.
    pub(crate) fn open_with(&self, fault: Fault, before: Before) -> OpenCheckpoint {
        let (checkpoint, files) = self.opened(fault, before);
        checkpoint.validate().unwrap();
        OpenCheckpoint::new(checkpoint, files)
    }

    fn opened(&self, fault: Fault, before: Before) -> (Checkpoint, FileSet) {
        let mut files = FileSet::default();
        // Where what a file holds is found: in itself, or in the record behind it.
        let mut ids = Vec::new();
        for ((path, bytes), packed) in self.paths.iter().zip(&self.bytes).zip(&self.packed) {
            let wrap = |inner: Box<dyn RawRead>| -> Box<dyn RawRead> {
                Box::new(Faulty::new(inner, fault, Arc::clone(&before)))
            };
            let source = FileSource::open(path).unwrap().with_raw(wrap);
            let stamp = source.stamp().clone();
            files.push(source);
            if let &Some((start_byte, len_bytes)) = packed {
                let packed = Packed {
                    name: "deflated".into(),
                    encoding: Encoding::Deflate,
                    start_byte,
                    len_bytes,
                    file_len_bytes: stamp.len_bytes,
                    crc32: Some(crc32fast::hash(bytes)),
                };
                files.push_packed(stamp.of_packed(bytes.len() as u64, packed)).unwrap();
            }
            ids.push(FileId(files.len() as u32 - 1));
        }
        let storages = self.storages.iter().map(|it| Storage { file: ids[it.file.0 as usize], ..it.clone() });
        let checkpoint = Checkpoint {
            format: Format::Folder,
            path: self.folder.path().to_owned(),
            files: files.stamps(),
            storages: storages.collect(),
            extents: self.extents.clone(),
            tensors: self.tensors.clone(),
            composites: Vec::new(),
            roots: Vec::new(),
            warnings: Vec::new(),
        };
        (checkpoint, files)
    }
}

/// A checkpoint with a bit of everything. One in twelve has storages of more than a mebibyte.
pub(crate) fn random(seed: u64) -> Case {
    let mut rng = Rng::new(seed);
    let is_large = rng.one_in(12);
    let n_files = rng.pick(&[1, 1, 2, 3]);
    let mut storages = Vec::new();
    let mut lens_bytes = Vec::new();
    for file in 0..n_files {
        let mut end_byte = 0u64;
        for _ in 0..rng.below(4) + u64::from(file == 0) {
            // Page, cache line, what safetensors aligns to, and nothing at all.
            let align_bytes = rng.pick(&[4096, 64, 8, 8, 1]);
            let gap_bytes = rng.pick(&[0, 0, 3, 200, 9000]);
            let start_byte = (end_byte + rng.below(gap_bytes + 1)).next_multiple_of(align_bytes);
            let len_bytes = match is_large && rng.one_in(2) {
                true => (1 << 20) - 5000 + rng.below(1 << 20),
                false => rng.below(7000),
            };
            storages.push(Storage { file: FileId(file), start_byte, len_bytes, swapped: rng.one_in(5) });
            end_byte = start_byte + len_bytes;
        }
        // Half of the files end with their last tensor.
        lens_bytes.push(end_byte + if rng.one_in(2) { 0 } else { rng.below(5000) });
    }
    let mut case = Case::of_files(lens_bytes.iter().map(|it| rng.bytes(*it as usize)).collect());
    case.storages = storages;
    for number in 0..rng.below(14) {
        let storage = rng.below(case.storages.len() as u64) as u32;
        let layout = view(&mut rng, case.storages[storage as usize].len_bytes);
        case.add_tensor(&format!("t{number}"), layout, storage);
        match rng.below(8) {
            0 => case.add_tensor(
                &format!("tied{number}"),
                case.tensors.last().unwrap().layout.clone(),
                storage,
            ),
            1 => sharded(&mut rng, &mut case, &format!("sharded{number}")),
            _ => {}
        }
    }
    if rng.one_in(4) {
        let layout = Layout::contiguous(DType::F32, &[1 << 40]).unwrap();
        case.tensors.insert(0, Tensor { name: "meta".to_owned(), layout, backing: Backing::Meta });
    }
    for file in 0..n_files as usize {
        if rng.one_in(5) {
            case.pack(&mut rng, file);
        }
    }
    case
}

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

fn dtype(rng: &mut Rng) -> DType {
    if rng.one_in(2) { rng.pick(&FLOATS) } else { rng.pick(&DType::all().collect::<Vec<_>>()) }
}

/// A random view that lies in a storage of so many bytes, as often as not up to its last element.
fn view(rng: &mut Rng, len_bytes: u64) -> Layout {
    let dtype = dtype(rng);
    let room = len_bytes / dtype.size_bytes();
    let (shape, stride) = if room == 0 || rng.one_in(20) { empty(rng) } else { dims(rng, room) };
    let layout = Layout::strided(dtype, &shape, &stride, 0).unwrap();
    let spare = room.saturating_sub(layout.stored_bytes().end / dtype.size_bytes());
    let offset = match rng.below(3) {
        0 => 0,
        1 => spare,
        _ => rng.below(spare + 1),
    };
    let layout = Layout::strided(dtype, &shape, &stride, offset).unwrap();
    // What no arithmetic is defined for has no negative views.
    let can_be_negated = dtype.has_sign_bit() || is_integer(dtype);
    layout.with_view(rng.one_in(6), can_be_negated && rng.one_in(8))
}

pub(crate) fn is_integer(dtype: DType) -> bool {
    use DType::{I8, I16, I32, I64, U8, U16, U32, U64};
    matches!(dtype, I8 | I16 | I32 | I64 | U8 | U16 | U32 | U64)
}

/// Sizes and strides.
type Shape = (Vec<u64>, Vec<u64>);

fn empty(rng: &mut Rng) -> Shape {
    let mut shape: Vec<u64> = (0..rng.below(3)).map(|_| rng.below(5)).collect();
    shape.push(0);
    let stride = shape.iter().map(|_| rng.below(9)).collect();
    (shape, stride)
}

/// At most `room` elements from the first to the last.
fn dims(rng: &mut Rng, room: u64) -> Shape {
    let n_elems = if rng.one_in(2) { room } else { 1 + rng.below(room) };
    let rows = 1 + rng.below(n_elems.min(60));
    let columns = n_elems / rows;
    match rng.below(7) {
        0 => (vec![], vec![]),
        1 => (vec![n_elems], vec![1]),
        2 => (vec![rows, 1, columns], vec![columns, rng.below(100), 1]),
        3 => (vec![columns, rows], vec![1, columns]),
        // Every other column or so.
        4 => {
            let step = 1 + rng.below(5);
            (vec![rows, columns.div_ceil(step)], vec![columns, step])
        }
        // Expanded.
        5 => (vec![1 + rng.below(8), n_elems.min(500), 1 + rng.below(3)], vec![0, 1, 0]),
        _ => {
            let mut shape: Vec<u64> = (0..rng.below(5)).map(|_| 1 + rng.below(7)).collect();
            let stride: Vec<u64> = shape.iter().map(|_| rng.below(25)).collect();
            for dim in 0..shape.len() {
                let span = |shape: &[u64]| {
                    shape.iter().zip(&stride).map(|(len, step)| (len - 1) * step).sum::<u64>()
                };
                while span(&shape) >= room && shape[dim] > 1 {
                    shape[dim] -= 1;
                }
            }
            (shape, stride)
        }
    }
}

/// A tensor in up to four boxes from anywhere, if they find room.
fn sharded(rng: &mut Rng, case: &mut Case, name: &str) {
    let dtype = dtype(rng);
    let [rows, columns] = [1 + rng.below(12), 1 + rng.below(12)];
    let cuts = [rng.below(rows + 1), rng.below(columns + 1)];
    let first = case.extents.len() as u32;
    let mut extents = Vec::new();
    for (row, n_rows) in [(0, cuts[0]), (cuts[0], rows - cuts[0])] {
        for (column, n_columns) in [(0, cuts[1]), (cuts[1], columns - cuts[1])] {
            let storage = rng.below(case.storages.len() as u64) as u32;
            let room = case.storages[storage as usize].len_bytes / dtype.size_bytes();
            let Some(spare) = room.checked_sub(n_rows * n_columns) else { return };
            let stride = if rng.one_in(2) { [n_columns, 1] } else { [1, n_rows] };
            let layout = Layout::strided(dtype, &[n_rows, n_columns], &stride, rng.below(spare + 1)).unwrap();
            let layout = layout.with_view(rng.one_in(4), dtype.has_sign_bit() && rng.one_in(4));
            extents.push(Extent {
                storage: StorageId(storage),
                layout,
                at: Dims::from_slice(&[row, column]),
            });
        }
    }
    case.extents.extend(extents);
    let backing = Backing::Extents(first..first + 4);
    let layout = Layout::contiguous(dtype, &[rows, columns]).unwrap();
    case.tensors.push(Tensor { name: name.to_owned(), layout, backing });
}
