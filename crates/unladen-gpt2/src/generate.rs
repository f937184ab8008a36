//! Greedy generation, a token at a time, with the keys and values of what was seen kept.

use crate::model::{Cache, Gpt2};
use unladen::error::Result;

/// New tokens, each computed when it is asked for. Made by [`Gpt2::generate`].
pub struct Generate<'g> {
    gpt2: &'g Gpt2<'g>,
    /// Kept keys and values. `None`: a mask lets tokens look ahead, so each new one changes what came before.
    cache: Option<Cache>,
    /// Not yet in the cache; without one, all.
    pending: Vec<u32>,
    n_left: usize,
    end: Option<u32>,
}

impl Gpt2<'_> {
    /// Continues `ids` by at most `n_new` tokens, each the likeliest; stops before `end` if that is the likeliest.
    ///
    /// Fails with `Mismatch` if `ids` is empty or holds an id outside the vocabulary, or all tokens together would be
    /// more than the context holds.
    pub fn generate(&self, ids: &[u32], n_new: usize, end: Option<u32>) -> Result<Generate<'_>> {
        self.config().check_ids(ids, n_new)?;
        let n_tokens = ids.len() + n_new;
        let cache = (!self.looks_ahead(n_tokens)).then(|| Cache::for_all_layers(self.config(), n_tokens));
        Ok(Generate { gpt2: self, cache, pending: ids.to_vec(), n_left: n_new, end })
    }
}

impl Iterator for Generate<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        self.n_left = self.n_left.checked_sub(1)?;
        let logits = match &mut self.cache {
            Some(cache) => {
                let logits = self.gpt2.forward_cached(&self.pending, cache);
                self.pending.clear();
                logits
            }
            None => self.gpt2.forward_last(&self.pending).ok()?,
        };
        let id = likeliest(&logits);
        if Some(id) == self.end {
            self.n_left = 0;
            return None;
        }
        self.pending.push(id);
        Some(id)
    }
}

/// The first of the largest logits.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (id as u32, logit);
        }
    }
    best.0
}
