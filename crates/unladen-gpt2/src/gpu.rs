//! GPT-2's forward pass on a GPU, with the weights where they were loaded: the proof that they are the weights there, too.
//!
//! It needs the driver and nothing else. What is multiplied is widened to `float32` on the way, and all sums are
//! `float32`; the weights may be of 16 bits. The logits are the host's but for the order of the sums.
//!
//! ```no_run
//! use unladen::{Device, cuda::Context, memory::{Ledger, Space}};
//! use unladen_gpt2::gpu::{GpuModel, GpuTensor, Kernels, recognise};
//!
//! # fn loaded() -> Vec<GpuTensor<'static>> { Vec::new() }
//! let context = Context::open(0)?;
//! let kernels = Kernels::load(&context)?; // can be done while the weights are loaded
//! let tensors: Vec<GpuTensor<'_>> = loaded();
//!
//! let listed = tensors.iter().map(|it| (it.name, it.dtype, it.shape));
//! let (config, naming) = recognise(listed, None)?.expect("a GPT-2");
//! let ledger = Ledger::new();
//! let reserve = |len_bytes| ledger.reserve(Space::Device(Device::Cuda(0)), len_bytes);
//! let mut model = GpuModel::new(&kernels, &tensors, config, naming, 64, reserve)?;
//! let logits = model.forward_last(&[1, 2, 3])?; // (vocab)
//! # Ok::<(), unladen::Error>(())
//! ```

mod kernels;
mod model;
mod scratch;
mod weights;

pub use kernels::Kernels;
pub use model::GpuModel;
pub use weights::GpuTensor;

use crate::{
    config::Config,
    names::Naming,
    recognise::{Floats, Listed, recognise_with},
};
use unladen::{DType, error::Result};

/// What the kernels take.
const FLOATS: Floats = Floats {
    dtypes: &[DType::F32, DType::F16, DType::BF16],
    spelled: "float32, float16 or bfloat16",
    hint: "the forward pass on a GPU takes these three: cast on the way, as with --dtype f32",
};

/// As [`crate::recognise`], of weights that may be 16-bit floats.
pub fn recognise<'t>(
    tensors: impl IntoIterator<Item = Listed<'t>>,
    n_heads: Option<usize>,
) -> Result<Option<(Config, Naming)>> {
    recognise_with(tensors, n_heads, &FLOATS)
}
