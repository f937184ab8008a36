//! Memory that stays: what a load hands back.

mod state_dict;
mod view;

pub use state_dict::{Placed, Removed, StateDict};
pub use view::{Bytes, TensorView};

use crate::{
    cuda::Memory,
    dtype::DType,
    error::{Fault, Result},
    memory::{HostBuffer, Mapping},
    tensor::Layout,
};

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
    /// Fails with [`crate::Error::Mismatch`] if type, shape or length differ.
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
