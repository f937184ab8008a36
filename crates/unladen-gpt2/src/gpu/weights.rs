//! Finds every weight of a model among tensors on a GPU, and sees it as what it is, in place.

use super::{
    FLOATS,
    kernels::{Mask, product},
};
use crate::{
    config::Config,
    names::{Naming, Part, Role},
    recognise::check,
};
use std::collections::HashMap;
use unladen::{
    DType,
    cuda::{Arg, Memory},
    error::{Fault, Result},
};

/// A row-major tensor in a GPU's memory.
#[derive(Clone, Copy)]
pub struct GpuTensor<'m> {
    /// Its name in the state dict.
    pub name: &'m str,
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: &'m [u64],
    /// Where it lies.
    pub memory: &'m Memory,
    /// Where its first element stands there.
    pub start_byte: u64,
}

/// A range of a GPU's memory. It was checked to be one.
#[derive(Clone, Copy)]
pub(crate) struct Place<'m> {
    memory: &'m Memory,
    start_byte: u64,
    len_bytes: u64,
}

impl<'m> Place<'m> {
    /// Fails with `Mismatch` unless the range lies inside the memory.
    pub(crate) fn new(memory: &'m Memory, start_byte: u64, len_bytes: u64) -> Result<Place<'m>> {
        if start_byte.saturating_add(len_bytes) > memory.len_bytes() {
            let expected = format!("{len_bytes} bytes from byte {start_byte} of memory on the GPU");
            return Err(Fault::new(expected, format!("{} in all", memory.len_bytes())).mismatch());
        }
        Ok(Place { memory, start_byte, len_bytes })
    }

    /// Fails with `Mismatch` unless it is long enough for so many elements, and aligned for them.
    pub(crate) fn check_holds(&self, n_elems: u64, dtype: DType) -> Result<()> {
        let needed_bytes = product(&[n_elems, dtype.size_bytes()])?;
        if needed_bytes > self.len_bytes {
            let found = self.len_bytes.to_string();
            return Err(Fault::new(format!("{needed_bytes} bytes on the GPU"), found).mismatch());
        }
        self.check_aligned(dtype.size_bytes())
    }

    /// Fails with `Mismatch` unless its address is a multiple.
    pub(crate) fn check_aligned(&self, align_bytes: u64) -> Result<()> {
        let address = self.memory.address().wrapping_add(self.start_byte);
        if address.is_multiple_of(align_bytes) {
            return Ok(());
        }
        Err(Fault::new(
            format!("an address on the GPU that is a multiple of {align_bytes}"),
            format!("{address:#x}"),
        )
        .hint("save the checkpoint again (`unladen convert`), which puts every tensor where it is aligned")
        .mismatch())
    }

    /// What a kernel is given for it.
    pub(crate) fn arg(&self) -> Arg<'m> {
        Arg::Memory(self.memory, self.start_byte)
    }

    /// What a kernel is given for what comes after its first elements.
    pub(crate) fn arg_at(&self, n_elems: u64, dtype: DType) -> Arg<'m> {
        Arg::Memory(self.memory, self.start_byte + n_elems * dtype.size_bytes())
    }

    /// Writes to its start.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<()> {
        self.memory.write(self.start_byte, bytes)
    }

    /// Reads it from its start.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> Result<()> {
        self.memory.read(self.start_byte, bytes)
    }

    /// What is left after its first elements. Fails with `Mismatch` if there are not as many.
    pub(crate) fn skip(&self, n_elems: u64, dtype: DType) -> Result<Place<'m>> {
        self.check_holds(n_elems, dtype)?;
        let skipped_bytes = n_elems * dtype.size_bytes();
        let (start_byte, len_bytes) = (self.start_byte + skipped_bytes, self.len_bytes - skipped_bytes);
        Ok(Place { start_byte, len_bytes, ..*self })
    }
}

/// Elements on the GPU, row-major and aligned.
#[derive(Clone, Copy)]
pub(crate) struct Tensor<'m> {
    pub(crate) place: Place<'m>,
    pub(crate) dtype: DType,
}

impl<'m> Tensor<'m> {
    fn new(tensor: &GpuTensor<'m>) -> Result<Tensor<'m>> {
        let elem_bytes = tensor.dtype.size_bytes();
        let len_bytes = product(&[product(tensor.shape)?, elem_bytes])?;
        let place = Place::new(tensor.memory, tensor.start_byte, len_bytes)?;
        place.check_aligned(elem_bytes)?;
        Ok(Tensor { place, dtype: tensor.dtype })
    }

    /// Fails with `Mismatch` unless there are as many.
    pub(crate) fn check_holds(&self, n_elems: u64) -> Result<()> {
        self.place.check_holds(n_elems, self.dtype)
    }
}

/// How a weight lies in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Orientation {
    /// (out, in), PyTorch's.
    Rows,
    /// (in, out), Hugging Face's.
    Cols,
}

/// `y = weight · x + bias`.
#[derive(Clone, Copy)]
pub(crate) struct Linear<'m> {
    pub(crate) weight: Tensor<'m>,
    pub(crate) bias: Option<Tensor<'m>>, // (out)
    pub(crate) orientation: Orientation,
    pub(crate) n_in: u64,
    pub(crate) n_out: u64,
}

/// Scale and shift of a layer norm.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'m> {
    pub(crate) scale: Tensor<'m>, // (emb)
    pub(crate) shift: Tensor<'m>, // (emb)
}

/// The products of query, key and value.
pub(crate) enum Qkv<'m> {
    /// Side by side in one weight.
    Fused(Linear<'m>),
    /// Each on its own.
    Apart([Linear<'m>; 3]),
}

impl<'m> Qkv<'m> {
    pub(crate) fn layers(&self) -> &[Linear<'m>] {
        match self {
            Qkv::Fused(layer) => std::slice::from_ref(layer),
            Qkv::Apart(layers) => layers,
        }
    }
}

pub(crate) struct Block<'m> {
    pub(crate) norm1: Norm<'m>,
    pub(crate) qkv: Qkv<'m>,
    pub(crate) mask: Mask<'m>,
    pub(crate) output: Linear<'m>,
    pub(crate) norm2: Norm<'m>,
    pub(crate) up: Linear<'m>,
    pub(crate) down: Linear<'m>,
}

pub(crate) struct Weights<'m> {
    pub(crate) token_embedding: Tensor<'m>,    // (vocab, emb)
    pub(crate) position_embedding: Tensor<'m>, // (context, emb)
    pub(crate) blocks: Vec<Block<'m>>,
    pub(crate) final_norm: Norm<'m>,
    pub(crate) head: Linear<'m>,
}

impl<'m> Weights<'m> {
    /// Fails with `Mismatch` unless the tensors are exactly the model's, aligned, inside their memory, and all on the GPU
    /// of this number.
    pub(crate) fn find(
        tensors: &[GpuTensor<'m>],
        config: &Config,
        naming: Naming,
        ordinal: u32,
    ) -> Result<Weights<'m>> {
        check(tensors.iter().map(|it| (it.name, it.dtype, it.shape)), config, naming, &FLOATS)?;
        if let Some(stray) = tensors.iter().find(|it| it.memory.ordinal() != ordinal) {
            let found = format!("one on cuda:{}", stray.memory.ordinal());
            return Err(Fault::new(format!("every tensor on cuda:{ordinal}"), found)
                .tensor(stray.name)
                .hint("the forward pass takes one GPU; load the whole model to it")
                .mismatch());
        }
        let by_name = tensors.iter().map(|it| (it.name, it)).collect();
        let finder = Finder { by_name, naming, emb_dim: config.emb_dim as u64 };
        let token_embedding = finder.required(Role::TokenEmbedding, 0)?;
        let head = finder.optional(Role::Head, 0)?.unwrap_or(token_embedding);
        Ok(Weights {
            token_embedding,
            position_embedding: finder.required(Role::PositionEmbedding, 0)?,
            blocks: (0..config.n_layers).map(|it| finder.block(it)).collect::<Result<_>>()?,
            final_norm: finder.norm(Role::FinalNorm, 0)?,
            head: Linear {
                weight: head,
                bias: None,
                orientation: Orientation::Rows,
                n_in: config.emb_dim as u64,
                n_out: config.vocab_size as u64,
            },
        })
    }
}

struct Finder<'f, 'm> {
    by_name: HashMap<&'m str, &'f GpuTensor<'m>>,
    naming: Naming,
    emb_dim: u64,
}

impl<'m> Finder<'_, 'm> {
    fn block(&self, block: usize) -> Result<Block<'m>> {
        let emb = self.emb_dim;
        let linear = |role, n_in, n_out| self.linear(role, block, n_in, n_out);
        let qkv = match self.naming {
            Naming::Notebook => Qkv::Apart([
                linear(Role::Query, emb, emb)?,
                linear(Role::Key, emb, emb)?,
                linear(Role::Value, emb, emb)?,
            ]),
            Naming::HuggingFace { .. } => Qkv::Fused(linear(Role::Fused, emb, 3 * emb)?),
        };
        Ok(Block {
            norm1: self.norm(Role::Norm1, block)?,
            qkv,
            mask: self.optional(Role::Mask, block)?.map_or(Mask::Causal, Mask::Elements),
            output: linear(Role::Output, emb, emb)?,
            norm2: self.norm(Role::Norm2, block)?,
            up: linear(Role::Up, emb, 4 * emb)?,
            down: linear(Role::Down, 4 * emb, emb)?,
        })
    }

    fn linear(&self, role: fn(Part) -> Role, block: usize, n_in: u64, n_out: u64) -> Result<Linear<'m>> {
        let orientation = match self.naming {
            Naming::Notebook => Orientation::Rows,
            Naming::HuggingFace { .. } => Orientation::Cols,
        };
        let weight = self.required(role(Part::Weight), block)?;
        let bias = Some(self.required(role(Part::Bias), block)?);
        Ok(Linear { weight, bias, orientation, n_in, n_out })
    }

    fn norm(&self, role: fn(Part) -> Role, block: usize) -> Result<Norm<'m>> {
        Ok(Norm {
            scale: self.required(role(Part::Weight), block)?,
            shift: self.required(role(Part::Bias), block)?,
        })
    }

    fn required(&self, role: Role, block: usize) -> Result<Tensor<'m>> {
        let missing = || Fault::new(format!("a tensor for {role:?}"), "none").mismatch();
        self.optional(role, block)?.ok_or_else(missing)
    }

    fn optional(&self, role: Role, block: usize) -> Result<Option<Tensor<'m>>> {
        let Some(row) = self.naming.rows().iter().find(|row| row.role == role) else { return Ok(None) };
        let Some(tensor) = self.by_name.get(self.naming.name_of(row, block).as_str()) else {
            return Ok(None);
        };
        Tensor::new(tensor).map(Some).map_err(|error| error.in_tensor(tensor.name))
    }
}
