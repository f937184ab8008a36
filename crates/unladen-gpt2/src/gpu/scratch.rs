//! Memory on the GPU for what a forward pass computes on its way, taken once.

use super::{
    kernels::{TOKENS, product},
    weights::Place,
};
use crate::config::Config;
use unladen::{
    cuda::{Context, Memory},
    error::Result,
    memory::Reservation,
};

/// What the driver aligns memory to, and more than kernels ask for.
const ALIGN_BYTES: u64 = 256;

/// One range of memory, and where what stands in it.
pub(crate) struct Scratch {
    memory: Memory,
    layout: Layout,
}

/// Where each part starts, and how long it is, in bytes.
struct Layout {
    ids: [u64; 2],    // (tokens)
    x: [u64; 2],      // (groups, emb, 8)
    normed: [u64; 2], // (groups, emb, 8)
    wide: [u64; 2],   // (groups, 4 * emb, 8)
    logits: [u64; 2], // (1, vocab, 8)
    len_bytes: u64,
}

impl Layout {
    fn new(config: &Config, max_tokens: usize) -> Result<Layout> {
        const F32_BYTES: u64 = 4;
        let n_groups = (max_tokens as u64).div_ceil(TOKENS);
        let emb_dim = config.emb_dim as u64;
        let mut len_bytes = 0;
        let mut part = |sizes: &[u64]| -> Result<[u64; 2]> {
            let part_bytes = product(&[product(sizes)?, TOKENS, F32_BYTES])?;
            let start_byte = len_bytes;
            len_bytes = (start_byte + part_bytes).next_multiple_of(ALIGN_BYTES);
            Ok([start_byte, part_bytes])
        };
        Ok(Layout {
            ids: part(&[n_groups])?,
            x: part(&[n_groups, emb_dim])?,
            normed: part(&[n_groups, emb_dim])?,
            wide: part(&[n_groups, 4, emb_dim])?,
            logits: part(&[config.vocab_size as u64])?,
            len_bytes,
        })
    }
}

impl Scratch {
    /// For sequences of up to `max_tokens`. `reserve` counts the bytes.
    pub(crate) fn new(
        context: &Context,
        config: &Config,
        max_tokens: usize,
        reserve: impl FnOnce(u64) -> Reservation,
    ) -> Result<Scratch> {
        let layout = Layout::new(config, max_tokens)?;
        Ok(Scratch { memory: Memory::new(context, reserve(layout.len_bytes))?, layout })
    }

    /// The ids of the tokens.
    pub(crate) fn ids(&self) -> Result<Place<'_>> {
        self.place(self.layout.ids)
    }

    /// The residual stream, (groups, emb, 8).
    pub(crate) fn x(&self) -> Result<Place<'_>> {
        self.place(self.layout.x)
    }

    /// What comes of a layer norm, or of attention: (groups, emb, 8).
    pub(crate) fn normed(&self) -> Result<Place<'_>> {
        self.place(self.layout.normed)
    }

    /// Queries, keys and values, or the inner features of the two layers that widen and narrow: (groups, 4 · emb, 8).
    pub(crate) fn wide(&self) -> Result<Place<'_>> {
        self.place(self.layout.wide)
    }

    /// The logits of a group of tokens, (vocab, 8).
    pub(crate) fn logits(&self) -> Result<Place<'_>> {
        self.place(self.layout.logits)
    }

    fn place(&self, [start_byte, len_bytes]: [u64; 2]) -> Result<Place<'_>> {
        Place::new(&self.memory, start_byte, len_bytes)
    }
}

/// How many bytes [`Scratch::new`] will ask for.
pub(crate) fn scratch_bytes(config: &Config, max_tokens: usize) -> Result<u64> {
    Ok(Layout::new(config, max_tokens)?.len_bytes)
}
