//! The forward pass of GPT-2 on a GPU. As in the host's, the whole model is in this file.
//!
//! Activations are (groups, features, 8), the features of 8 tokens side by side, so that a weight is read once for all 8.

use super::{
    kernels::{Heads, Kernels, TOKENS, Then},
    scratch::{Scratch, scratch_bytes},
    weights::{Block, GpuTensor, Weights},
};
use crate::{config::Config, names::Naming};
use unladen::{
    DType,
    error::{Fault, Result},
    memory::Reservation,
};

/// A GPT-2 whose weights lie on a GPU. They are not copied.
pub struct GpuModel<'m> {
    config: Config,
    kernels: &'m Kernels,
    weights: Weights<'m>,
    scratch: Scratch,
    max_tokens: usize,
}

impl<'m> GpuModel<'m> {
    /// Finds the weights, and takes the memory for sequences of up to `max_tokens`, which `reserve` counts.
    ///
    /// Fails with `Mismatch` unless the tensors are exactly those of the model, in `float32`, `float16` or `bfloat16` (a
    /// mask may be of booleans), aligned for their type, and on the kernels' GPU.
    pub fn new(
        kernels: &'m Kernels,
        tensors: &[GpuTensor<'m>],
        config: Config,
        naming: Naming,
        max_tokens: usize,
        reserve: impl FnOnce(u64) -> Reservation,
    ) -> Result<GpuModel<'m>> {
        let weights = Weights::find(tensors, &config, naming, kernels.context().ordinal())?;
        let scratch = Scratch::new(kernels.context(), &config, max_tokens, reserve)?;
        Ok(GpuModel { config, kernels, weights, scratch, max_tokens })
    }

    /// How many bytes [`GpuModel::new`] will take on the GPU, besides the weights.
    pub fn scratch_bytes(config: &Config, max_tokens: usize) -> Result<u64> {
        scratch_bytes(config, max_tokens)
    }

    /// The sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The logits of every position, row-major `(tokens, vocab)`.
    ///
    /// Fails with `Mismatch` if `ids` is empty, longer than the context or than `max_tokens`, or holds an id outside the
    /// vocabulary.
    pub fn forward(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.logits(ids, 0)
    }

    /// The logits of the last position, `(vocab)`: what [`GpuModel::forward`] ends with, for less work.
    pub fn forward_last(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.logits(ids, ids.len().saturating_sub(1))
    }

    /// The logits from the position `first` on: `(tokens - first, vocab)`.
    fn logits(&mut self, ids: &[u32], first: usize) -> Result<Vec<f32>> {
        self.config.check_ids(ids, 0)?;
        if ids.len() > self.max_tokens {
            let expected = format!("at most {} tokens, for which memory was taken", self.max_tokens);
            return Err(Fault::new(expected, ids.len().to_string()).mismatch());
        }
        let logits = self.launch_all(ids, first);
        if logits.is_err() {
            // Kernels may be running still, and whoever owns the weights may free them: the error that is there already
            // says more than another one would.
            let _ = self.kernels.context().synchronize();
        }
        logits
    }

    /// Launches the whole pass, and reads what comes of it, which waits for it.
    fn launch_all(&self, ids: &[u32], first: usize) -> Result<Vec<f32>> {
        let emb_dim = self.config.emb_dim as u64;
        let n_tokens = ids.len() as u64;
        let n_groups = n_tokens.div_ceil(TOKENS);
        let (x, normed) = (self.scratch.x()?, self.scratch.normed()?);
        let embeddings = [self.weights.token_embedding, self.weights.position_embedding];
        self.kernels.embed(x, ids, self.scratch.ids()?, embeddings, emb_dim)?;
        for block in &self.weights.blocks {
            self.block(block, n_tokens)?;
        }
        self.kernels.layer_norm(normed, x, self.weights.final_norm, emb_dim, n_groups)?;

        let vocab_size = self.config.vocab_size;
        let (group_tokens, logits_on_gpu) = (TOKENS as usize, self.scratch.logits()?);
        let mut logits = Vec::with_capacity((ids.len() - first) * vocab_size); // (tokens - first, vocab)
        let mut turned = vec![0; vocab_size * group_tokens * size_of::<f32>()]; // (vocab, 8)
        for group in first / group_tokens..ids.len().div_ceil(group_tokens) {
            let normed = normed.skip(group as u64 * emb_dim * TOKENS, DType::F32)?;
            let target = (logits_on_gpu, vocab_size as u64, 0);
            self.kernels.multiply(&self.weights.head, target, normed, 1, Then::Replace)?;
            logits_on_gpu.read(&mut turned)?;
            let tokens = group * group_tokens..ids.len().min((group + 1) * group_tokens);
            for token in tokens.filter(|&it| it >= first) {
                let numbers = turned.as_chunks().0.iter().skip(token % group_tokens).step_by(group_tokens);
                logits.extend(numbers.map(|&it| f32::from_le_bytes(it)));
            }
        }
        Ok(logits)
    }

    fn block(&self, block: &Block<'_>, n_tokens: u64) -> Result<()> {
        let kernels = self.kernels;
        let emb_dim = self.config.emb_dim as u64;
        let n_groups = n_tokens.div_ceil(TOKENS);
        let (x, normed, wide) = (self.scratch.x()?, self.scratch.normed()?, self.scratch.wide()?);
        let heads = Heads {
            n_heads: self.config.n_heads as u64,
            head_dim: self.config.head_dim() as u64,
            context_length: self.config.context_length as u64,
        };
        kernels.layer_norm(normed, x, block.norm1, emb_dim, n_groups)?;
        let mut first_feature = 0;
        for layer in block.qkv.layers() {
            kernels.multiply(layer, (wide, 3 * emb_dim, first_feature), normed, n_groups, Then::Replace)?;
            first_feature += layer.n_out;
        }
        let mixed = normed; // its place: what was normed is used up
        kernels.attention(mixed, wide, block.mask, heads, n_tokens)?;
        kernels.multiply(&block.output, (x, emb_dim, 0), mixed, n_groups, Then::Add)?;

        kernels.layer_norm(normed, x, block.norm2, emb_dim, n_groups)?;
        kernels.multiply(&block.up, (wide, 4 * emb_dim, 0), normed, n_groups, Then::Gelu)?;
        kernels.multiply(&block.down, (x, emb_dim, 0), wide, n_groups, Then::Add)
    }
}
