//! Memory that stays: what a load hands back.

use crate::{
    cuda::Memory,
    device::Device,
    dtype::DType,
    error::{Error, Fault, Result},
    memory::{HostBuffer, Mapping},
    tensor::{Block, Layout, Window},
};
use indexmap::IndexMap;
use std::fmt;
use zerocopy::{FromBytes, Immutable};

/// Bytes that tensors of a state dict lie in.
#[derive(Debug)]
pub enum Arena<'a> {
    /// Memory that this state dict owns.
    Owned(HostBuffer),
    /// A mapped file.
    Mapped(Mapping),
    /// Memory that belongs to the caller.
    Caller(&'a mut [u8]),
    /// Memory of a GPU.
    Cuda(Memory),
}

impl Arena<'_> {
    /// How many bytes.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Arena::Cuda(memory) => memory.len_bytes(),
            Arena::Owned(_) | Arena::Mapped(_) | Arena::Caller(_) => {
                self.as_slice().map_or(0, |it| it.len() as u64)
            }
        }
    }

    /// The bytes; `None` on a GPU.
    pub fn as_slice(&self) -> Option<&[u8]> {
        match self {
            Arena::Owned(buffer) => Some(buffer.as_slice()),
            Arena::Mapped(mapping) => Some(mapping.as_slice()),
            Arena::Caller(bytes) => Some(bytes),
            Arena::Cuda(_) => None,
        }
    }

    /// The bytes, to be written; `None` for a mapped file and on a GPU.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        match self {
            Arena::Owned(buffer) => Some(buffer.as_mut_slice()),
            Arena::Caller(bytes) => Some(bytes),
            Arena::Mapped(_) | Arena::Cuda(_) => None,
        }
    }
}

/// Memory of the caller for one tensor, row-major: a parameter of a live model, say.
#[derive(Debug)]
pub struct TensorBuffer<'a> {
    /// Element type that the memory is for.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: &'a [u64],
    /// As many bytes as that takes.
    pub bytes: &'a mut [u8],
}

impl<'a> TensorBuffer<'a> {
    /// The bytes, if they are for a tensor of this layout.
    ///
    /// Fails with [`Error::Mismatch`] if type, shape or length differ.
    pub fn checked(self, layout: &Layout) -> Result<&'a mut [u8]> {
        let is_it = self.dtype == layout.dtype() && self.shape == layout.shape();
        if is_it && self.bytes.len() as u64 == layout.len_bytes() {
            return Ok(self.bytes);
        }
        let say = |dtype, shape, len_bytes| format!("{dtype} {shape:?} of {len_bytes} bytes");
        let expected = say(layout.dtype(), layout.shape(), layout.len_bytes());
        let found = say(self.dtype, self.shape, self.bytes.len() as u64);
        let hint = "fill the model that the checkpoint was saved from, or cast on the way";
        Err(Fault::new(format!("memory for {expected}"), found).hint(hint).mismatch())
    }
}

/// Where a tensor lies in a state dict.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Position of the arena.
    pub arena: usize,
    /// Where its storage starts in the arena; the layout's offset counts from here.
    pub start_byte: u64,
    /// Row-major, unless it is a view of a mapping.
    pub layout: Layout,
}

/// Loaded weights: names, and tensors in a few arenas. Tied tensors share their bytes.
#[derive(Debug, Default)]
pub struct StateDict<'a> {
    arenas: Vec<Arena<'a>>,
    tensors: IndexMap<String, Placed>,
}

impl<'a> StateDict<'a> {
    /// Puts tensors into arenas.
    ///
    /// Fails if a tensor does not lie inside its arena, or a name stands twice.
    pub fn new(
        arenas: Vec<Arena<'a>>,
        tensors: impl IntoIterator<Item = (String, Placed)>,
    ) -> Result<StateDict<'a>> {
        let mut state = StateDict { arenas, tensors: IndexMap::new() };
        for (name, placed) in tensors {
            let Some(arena) = state.arenas.get(placed.arena) else {
                let expected = format!("one of {} arenas", state.arenas.len());
                return Err(Fault::new(expected, format!("number {}", placed.arena)).tensor(name).mismatch());
            };
            let len_bytes = arena.len_bytes();
            let end_byte = placed.start_byte.saturating_add(placed.layout.stored_bytes().end);
            if end_byte > len_bytes {
                let expected = format!("an arena of at least {end_byte} bytes");
                return Err(Fault::new(expected, format!("{len_bytes} bytes")).tensor(name).mismatch());
            }
            if state.tensors.contains_key(&name) {
                return Err(Fault::new("each name once", "a second one").tensor(name).mismatch());
            }
            state.tensors.insert(name, placed);
        }
        Ok(state)
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.tensors.get(name).map(|placed| self.view(placed))
    }

    /// Every tensor, in the checkpoint's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, TensorView<'_>)> {
        self.tensors.iter().map(|(name, placed)| (name.as_str(), self.view(placed)))
    }

    /// Number of tensors, tied ones counted by name.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// True without tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// True if any tensor is a view of a mapped file, whose bytes are read when they are touched.
    pub fn is_mapped(&self) -> bool {
        self.arenas.iter().any(|it| matches!(it, Arena::Mapped(_)))
    }

    fn view<'s>(&'s self, placed: &'s Placed) -> TensorView<'s> {
        let stored = placed.layout.stored_bytes();
        let start_byte = placed.start_byte + stored.start;
        let len_bytes = stored.end - stored.start;
        let bytes = match &self.arenas[placed.arena] {
            Arena::Cuda(memory) => Bytes::OnGpu { memory, start_byte, len_bytes },
            arena => {
                let range = start_byte as usize..(start_byte + len_bytes) as usize;
                Bytes::OnHost(&arena.as_slice().unwrap_or_default()[range])
            }
        };
        TensorView {
            dtype: placed.layout.dtype(),
            shape: placed.layout.shape(),
            stride: placed.layout.stride(),
            bytes,
        }
    }
}

/// A tensor in memory, borrowed.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: &'a [u64],
    /// Distances of neighbours, in elements.
    pub stride: &'a [u64],
    /// From the first element to the last.
    pub bytes: Bytes<'a>,
}

/// Bytes of a tensor, wherever they are.
#[derive(Clone, Copy)]
pub enum Bytes<'a> {
    /// In this machine's memory.
    OnHost(&'a [u8]),
    /// In a GPU's.
    OnGpu {
        /// The memory that they are in.
        memory: &'a Memory,
        /// Where in it.
        start_byte: u64,
        /// How many.
        len_bytes: u64,
    },
}

impl Bytes<'_> {
    /// How many.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Bytes::OnHost(bytes) => bytes.len() as u64,
            Bytes::OnGpu { len_bytes, .. } => *len_bytes,
        }
    }

    /// Where they are.
    pub fn device(&self) -> Device {
        match self {
            Bytes::OnHost(_) => Device::Host,
            Bytes::OnGpu { memory, .. } => Device::Cuda(memory.ordinal()),
        }
    }
}

impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorView({} {:?} on {})", self.dtype, self.shape, self.bytes.device())
    }
}

impl<'a> TensorView<'a> {
    /// The bytes from the first element to the last, in place; with gaps where the strides leave some.
    ///
    /// Fails with [`Error::Device`] if they are on a GPU.
    pub fn host_bytes(&self) -> Result<&'a [u8]> {
        match self.bytes {
            Bytes::OnHost(bytes) => Ok(bytes),
            Bytes::OnGpu { memory, .. } => Err(Error::Device {
                device: Device::Cuda(memory.ordinal()).to_string(),
                message: "the tensor is there, not in the host's memory".to_owned(),
            }),
        }
    }

    /// The elements from the first to the last, in place; with gaps where the strides leave some.
    ///
    /// Fails with [`Error::Mismatch`] if `T` has another size than the dtype, or the bytes
    /// are not aligned for it, with [`Error::Device`] if they are on a GPU. The caller answers for `T` being the type that
    /// the dtype names.
    pub fn elements<T: FromBytes + Immutable>(&self) -> Result<&'a [T]> {
        let wrong = |found: String| {
            Fault::new(format!("aligned elements of {} bytes", size_of::<T>()), found).mismatch()
        };
        if self.dtype.size_bytes() != size_of::<T>() as u64 {
            return Err(wrong(format!("{}", self.dtype)));
        }
        let bytes = self.host_bytes()?;
        <[T]>::ref_from_bytes(bytes).map_err(|_| wrong(format!("{} at {bytes:p}", self.dtype)))
    }

    /// The elements in row-major order, in place.
    ///
    /// Fails like [`TensorView::elements`], and if the strides are not row-major.
    pub fn contiguous<T: FromBytes + Immutable>(&self) -> Result<&'a [T]> {
        if !self.layout()?.is_contiguous() {
            let found = format!("shape {:?}, stride {:?}", self.shape, self.stride);
            return Err(Fault::new("row-major elements", found).mismatch());
        }
        self.elements()
    }

    fn layout(&self) -> Result<Layout> {
        Layout::strided(self.dtype, self.shape, self.stride, 0)
    }

    /// Passes the row-major bytes to `sink`, a bounded piece at a time; from a GPU they are fetched for it.
    ///
    /// Fails with [`Error::Unsupported`] if the view claims gigabytes from a few bytes, with
    /// [`Error::Device`] if a GPU does not give them.
    pub fn for_each_chunk(&self, mut sink: impl FnMut(&[u8])) -> Result<()> {
        let layout = self.layout()?;
        let bytes = match self.bytes {
            Bytes::OnHost(bytes) => bytes,
            // What is on a GPU is row-major.
            Bytes::OnGpu { memory, start_byte, len_bytes } => {
                let mut scratch = vec![0; MAX_CHUNK_BYTES.min(len_bytes) as usize];
                let end_byte = start_byte + len_bytes;
                for at_byte in (start_byte..end_byte).step_by(MAX_CHUNK_BYTES as usize) {
                    let scratch = &mut scratch[..MAX_CHUNK_BYTES.min(end_byte - at_byte) as usize];
                    memory.read(at_byte, scratch)?;
                    sink(scratch);
                }
                return Ok(());
            }
        };
        if layout.is_contiguous() {
            bytes.chunks(MAX_CHUNK_BYTES as usize).for_each(sink);
            return Ok(());
        }
        layout.check_expansion()?;
        let at = vec![0; self.shape.len()];
        let mut scratch = Vec::new();
        for window in Window::in_order(self.shape, MAX_CHUNK_BYTES / self.dtype.size_bytes()) {
            let n_elems: u64 = window.shape.iter().product();
            scratch.resize((n_elems * self.dtype.size_bytes()) as usize, 0);
            if let Some(block) = Block::within(&layout, &at, &window) {
                block.gather(bytes, &mut scratch);
            }
            sink(&scratch);
        }
        Ok(())
    }
}

/// How many bytes of a strided tensor are put in order at a time.
const MAX_CHUNK_BYTES: u64 = 1 << 20;
