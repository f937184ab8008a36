//! Looks at one tensor, wherever it lies.

use crate::{
    cuda::Memory,
    device::Device,
    dtype::DType,
    error::{Error, Fault, Result},
    tensor::{Block, Layout, Window},
};
use std::fmt;
use zerocopy::{FromBytes, Immutable};

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
                message: "the tensor lies there, not in the host's memory".to_owned(),
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
