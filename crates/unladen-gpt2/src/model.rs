//! The forward pass of GPT-2. The whole model is in this file.
//!
//! Activations are feature-major, `(emb, tokens)` with the tokens of a feature side by side: a weight is then read as it
//! lies in memory, whatever its orientation, and outputs are split over threads in whole rows.

use crate::{
    config::Config,
    math::{gelu, layer_norm, softmax},
    matmul::{Columns, Matrix, Target, multiply},
    names::Naming,
    parallel::{Threads, shares, split_rows},
    recognise::{recognise, tensors_of},
    weights::{Block, Linear, Mask, Weights},
};
use std::thread::available_parallelism;
use unladen::{StateDict, error::Result};

/// A GPT-2 whose weights lie in a state dict. Nothing is copied.
pub struct Gpt2<'a> {
    config: Config,
    weights: Weights<'a>,
    threads: Threads,
}

/// Keys and values of the tokens seen so far, per layer, with room for `capacity` tokens.
pub(crate) struct Cache {
    layers: Vec<[Vec<f32>; 2]>, // keys and values: (emb, capacity)
    capacity: usize,
    n_seen: usize,
}

impl Cache {
    /// For sequences that grow.
    pub(crate) fn for_all_layers(config: &Config, capacity: usize) -> Cache {
        Cache::new(config, capacity, config.n_layers)
    }

    /// For one pass over a whole sequence, which needs a layer's keys and values no longer than the layer runs.
    fn for_one_layer_at_a_time(config: &Config, capacity: usize) -> Cache {
        Cache::new(config, capacity, 1)
    }

    fn new(config: &Config, capacity: usize, n_layers: usize) -> Cache {
        let empty = || vec![0.0; config.emb_dim * capacity];
        let layers = (0..n_layers).map(|_| [empty(), empty()]).collect();
        Cache { layers, capacity, n_seen: 0 }
    }
}

impl<'a> Gpt2<'a> {
    /// Finds the weights.
    ///
    /// Fails with `Mismatch` unless the state dict holds exactly the tensors of the model, as `float32`; matrices may
    /// have any strides, vectors must be contiguous.
    pub fn new(state: &'a StateDict<'_>, config: Config, naming: Naming) -> Result<Gpt2<'a>> {
        let weights = Weights::find(state, &config, naming)?;
        let threads = Threads::new(available_parallelism().map_or(1, usize::from));
        Ok(Gpt2 { config, weights, threads })
    }

    /// [`recognise`]s the state dict, then as [`Gpt2::new`]. `None`: it is something else than a GPT-2.
    pub fn of(state: &'a StateDict<'_>, n_heads: Option<usize>) -> Result<Option<Gpt2<'a>>> {
        let recognised = recognise(tensors_of(state), n_heads)?;
        recognised.map(|(config, naming)| Gpt2::new(state, config, naming)).transpose()
    }

    /// With another number of threads than the machine has cores for this process. 0 counts as 1.
    pub fn with_threads(self, n_threads: usize) -> Gpt2<'a> {
        Gpt2 { threads: Threads::new(n_threads), ..self }
    }

    /// The sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The logits of every position, row-major `(tokens, vocab)`.
    ///
    /// Fails with `Mismatch` if `ids` is empty, longer than the context, or holds an id outside the vocabulary.
    pub fn forward(&self, ids: &[u32]) -> Result<Vec<f32>> {
        self.config.check_ids(ids, 0)?;
        Ok(self.threads.run(|| {
            let x = self.whole(ids); // (emb, tokens)
            let mut logits = vec![0.0; ids.len() * self.config.vocab_size]; // (tokens, vocab)
            self.head(&x, ids.len(), &mut logits);
            logits
        }))
    }

    /// The logits of the last position, `(vocab)`: what [`Gpt2::forward`] ends with, for less work.
    pub fn forward_last(&self, ids: &[u32]) -> Result<Vec<f32>> {
        self.config.check_ids(ids, 0)?;
        Ok(self.threads.run(|| self.last_logits(&self.whole(ids), ids.len())))
    }

    /// The logits of the last position of the tokens in `cache` and `ids` after them.
    pub(crate) fn forward_cached(&self, ids: &[u32], cache: &mut Cache) -> Vec<f32> {
        self.threads.run(|| {
            let x = self.blocks(ids, cache);
            self.last_logits(&x, ids.len())
        })
    }

    /// True if a query of the first `n_tokens` may see a key that comes after it, in any layer.
    pub(crate) fn looks_ahead(&self, n_tokens: usize) -> bool {
        let is_ahead = |mask: Mask<'_>, query: usize| {
            let mut scores = vec![0.0; n_tokens];
            mask.hide(query, &mut scores);
            scores[query + 1..].contains(&0.0)
        };
        let mut masks = self.weights.blocks.iter().map(|it| it.mask).filter(|it| !matches!(it, Mask::Causal));
        masks.any(|mask| (0..n_tokens).any(|query| is_ahead(mask, query)))
    }

    fn whole(&self, ids: &[u32]) -> Vec<f32> {
        self.blocks(ids, &mut Cache::for_one_layer_at_a_time(&self.config, ids.len()))
    }

    /// Everything but the head: `ids`, which come after the tokens in `cache`, to `(emb, tokens)`.
    fn blocks(&self, ids: &[u32], cache: &mut Cache) -> Vec<f32> {
        let tokens = ids.len();
        let emb_dim = self.config.emb_dim;
        let mut x = self.embed(ids, cache.n_seen); // (emb, tokens)
        let mut normed = vec![0.0; emb_dim * tokens]; // (emb, tokens)
        let mut mixed = vec![0.0; emb_dim * tokens]; // (emb, tokens)
        let mut hidden = vec![0.0; 4 * emb_dim * tokens]; // (4 * emb, tokens)
        let (n_seen, capacity, n_cached) = (cache.n_seen, cache.capacity, cache.layers.len());
        for (layer, block) in self.weights.blocks.iter().enumerate() {
            layer_norm(block.norm1, &x, &mut normed, tokens);
            let [keys, values] = &mut cache.layers[layer % n_cached];
            let attention = Attention { block, head_dim: self.config.head_dim(), tokens, n_seen, capacity };
            attention.run(&normed, keys, values, &mut mixed, &self.threads);
            self.linear(Target::Add, block.output, &mixed, tokens, &mut x, |_| ());

            layer_norm(block.norm2, &x, &mut normed, tokens);
            self.linear(Target::Overwrite, block.up, &normed, tokens, &mut hidden, gelu);
            self.linear(Target::Add, block.down, &hidden, tokens, &mut x, |_| ());
        }
        cache.n_seen += tokens;
        layer_norm(self.weights.final_norm, &x, &mut normed, tokens);
        normed
    }

    /// The sum of each token's embedding and its position's: `(emb, tokens)`.
    fn embed(&self, ids: &[u32], n_seen: usize) -> Vec<f32> {
        let mut x = vec![0.0; self.config.emb_dim * ids.len()];
        for (at, &id) in ids.iter().enumerate() {
            let token = self.weights.token_embedding.row(id as usize); // (emb)
            let position = self.weights.position_embedding.row(n_seen + at); // (emb)
            let column = x.iter_mut().skip(at).step_by(ids.len());
            column.zip(token.zip(position)).for_each(|(x, (token, position))| *x = token + position);
        }
        x
    }

    /// `y = then(layer(x))`, or `y += layer(x)`: `(in, tokens)` to `(out, tokens)`, outputs split over threads.
    fn linear(
        &self,
        into: Target,
        layer: Linear<'_>,
        x: &[f32],
        tokens: usize,
        y: &mut [f32],
        then: fn(&mut [f32]),
    ) {
        let [_, n_in] = layer.weight.shape();
        let x = Columns::new(Matrix::rows(x, [n_in, tokens], tokens));
        let n_shares = n_shares(layer, &self.threads);
        self.threads.for_each(split_rows(y, tokens, 1, n_shares), |(outputs, y)| {
            apply(into, layer.outputs(outputs), &x, y, tokens);
            then(y);
        });
    }

    /// The logits: `(emb, tokens)` to `(tokens, vocab)`, the vocabulary split over threads.
    fn head(&self, x: &[f32], tokens: usize, logits: &mut [f32]) {
        /// Tokens of the vocabulary whose logits are computed feature-major, then turned while they are in the cache.
        const N_TURNED: usize = 256;
        let head = self.weights.head; // (vocab, emb)
        let [vocab_size, emb_dim] = head.shape();
        let x = Columns::new(Matrix::rows(x, [emb_dim, tokens], tokens));
        let mut rests: Vec<&mut [f32]> = logits.chunks_exact_mut(vocab_size).collect(); // tokens × (rest of vocab)
        let tasks: Vec<_> = shares(vocab_size, SHARES_PER_THREAD * self.threads.n())
            .map(|vocab| {
                let rows: Vec<_> =
                    rests.iter_mut().filter_map(|it| it.split_off_mut(..vocab.len())).collect();
                (vocab, rows)
            })
            .collect();
        self.threads.for_each(tasks.into_iter(), |(vocab, mut rows)| {
            let mut turned = vec![0.0; N_TURNED * tokens]; // (some of vocab, tokens)
            for start in vocab.clone().step_by(N_TURNED) {
                let part = start..vocab.end.min(start + N_TURNED);
                let weight = head.slice_rows(part.clone());
                multiply(Target::Overwrite, &mut turned, tokens, 1.0, weight, &x);
                for (token, row) in rows.iter_mut().enumerate() {
                    let row = &mut row[part.start - vocab.start..part.end - vocab.start];
                    let column = turned.iter().skip(token).step_by(tokens);
                    row.iter_mut().zip(column).for_each(|(to, from)| *to = *from);
                }
            }
        });
    }

    fn last_logits(&self, x: &[f32], tokens: usize) -> Vec<f32> {
        let last: Vec<f32> = x.iter().skip(tokens - 1).step_by(tokens).copied().collect(); // (emb, 1)
        let mut logits = vec![0.0; self.config.vocab_size]; // (1, vocab)
        self.head(&last, 1, &mut logits);
        logits
    }
}

/// Parts for each thread, so that one that is held up leaves some of its parts to the others.
const SHARES_PER_THREAD: usize = 4;

/// Into how many parts the outputs of a layer are cut.
fn n_shares(layer: Linear<'_>, threads: &Threads) -> usize {
    // Where an output's weights do not lie side by side, a part is a piece of every row: long pieces are read faster.
    if layer.weight.has_contiguous_rows() { SHARES_PER_THREAD * threads.n() } else { threads.n() }
}

/// `y = layer(x)`, or `y += layer(x)`, on this thread: `(in, tokens)` to `(out, tokens)`, rows of `y` `y_step` apart.
fn apply(into: Target, layer: Linear<'_>, x: &Columns<'_>, y: &mut [f32], y_step: usize) {
    let [_, tokens] = x.shape();
    for (row, &bias) in y.chunks_mut(y_step).zip(layer.bias) {
        let row = &mut row[..tokens];
        match into {
            Target::Overwrite => row.fill(bias),
            Target::Add => row.iter_mut().for_each(|it| *it += bias),
        }
    }
    multiply(Target::Add, y, y_step, 1.0, layer.weight, x);
}

/// Self-attention of `tokens` new tokens over them and the `n_seen` before.
struct Attention<'b, 'a> {
    block: &'b Block<'a>,
    head_dim: usize,
    tokens: usize,
    n_seen: usize,
    capacity: usize,
}

impl Attention<'_, '_> {
    /// From the normed `x` to the heads' mixed values, both `(emb, tokens)`, the heads split over threads; the new keys
    /// and values, `(emb, capacity)`, come to stand after those that were seen.
    fn run(&self, x: &[f32], keys: &mut [f32], values: &mut [f32], mixed: &mut [f32], threads: &Threads) {
        let x = Columns::new(Matrix::rows(x, [self.block.query.weight.shape()[1], self.tokens], self.tokens));
        let n_shares = n_shares(self.block.query, threads);
        let split = |rows, row_len| split_rows(rows, row_len, self.head_dim, n_shares);
        let kept = split(keys, self.capacity).zip(split(values, self.capacity));
        threads.for_each(
            kept.zip(split(mixed, self.tokens)),
            |(((heads, keys), (_, values)), (_, mixed))| {
                let features = heads.start * self.head_dim..heads.end * self.head_dim;
                self.some_heads(features, &x, keys, values, mixed);
            },
        );
    }

    /// The heads that compute `features`; `keys`, `values` and `mixed` hold their rows only.
    fn some_heads(
        &self,
        features: std::ops::Range<usize>,
        x: &Columns<'_>,
        keys: &mut [f32],
        values: &mut [f32],
        mixed: &mut [f32],
    ) {
        let &Attention { block, head_dim, tokens, n_seen, capacity } = self;
        let n_keys = n_seen + tokens;
        let mut queries = vec![0.0; features.len() * tokens]; // (features, tokens)
        let into = Target::Overwrite;
        apply(into, block.query.outputs(features.clone()), x, &mut queries, tokens);
        apply(into, block.key.outputs(features.clone()), x, &mut keys[n_seen..], capacity);
        apply(into, block.value.outputs(features.clone()), x, &mut values[n_seen..], capacity);

        let factor = 1.0 / (head_dim as f32).sqrt();
        let mut scores = vec![0.0; tokens * n_keys]; // (tokens, keys)
        for head in 0..features.len() / head_dim {
            let first = head * head_dim;
            let query = Matrix::rows(&queries[first * tokens..], [head_dim, tokens], tokens);
            let key = Matrix::rows(&keys[first * capacity..], [head_dim, n_keys], capacity);
            let value = Matrix::rows(&values[first * capacity..], [head_dim, n_keys], capacity);
            multiply(Target::Overwrite, &mut scores, n_keys, factor, query.transposed(), &Columns::new(key));
            for (token, row) in scores.chunks_exact_mut(n_keys).enumerate() {
                block.mask.hide(n_seen + token, row);
                softmax(row);
            }
            let scores = Matrix::rows(&scores, [tokens, n_keys], n_keys);
            let mixed = &mut mixed[first * tokens..(first + head_dim) * tokens];
            multiply(Target::Overwrite, mixed, tokens, 1.0, value, &Columns::new(scores.transposed()));
        }
    }
}
