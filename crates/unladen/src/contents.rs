//! Streams a tensor's bytes as they should stand in memory: row-major, in the machine's byte order, views resolved.
//! What the bytes are for (a file, a hash) is the caller's, and so is counting them.

mod read_plan;

pub use read_plan::{ReadPlan, Reads, is_in_order};

use crate::{
    checkpoint::Checkpoint,
    error::{Error, Fault, Result},
    io_path::IoPath,
    memory::{HostBuffer, Reservation, staging_bytes},
    progress::Progress,
    source::{FileSet, ReadAt, read_staged},
    tensor::{Backing, Block, FileId, Piece, Side, TensorId, Window},
};
use std::{ops::Range, sync::Arc};

/// Where bytes go, a chunk at a time.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Opens a file of a checkpoint.
pub type OpenFile<'a> = dyn Fn(FileId) -> Result<Arc<dyn ReadAt>> + Sync + 'a;

/// The files of a checkpoint, as a [`Reader`] takes them.
pub fn files_of(files: &FileSet) -> impl Fn(FileId) -> Result<Arc<dyn ReadAt>> + Sync + '_ {
    |file| files.get(file.0 as usize)
}

/// Reads tensors one after the other, in memory that does not grow with them: one thread's part of a [`ReadPlan`].
pub struct Reader<'a> {
    input: Input<'a>,
    /// Bytes in order.
    target: HostBuffer,
}

/// Where bytes come from, and the buffer that they come into.
struct Input<'a> {
    checkpoint: &'a Checkpoint,
    files: &'a OpenFile<'a>,
    plan: &'a ReadPlan,
    /// For the wish to stop; the bytes are counted by whoever takes them.
    progress: &'a Progress,
    /// The file that was read last, still open.
    open: Option<(FileId, Arc<dyn ReadAt>)>,
    /// Bytes as the file has them.
    source: HostBuffer,
}

impl<'a> Reader<'a> {
    /// Reads nothing yet. Of `progress` it only asks whether to stop, before each read.
    ///
    /// Fails with [`Error::Io`] if the system has no memory for the buffers.
    pub fn new(
        checkpoint: &'a Checkpoint,
        files: &'a OpenFile<'a>,
        plan: &'a ReadPlan,
        progress: &'a Progress,
    ) -> Result<Reader<'a>> {
        let buffer = |len_bytes| HostBuffer::new(Reservation::uncounted(len_bytes), &checkpoint.path);
        let (source, target) = (buffer(staging_bytes(plan.chunk_bytes()))?, buffer(plan.window_bytes())?);
        Ok(Reader { input: Input { checkpoint, files, plan, progress, open: None, source }, target })
    }

    /// Passes the tensor's bytes to `sink`, in order, in bounded chunks. Stops at the first error of `sink`.
    ///
    /// Fails with [`Error::Unsupported`] for a tensor without data.
    pub fn for_each_chunk(&mut self, id: TensorId, sink: &mut Sink<'_>) -> Result<()> {
        let checkpoint = self.input.checkpoint;
        let mut walk = self.walk(id)?;
        while let Some(chunk) = self.next(&mut walk)? {
            sink(chunk).map_err(|error| in_tensor(checkpoint, id, error))?;
        }
        Ok(())
    }

    /// Begins to read a tensor; [`Reader::next`] gives its bytes.
    ///
    /// Fails with [`Error::Unsupported`] for a tensor without data.
    pub fn walk(&self, id: TensorId) -> Result<Walk> {
        let checkpoint = self.input.checkpoint;
        let tensor = checkpoint.tensor(id);
        let begin = || {
            tensor.layout.check_expansion()?;
            if tensor.backing == Backing::Meta {
                return Err(Fault::new("a tensor with data", "one on the meta device")
                    .hint("leave the tensor out, or save the model again with its weights loaded")
                    .unsupported());
            }
            if is_in_order(tensor) {
                return Ok(Rest::Run { id, stored: tensor.layout.stored_bytes() });
            }
            let max_elems = self.input.plan.window_bytes() / tensor.layout.dtype().size_bytes();
            let windows = Window::in_order(tensor.layout.shape(), max_elems);
            Ok(Rest::Windows { id, windows: Box::new(windows) })
        };
        begin().map(Walk).map_err(|error| in_tensor(checkpoint, id, error))
    }

    /// As [`Reader::walk`], for a part of a tensor that [`is_in_order`]: from one byte of it to another, both between
    /// elements.
    pub fn walk_part(&self, id: TensorId, part: Range<u64>) -> Result<Walk> {
        let stored = self.input.checkpoint.tensor(id).layout.stored_bytes();
        match self.walk(id)?.0 {
            Rest::Run { .. } if part.start <= part.end && part.end <= stored.end - stored.start => {
                Ok(Walk(Rest::Run { id, stored: stored.start + part.start..stored.start + part.end }))
            }
            _ => {
                let expected = "a part of a tensor that stands in the file in order";
                let error = Fault::new(expected, format!("bytes {part:?}")).mismatch();
                Err(in_tensor(self.input.checkpoint, id, error))
            }
        }
    }

    /// Begins to read a range of a file, as its bytes stand there.
    pub fn walk_file(&self, file: FileId, range: Range<u64>) -> Walk {
        Walk(Rest::File { file, range })
    }

    /// The next bytes of a walk of this reader's, some at least; `None` after the last.
    pub fn next(&mut self, walk: &mut Walk) -> Result<Option<&[u8]>> {
        let checkpoint = self.input.checkpoint;
        let id = match &mut walk.0 {
            Rest::File { file, range } => {
                let part = take(range, self.input.plan.chunk_bytes());
                return match part.is_empty() {
                    true => Ok(None),
                    false => Ok(Some(self.input.read_file(*file, part.start, part.end - part.start)?)),
                };
            }
            Rest::Run { id, .. } | Rest::Windows { id, .. } => *id,
        };
        self.next_of_tensor(&mut walk.0).map_err(|error| in_tensor(checkpoint, id, error))
    }

    fn next_of_tensor(&mut self, rest: &mut Rest) -> Result<Option<&[u8]>> {
        let checkpoint = self.input.checkpoint;
        match rest {
            Rest::Run { id, stored } => {
                let part = take(stored, self.input.plan.chunk_bytes());
                let Some(piece) = checkpoint.pieces(*id).next().filter(|_| !part.is_empty()) else {
                    return Ok(None);
                };
                Ok(Some(self.input.read(&piece, part.start, part.end - part.start)?))
            }
            Rest::Windows { id, windows } => match windows.next() {
                Some(window) => Ok(Some(self.fill(*id, &window)?)),
                None => Ok(None),
            },
            Rest::File { .. } => Ok(None),
        }
    }

    /// The elements of a window in order, from one piece or several.
    fn fill(&mut self, id: TensorId, window: &Window) -> Result<&[u8]> {
        let Input { checkpoint, plan, .. } = self.input;
        let elem_bytes = checkpoint.tensor(id).layout.dtype().size_bytes();
        let window_bytes = window.shape.iter().product::<u64>() * elem_bytes;
        let target = self.target.as_mut_slice().get_mut(..window_bytes as usize).ok_or_else(too_small)?;
        let mut covered_bytes = 0;
        for piece in checkpoint.pieces(id) {
            let Some(block) = Block::within(piece.layout, piece.at, window) else { continue };
            covered_bytes += block.len_bytes();
            let is_disk = self.input.path(&piece).is_past_cache();
            // What is packed is unpacked all along, whatever is skipped of it.
            let max_bytes = match checkpoint.is_packed(checkpoint.storage_of(&piece).file) {
                true => plan.chunk_bytes(),
                false => block.read_limit(plan.chunk_bytes(), is_disk),
            };
            for mut part in block.split(Side::Source, max_bytes) {
                let source = self.input.read(&piece, part.source_byte, part.span_bytes(Side::Source))?;
                part.source_byte = 0;
                part.gather(source, target);
            }
        }
        if covered_bytes != window_bytes {
            let expected = format!("shards that hold {window_bytes} bytes from {:?} on", window.start);
            return Err(Fault::new(expected, format!("{covered_bytes} bytes")).corrupt());
        }
        Ok(target)
    }
}

/// What is still to be read of a tensor, or of a range of a file.
pub struct Walk(Rest);

enum Rest {
    /// Of a tensor that stands in order: bytes of its storage.
    Run { id: TensorId, stored: Range<u64> },
    /// Of a tensor whose elements have to be brought into order.
    Windows { id: TensorId, windows: Box<dyn Iterator<Item = Window>> },
    /// Of a file.
    File { file: FileId, range: Range<u64> },
}

/// Cuts at most so many bytes off the front of a range.
fn take(range: &mut Range<u64>, max_bytes: u64) -> Range<u64> {
    let end = range.end.min(range.start.saturating_add(max_bytes));
    let part = range.start..end;
    range.start = end;
    part
}

fn in_tensor(checkpoint: &Checkpoint, id: TensorId, error: Error) -> Error {
    error.in_tensor(&checkpoint.tensor(id).name).in_file(&checkpoint.path)
}

impl Input<'_> {
    /// Whole elements of a piece's storage, resolved.
    fn read(&mut self, piece: &Piece<'_>, at_byte: u64, len_bytes: u64) -> Result<&[u8]> {
        let storage = self.checkpoint.storage_of(piece);
        let bytes = self.read_file(storage.file, storage.start_byte + at_byte, len_bytes)?;
        piece.resolve.apply(piece.layout.dtype(), bytes);
        Ok(bytes)
    }

    /// A range of a file, no longer than a chunk.
    fn read_file(&mut self, id: FileId, start_byte: u64, len_bytes: u64) -> Result<&mut [u8]> {
        self.progress.check(&self.checkpoint.path)?;
        let file = match &self.open {
            Some((open, file)) if *open == id => file,
            _ => &self.open.insert((id, (self.files)(id)?)).1,
        };
        let path = self.plan.path(id.0 as usize);
        let bytes = read_staged(&**file, path, start_byte, len_bytes, self.source.as_mut_slice())?;
        file.check_unchanged()?;
        Ok(bytes)
    }

    fn path(&self, piece: &Piece<'_>) -> IoPath {
        self.plan.path(self.checkpoint.storage_of(piece).file.0 as usize)
    }
}

/// A plan that was made for another checkpoint.
fn too_small() -> Error {
    Fault::new("a plan whose buffers hold what is read", "less").mismatch()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::Format,
        dtype::DType,
        source::MemorySource,
        stamp::FileStamp,
        tensor::{Dims, Extent, Layout, Storage, StorageId, Tensor},
    };

    /// A checkpoint whose only file holds `bytes`, with a storage for each range.
    fn checkpoint(bytes: &[u8], storages: &[(Range<u64>, bool)], tensors: Vec<Tensor>) -> Checkpoint {
        let stamp = FileStamp {
            path: "a.pth".into(),
            dev: 0,
            ino: 0,
            len_bytes: bytes.len() as u64,
            mtime_ns: 0,
            packed: None,
        };
        let storages = storages.iter().map(|(range, swapped)| Storage {
            file: FileId(0),
            start_byte: range.start,
            len_bytes: range.end - range.start,
            swapped: *swapped,
        });
        Checkpoint {
            format: Format::Pth,
            path: "a.pth".into(),
            files: vec![stamp],
            storages: storages.collect(),
            extents: Vec::new(),
            tensors,
            composites: Vec::new(),
            roots: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn tensor(name: &str, layout: Layout, storage: u32) -> Tensor {
        Tensor { name: name.into(), layout, backing: Backing::Storage(StorageId(storage)) }
    }

    fn read_all(checkpoint: &Checkpoint, bytes: &[u8], id: TensorId) -> Result<Vec<u8>> {
        read_within(checkpoint, bytes, id, 64 << 20, IoPath::Buffered)
    }

    fn read_within(
        checkpoint: &Checkpoint,
        bytes: &[u8],
        id: TensorId,
        budget_bytes: u64,
        path: IoPath,
    ) -> Result<Vec<u8>> {
        checkpoint.validate()?;
        let source: Arc<dyn ReadAt> = Arc::new(MemorySource::new("a.pth", bytes.to_vec()));
        let open = |_| Ok(Arc::clone(&source));
        let plan = ReadPlan::for_paths(checkpoint, vec![path], budget_bytes, 1)?;
        let progress = Progress::default();
        let mut all = Vec::new();
        Reader::new(checkpoint, &open, &plan, &progress)?.for_each_chunk(id, &mut |chunk| {
            all.extend_from_slice(chunk);
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn strided_swapped_and_negative_views_come_out_row_major_and_resolved() {
        let bytes: Vec<u8> = [0i16, 1, 2, 3, 4, 5, 6, 7].map(i16::to_be_bytes).concat();
        let view =
            Layout::strided(DType::I16, &[3, 2], &[1, 3], 1).expect("a small view").with_view(false, true);
        let checkpoint = checkpoint(&bytes, &[(0..16, true)], vec![tensor("t", view, 0)]);
        let expected = [-1i16, -4, -2, -5, -3, -6].map(i16::to_le_bytes).concat();
        assert_eq!(read_all(&checkpoint, &bytes, TensorId(0)).unwrap(), expected);
    }

    #[test]
    fn a_transposed_tensor_larger_than_the_budget_comes_out_in_order_by_every_way_to_read() {
        let (rows, columns) = (1100u64, 1000u64);
        let bytes: Vec<u8> = (0..rows * columns).flat_map(|it| (it as u32).to_le_bytes()).collect();
        let view = Layout::strided(DType::F32, &[columns, rows], &[1, columns], 0).unwrap();
        let budget_bytes = 3 << 20;
        assert!(view.len_bytes() > budget_bytes);
        let checkpoint = checkpoint(&bytes, &[(0..bytes.len() as u64, false)], vec![tensor("t", view, 0)]);
        for path in IoPath::all() {
            let all = read_within(&checkpoint, &bytes, TensorId(0), budget_bytes, path).unwrap();
            let expected = (0..columns).flat_map(|column| (0..rows).map(move |row| row * columns + column));
            assert_eq!(all.len(), bytes.len());
            assert!(
                all.chunks_exact(4).zip(expected).all(|(it, number)| it == (number as u32).to_le_bytes())
            );
        }
    }

    #[test]
    fn parts_of_a_tensor_in_order_are_its_bytes_and_ranges_of_a_file_come_as_they_stand() {
        let bytes: Vec<u8> = (0..300_000u32).flat_map(u32::to_be_bytes).collect();
        let whole = Layout::strided(DType::F32, &[299_000], &[1], 1000).unwrap();
        let turned = Layout::strided(DType::F32, &[2, 2], &[1, 2], 0).unwrap();
        let len_bytes = bytes.len() as u64;
        let checkpoint =
            checkpoint(&bytes, &[(0..len_bytes, true)], vec![tensor("w", whole, 0), tensor("t", turned, 0)]);
        let source: Arc<dyn ReadAt> = Arc::new(MemorySource::new("a.pth", bytes.clone()));
        let open = |_| Ok(Arc::clone(&source));
        let plan = ReadPlan::for_paths(&checkpoint, vec![IoPath::Buffered], 64 << 20, 1).unwrap();
        let progress = Progress::default();
        let mut reader = Reader::new(&checkpoint, &open, &plan, &progress).unwrap();
        let mut read = |mut walk: Walk| {
            let mut all = Vec::new();
            while let Some(chunk) = reader.next(&mut walk).unwrap() {
                assert!(!chunk.is_empty());
                all.extend_from_slice(chunk);
            }
            all
        };
        let reader = Reader::new(&checkpoint, &open, &plan, &progress).unwrap();
        let parts = [0..4, 4..1_100_000, 1_100_000..1_196_000];
        let parts: Vec<u8> =
            parts.into_iter().flat_map(|it| read(reader.walk_part(TensorId(0), it).unwrap())).collect();
        let expected: Vec<u8> = (1000..300_000u32).flat_map(u32::to_le_bytes).collect();
        assert!(parts == expected);
        assert!(read(reader.walk_file(FileId(0), 3..1_199_999)) == bytes[3..1_199_999]);
        assert!(read(reader.walk_file(FileId(0), 7..7)).is_empty());
        assert!(reader.walk_part(TensorId(0), 0..1_196_004).is_err(), "beyond the tensor's end");
        assert!(reader.walk_part(TensorId(1), 0..4).is_err(), "a tensor that is not in order");
    }

    #[test]
    fn few_columns_of_a_wide_matrix_are_read_row_by_row() {
        let window_bytes = 16 << 20;
        let view = Layout::strided(DType::F32, &[16384, 16384], &[1, 16384], 0).unwrap();
        let window = Window::in_order(view.shape(), window_bytes / 4).next().unwrap();
        let block = Block::within(&view, &[0, 0], &window).unwrap();
        let limit = block.read_limit(window_bytes, false);
        let read: u64 = block.split(Side::Source, limit).map(|it| it.span_bytes(Side::Source)).sum();
        assert_eq!(read, window_bytes);
    }

    #[test]
    fn shards_of_different_byte_order_make_one_tensor() {
        let bytes = [[1u16, 2].map(u16::to_le_bytes), [3u16, 4].map(u16::to_be_bytes)].concat().concat();
        let half = |storage, column| Extent {
            storage: StorageId(storage),
            layout: Layout::contiguous(DType::U16, &[2, 1]).unwrap(),
            at: Dims::from_slice(&[0, column]),
        };
        let layout = Layout::contiguous(DType::U16, &[2, 2]).unwrap();
        let tensors = vec![Tensor { name: "t".into(), layout, backing: Backing::Extents(0..2) }];
        let mut checkpoint = checkpoint(&bytes, &[(0..4, false), (4..8, true)], tensors);
        checkpoint.extents = vec![half(0, 0), half(1, 1)];
        let expected = [1u16, 3, 2, 4].map(u16::to_le_bytes).concat();
        assert_eq!(read_all(&checkpoint, &bytes, TensorId(0)).unwrap(), expected);

        checkpoint.tensors[0].backing = Backing::Extents(0..1);
        let error = read_all(&checkpoint, &bytes, TensorId(0)).unwrap_err();
        assert!(matches!(error, Error::Corrupt(_)), "a shard is missing: {error}");
    }

    #[test]
    fn empty_and_zero_dimensional_tensors_have_their_bytes_and_no_more() {
        let bytes = [1u8, 2, 3, 4, 5, 6, 7, 8];
        let tensors = vec![
            tensor("empty", Layout::strided(DType::F32, &[0, 3], &[3, 1], 9).unwrap(), 0),
            tensor("scalar", Layout::strided(DType::F32, &[], &[], 1).unwrap(), 0),
        ];
        let checkpoint = checkpoint(&bytes, &[(0..8, false)], tensors);
        assert_eq!(read_all(&checkpoint, &bytes, TensorId(0)).unwrap(), Vec::<u8>::new());
        assert_eq!(read_all(&checkpoint, &bytes, TensorId(1)).unwrap(), [5, 6, 7, 8]);
    }

    #[test]
    fn a_meta_tensor_is_a_typed_error_that_names_it() {
        let layout = Layout::contiguous(DType::F32, &[2]).unwrap();
        let meta = Tensor { name: "w".into(), layout, backing: Backing::Meta };
        let error = read_all(&checkpoint(&[], &[], vec![meta]), &[], TensorId(0)).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)) && error.to_string().contains("`w`"), "{error}");
    }

    #[test]
    fn tied_tensors_share_a_first_one_and_overlapping_views_do_not() {
        let whole = Layout::contiguous(DType::U8, &[4]).unwrap();
        let half = Layout::contiguous(DType::U8, &[2]).unwrap();
        let tensors =
            vec![tensor("a", whole.clone(), 0), tensor("b", half, 0), tensor("c", whole.clone(), 0), {
                tensor("d", whole, 1)
            }];
        let checkpoint = checkpoint(&[0; 8], &[(0..4, false), (4..8, false)], tensors);
        assert_eq!(checkpoint.first_with_same_bytes(), [0, 1, 0, 3].map(TensorId));
    }
}
