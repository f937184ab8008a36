//! The sizes of a GPT-2.

use unladen::error::{Fault, Result};

/// The numbers that fix the shape of every tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Most tokens that a sequence may have.
    pub context_length: usize,
    /// Width of the residual stream.
    pub emb_dim: usize,
    /// Number of transformer blocks.
    pub n_layers: usize,
    /// Attention heads of a block; they share `emb_dim` evenly.
    pub n_heads: usize,
}

/// The sizes with names. `emb_dim` is different in each, so it tells the number of heads.
const SIZES: &[Size] = &[
    Size { name: "tiny", emb_dim: 64, n_layers: 2, n_heads: 4 },
    Size { name: "small", emb_dim: 768, n_layers: 12, n_heads: 12 },
    Size { name: "medium", emb_dim: 1024, n_layers: 24, n_heads: 16 },
    Size { name: "large", emb_dim: 1280, n_layers: 36, n_heads: 20 },
    Size { name: "xl", emb_dim: 1600, n_layers: 48, n_heads: 25 },
];

struct Size {
    name: &'static str,
    emb_dim: usize,
    n_layers: usize,
    n_heads: usize,
}

/// No size of a model is larger, so that no product of two sizes and a small number overflows.
const MAX_SIZE: usize = 1 << 28;

impl Config {
    /// A size by its name, with GPT-2's vocabulary and context. `None`: not one of [`Config::names`].
    pub fn named(name: &str) -> Option<Config> {
        let &Size { emb_dim, n_layers, n_heads, .. } = SIZES.iter().find(|it| it.name == name)?;
        Some(Config { vocab_size: 50257, context_length: 1024, emb_dim, n_layers, n_heads })
    }

    /// The names, smallest first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SIZES.iter().map(|it| it.name)
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.emb_dim / self.n_heads
    }

    /// The number of heads of the named size with this width.
    pub(crate) fn n_heads_by_emb_dim(emb_dim: usize) -> Option<usize> {
        SIZES.iter().find(|it| it.emb_dim == emb_dim).map(|it| it.n_heads)
    }

    /// Fails with `Mismatch` if a size is zero or absurdly large, or the heads do not share the width evenly.
    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("context_length", self.context_length),
            ("emb_dim", self.emb_dim),
            ("n_layers", self.n_layers),
            ("n_heads", self.n_heads),
        ];
        if let Some((name, size)) = sizes.iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
            let expected = format!("a GPT-2 with {name} from 1 to {MAX_SIZE}");
            return Err(Fault::new(expected, size.to_string()).mismatch());
        }
        if !self.emb_dim.is_multiple_of(self.n_heads) {
            let expected = format!("a number of heads that divides emb_dim {}", self.emb_dim);
            return Err(Fault::new(expected, self.n_heads.to_string())
                .hint("`n_head` stands in the model's config.json")
                .mismatch());
        }
        Ok(())
    }

    /// Fails with `Mismatch` unless the model can take `ids` and `n_new` more.
    pub(crate) fn check_ids(&self, ids: &[u32], n_new: usize) -> Result<()> {
        let &Config { vocab_size, context_length, .. } = self;
        let n_tokens = ids.len().saturating_add(n_new);
        if ids.is_empty() {
            return Err(Fault::new("at least one token", "none").hint("give some text").mismatch());
        }
        if n_tokens > context_length {
            let expected = format!("at most {context_length} tokens, the model's context");
            return Err(Fault::new(expected, n_tokens.to_string()).hint("give fewer tokens").mismatch());
        }
        match ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
            Some((at, id)) => Err(Fault::new(
                format!("token ids below {vocab_size}, the model's vocabulary"),
                format!("{id} at position {at}"),
            )
            .hint("the text was tokenised for another model")
            .mismatch()),
            None => Ok(()),
        }
    }
}

/// Keys of `config.json` that change the forward pass, and the values with which it is the one of this crate. A key that
/// is absent has the first value.
const FORWARD_KEYS: &[(&str, &[&str])] = &[
    ("model_type", &["\"gpt2\""]),
    ("activation_function", &["\"gelu_new\"", "\"gelu_pytorch_tanh\""]),
    ("layer_norm_epsilon", &["1e-5", "1e-05", "0.00001"]),
    ("scale_attn_weights", &["true"]),
    ("scale_attn_by_inverse_layer_idx", &["false"]),
    ("add_cross_attention", &["false"]),
];

const WITHOUT_CONFIG: &str = "mend the file, or give the number of heads (--heads) and it is not asked";

/// The number of heads in the `config.json` of a Hugging Face model. `None`: it does not say.
///
/// Fails with `Corrupt` if the text is no JSON object, and with `Unsupported` if the model is computed otherwise than
/// here (another activation, another scale), which its tensors would not show.
pub fn n_heads_from_config_json(text: &str) -> Result<Option<usize>> {
    let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)
        .map_err(|error| Fault::new("a JSON object", error.to_string()).hint(WITHOUT_CONFIG).corrupt())?;
    for &(key, values) in FORWARD_KEYS {
        let found = json.get(key).map(|it| it.to_string());
        let is_known = |found: &String| {
            let number = found.parse::<f64>().ok();
            values.iter().any(|it| it == found || number.is_some_and(|number| it.parse() == Ok(number)))
        };
        if let Some(found) = found.filter(|it| !is_known(it)) {
            return Err(Fault::new(format!("a GPT-2 with \"{key}\": {}", values[0]), found)
                .hint("such a model loads, but its forward pass is not here")
                .unsupported());
        }
    }
    let Some(n_heads) = json.get("n_head") else { return Ok(None) };
    let number = n_heads.as_u64().and_then(|it| usize::try_from(it).ok());
    let wrong = || Fault::new("a number as \"n_head\"", n_heads.to_string()).hint(WITHOUT_CONFIG).corrupt();
    number.map(Some).ok_or_else(wrong)
}

/// True if the `config.json` of a Hugging Face model says that its head is the token embedding, or says nothing.
///
/// Fails like [`n_heads_from_config_json`].
pub fn ties_head_in_config_json(text: &str) -> Result<bool> {
    let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)
        .map_err(|error| Fault::new("a JSON object", error.to_string()).hint(WITHOUT_CONFIG).corrupt())?;
    Ok(json.get("tie_word_embeddings").is_none_or(|it| it != false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_of_named_sizes_are_different_and_shared_evenly() {
        for name in Config::names() {
            let config = Config::named(name).unwrap();
            config.check().unwrap();
            assert_eq!(Config::n_heads_by_emb_dim(config.emb_dim), Some(config.n_heads));
        }
        assert_eq!(Config::named("gigantic"), None);
    }

    #[test]
    fn a_config_json_gives_the_heads_unless_its_forward_pass_is_another() {
        let n_heads = n_heads_from_config_json;
        assert_eq!(n_heads(r#"{"n_head": 25, "layer_norm_epsilon": 0.00001}"#).unwrap(), Some(25));
        assert_eq!(n_heads("{}").unwrap(), None);
        assert_eq!(n_heads(r#"{"n_head": -1}"#).unwrap_err().kind(), "Corrupt");
        assert_eq!(n_heads("[]").unwrap_err().kind(), "Corrupt");
        let error = n_heads(r#"{"n_head": 4, "activation_function": "relu"}"#).unwrap_err();
        assert_eq!(error.kind(), "Unsupported");
        assert!(error.to_string().contains("relu"), "{error}");
        assert!(n_heads(r#"{"scale_attn_by_inverse_layer_idx": true}"#).is_err());
        assert!(n_heads(r#"{"layer_norm_epsilon": 1e-6}"#).is_err());
        assert!(ties_head_in_config_json("{}").unwrap());
        assert!(!ties_head_in_config_json(r#"{"tie_word_embeddings": false}"#).unwrap());
    }
}
