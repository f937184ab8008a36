//! Streams a tensor's bytes as they should stand in memory: row-major, in the machine's byte order, views resolved.
//! What the bytes are for (a file, a hash) is the caller's, and so is counting them.

mod read_plan;

pub use read_plan::ReadPlan;

use crate::{
    checkpoint::Checkpoint,
    error::{Error, Fault, Result},
    io_path::IoPath,
    memory::{HostBuffer, Reservation, staging_bytes},
    progress::Progress,
    source::{FileSet, ReadAt, read_staged},
    tensor::{Backing, Block, FileId, Layout, Piece, Side, Tensor, TensorId, Window},
};
use std::sync::Arc;

/// Where bytes go, a chunk at a time.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Opens a file of a checkpoint.
pub type OpenFile<'a> = dyn Fn(FileId) -> Result<Arc<dyn ReadAt>> + Sync + 'a;

/// The files of a checkpoint, as a [`Reader`] takes them.
pub fn files_of(files: &FileSet) -> impl Fn(FileId) -> Result<Arc<dyn ReadAt>> + Sync + '_ {
    |file| files.get(file.0 as usize).map(|source| source as Arc<dyn ReadAt>)
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
        let tensor = checkpoint.tensor(id);
        self.stream(id, tensor, sink).map_err(|error| error.in_tensor(&tensor.name).in_file(&checkpoint.path))
    }

    fn stream(&mut self, id: TensorId, tensor: &Tensor, sink: &mut Sink<'_>) -> Result<()> {
        tensor.layout.check_expansion()?;
        match &tensor.backing {
            Backing::Meta => Err(Fault::new("a tensor with data", "one on the meta device")
                .hint("leave the tensor out, or save the model again with its weights loaded")
                .unsupported()),
            _ if read_plan::is_in_order(tensor) => {
                let mut pieces = self.input.checkpoint.pieces(id);
                pieces.try_for_each(|piece| self.stream_run(&piece, sink))
            }
            _ => self.stream_windows(id, &tensor.layout, sink),
        }
    }

    /// A whole tensor that is one run of bytes in the file.
    fn stream_run(&mut self, piece: &Piece<'_>, sink: &mut Sink<'_>) -> Result<()> {
        let stored = piece.layout.stored_bytes();
        let mut at = stored.start;
        while at < stored.end {
            let len_bytes = self.input.plan.chunk_bytes().min(stored.end - at);
            sink(self.input.read(piece, at, len_bytes)?)?;
            at += len_bytes;
        }
        Ok(())
    }

    /// A tensor whose elements have to be brought into order first, from one piece or several.
    fn stream_windows(&mut self, id: TensorId, layout: &Layout, sink: &mut Sink<'_>) -> Result<()> {
        let Input { checkpoint, plan, .. } = self.input;
        let elem_bytes = layout.dtype().size_bytes();
        for window in Window::in_order(layout.shape(), plan.window_bytes() / elem_bytes) {
            let window_bytes = window.shape.iter().product::<u64>() * elem_bytes;
            let target = self.target.as_mut_slice().get_mut(..window_bytes as usize).ok_or_else(too_small)?;
            let mut covered_bytes = 0;
            for piece in checkpoint.pieces(id) {
                let Some(block) = Block::within(piece.layout, piece.at, &window) else { continue };
                covered_bytes += block.len_bytes();
                let is_disk = self.input.path(&piece).is_past_cache();
                let max_bytes = block.read_limit(plan.chunk_bytes(), is_disk);
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
            sink(target)?;
        }
        Ok(())
    }
}

impl Input<'_> {
    /// Whole elements of a piece's storage, resolved.
    fn read(&mut self, piece: &Piece<'_>, at_byte: u64, len_bytes: u64) -> Result<&[u8]> {
        self.progress.check(&self.checkpoint.path)?;
        let path = self.path(piece);
        let storage = self.checkpoint.storage_of(piece);
        let file = match &self.open {
            Some((id, file)) if *id == storage.file => file,
            _ => &self.open.insert((storage.file, (self.files)(storage.file)?)).1,
        };
        let start_byte = storage.start_byte + at_byte;
        let bytes = read_staged(&**file, path, start_byte, len_bytes, self.source.as_mut_slice())?;
        file.check_unchanged()?;
        piece.resolve.apply(piece.layout.dtype(), bytes);
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
        tensor::{Dims, Extent, Storage, StorageId},
    };

    /// A checkpoint whose only file holds `bytes`, with a storage for each range.
    fn checkpoint(
        bytes: &[u8],
        storages: &[(std::ops::Range<u64>, bool)],
        tensors: Vec<Tensor>,
    ) -> Checkpoint {
        let stamp =
            FileStamp { path: "a.pth".into(), dev: 0, ino: 0, len_bytes: bytes.len() as u64, mtime_ns: 0 };
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
