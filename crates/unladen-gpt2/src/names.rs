//! The names and shapes of a GPT-2's tensors, in the two spellings that exist. One table each.

use crate::config::Config;
use Dim::{Context, Emb, FourEmb, ThreeEmb, Vocab};
use Part::{Bias, Weight};
use Presence::{Optional, Required};

/// Whose names the tensors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// The notebook's and its book's: `trf_blocks.0.att.W_query.weight`; linear weights are (out, in), masks are buffers.
    Notebook,
    /// Hugging Face's: `h.0.attn.c_attn.weight`; linear weights are (in, out), query, key and value are one tensor.
    HuggingFace {
        /// Names start with `transformer.`, all but that of the head.
        prefixed: bool,
    },
}

/// What a tensor is for. `Fused` is query, key and value side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    TokenEmbedding,
    PositionEmbedding,
    Mask,
    Query(Part),
    Key(Part),
    Value(Part),
    Fused(Part),
    Output(Part),
    Up(Part),
    Down(Part),
    Norm1(Part),
    Norm2(Part),
    FinalNorm(Part),
    Head,
}

/// Of a linear layer or a norm, whose scale counts as its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Weight,
    Bias,
}

/// A size of a shape, to be looked up in a [`Config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dim {
    Vocab,
    Context,
    Emb,
    ThreeEmb,
    FourEmb,
}

impl Dim {
    pub(crate) fn of(self, config: &Config) -> u64 {
        let emb_dim = config.emb_dim as u64;
        match self {
            Vocab => config.vocab_size as u64,
            Context => config.context_length as u64,
            Emb => emb_dim,
            ThreeEmb => 3 * emb_dim,
            FourEmb => 4 * emb_dim,
        }
    }
}

/// If a state dict may lack a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Required,
    Optional,
}

/// A tensor, or one per block if there is a `{}` in its name for the block's number.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) shape: &'static [Dim],
    pub(crate) role: Role,
    pub(crate) presence: Presence,
}

const fn row(name: &'static str, shape: &'static [Dim], role: Role, presence: Presence) -> Row {
    Row { name, shape, role, presence }
}

/// In the order of the notebook's state dict.
#[rustfmt::skip]
const NOTEBOOK: &[Row] = &[
    row("tok_emb.weight", &[Vocab, Emb], Role::TokenEmbedding, Required),
    row("pos_emb.weight", &[Context, Emb], Role::PositionEmbedding, Required),
    row("trf_blocks.{}.att.mask", &[Context, Context], Role::Mask, Optional),
    row("trf_blocks.{}.att.W_query.weight", &[Emb, Emb], Role::Query(Weight), Required),
    row("trf_blocks.{}.att.W_query.bias", &[Emb], Role::Query(Bias), Required),
    row("trf_blocks.{}.att.W_key.weight", &[Emb, Emb], Role::Key(Weight), Required),
    row("trf_blocks.{}.att.W_key.bias", &[Emb], Role::Key(Bias), Required),
    row("trf_blocks.{}.att.W_value.weight", &[Emb, Emb], Role::Value(Weight), Required),
    row("trf_blocks.{}.att.W_value.bias", &[Emb], Role::Value(Bias), Required),
    row("trf_blocks.{}.att.out_proj.weight", &[Emb, Emb], Role::Output(Weight), Required),
    row("trf_blocks.{}.att.out_proj.bias", &[Emb], Role::Output(Bias), Required),
    row("trf_blocks.{}.ff.layers.0.weight", &[FourEmb, Emb], Role::Up(Weight), Required),
    row("trf_blocks.{}.ff.layers.0.bias", &[FourEmb], Role::Up(Bias), Required),
    row("trf_blocks.{}.ff.layers.2.weight", &[Emb, FourEmb], Role::Down(Weight), Required),
    row("trf_blocks.{}.ff.layers.2.bias", &[Emb], Role::Down(Bias), Required),
    row("trf_blocks.{}.norm1.scale", &[Emb], Role::Norm1(Weight), Required),
    row("trf_blocks.{}.norm1.shift", &[Emb], Role::Norm1(Bias), Required),
    row("trf_blocks.{}.norm2.scale", &[Emb], Role::Norm2(Weight), Required),
    row("trf_blocks.{}.norm2.shift", &[Emb], Role::Norm2(Bias), Required),
    row("final_norm.scale", &[Emb], Role::FinalNorm(Weight), Required),
    row("final_norm.shift", &[Emb], Role::FinalNorm(Bias), Required),
    row("out_head.weight", &[Vocab, Emb], Role::Head, Required),
];

/// With every prefix there can be.
#[rustfmt::skip]
const HUGGING_FACE: &[Row] = &[
    row("transformer.wte.weight", &[Vocab, Emb], Role::TokenEmbedding, Required),
    row("transformer.wpe.weight", &[Context, Emb], Role::PositionEmbedding, Required),
    row("transformer.h.{}.ln_1.weight", &[Emb], Role::Norm1(Weight), Required),
    row("transformer.h.{}.ln_1.bias", &[Emb], Role::Norm1(Bias), Required),
    row("transformer.h.{}.attn.c_attn.weight", &[Emb, ThreeEmb], Role::Fused(Weight), Required),
    row("transformer.h.{}.attn.c_attn.bias", &[ThreeEmb], Role::Fused(Bias), Required),
    row("transformer.h.{}.attn.c_proj.weight", &[Emb, Emb], Role::Output(Weight), Required),
    row("transformer.h.{}.attn.c_proj.bias", &[Emb], Role::Output(Bias), Required),
    row("transformer.h.{}.ln_2.weight", &[Emb], Role::Norm2(Weight), Required),
    row("transformer.h.{}.ln_2.bias", &[Emb], Role::Norm2(Bias), Required),
    row("transformer.h.{}.mlp.c_fc.weight", &[Emb, FourEmb], Role::Up(Weight), Required),
    row("transformer.h.{}.mlp.c_fc.bias", &[FourEmb], Role::Up(Bias), Required),
    row("transformer.h.{}.mlp.c_proj.weight", &[FourEmb, Emb], Role::Down(Weight), Required),
    row("transformer.h.{}.mlp.c_proj.bias", &[Emb], Role::Down(Bias), Required),
    row("transformer.ln_f.weight", &[Emb], Role::FinalNorm(Weight), Required),
    row("transformer.ln_f.bias", &[Emb], Role::FinalNorm(Bias), Required),
    // Absent: tied to the token embedding.
    row("lm_head.weight", &[Vocab, Emb], Role::Head, Optional),
];

/// Buffers of older Hugging Face checkpoints: the causal mask and the number that stands for -inf in it.
const HUGGING_FACE_BUFFERS: &[&str] = &["transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"];

const PREFIX: &str = "transformer.";

impl Naming {
    /// Every spelling.
    pub(crate) const ALL: [Naming; 3] =
        [Naming::Notebook, Naming::HuggingFace { prefixed: true }, Naming::HuggingFace { prefixed: false }];

    /// The tensors, those of a block once.
    pub(crate) fn rows(self) -> &'static [Row] {
        match self {
            Naming::Notebook => NOTEBOOK,
            Naming::HuggingFace { .. } => HUGGING_FACE,
        }
    }

    /// A table's name as this spelling has it.
    fn spell(self, name: &str) -> &str {
        match self {
            Naming::HuggingFace { prefixed: false } => name.strip_prefix(PREFIX).unwrap_or(name),
            _ => name,
        }
    }

    /// A row's name, in a block if it is one of a block.
    pub(crate) fn name_of(self, row: &Row, block: usize) -> String {
        self.spell(row.name).replacen("{}", &block.to_string(), 1)
    }

    /// What a tensor of this name is: a row, and the number of its block if it is in one.
    pub(crate) fn parse(self, name: &str) -> Option<(&'static Row, Option<u64>)> {
        self.rows().iter().find_map(|row| Some((row, block_of(self.spell(row.name), name)?)))
    }

    /// True for buffers that the forward pass makes itself.
    pub(crate) fn ignores(self, name: &str) -> bool {
        let is_one = |it: &&str| block_of(self.spell(it), name).is_some();
        matches!(self, Naming::HuggingFace { .. }) && HUGGING_FACE_BUFFERS.iter().any(is_one)
    }

    /// Every tensor of a model, in the order of its state dict.
    pub(crate) fn tensors(self, config: Config) -> impl Iterator<Item = (&'static Row, String)> {
        let rows = self.rows();
        let is_outside = |it: &&Row| !it.name.contains("{}");
        let n_before = rows.iter().take_while(is_outside).count();
        let n_after = rows.iter().rev().take_while(is_outside).count();
        let (before, rest) = rows.split_at(n_before);
        let (inside, after) = rest.split_at(rest.len() - n_after);
        let blocks = (0..config.n_layers).flat_map(move |block| inside.iter().map(move |row| (row, block)));
        let outside = |it: &'static [Row]| it.iter().map(|row| (row, 0));
        outside(before)
            .chain(blocks)
            .chain(outside(after))
            .map(move |(row, block)| (row, self.name_of(row, block)))
    }
}

/// The number that stands in `name` for the `{}` of `pattern`; `Some(None)` if there is none and the two are equal.
fn block_of(pattern: &str, name: &str) -> Option<Option<u64>> {
    let Some((before, after)) = pattern.split_once("{}") else { return (pattern == name).then_some(None) };
    let digits = name.strip_prefix(before)?.strip_suffix(after)?;
    let number = digits.parse::<u64>().ok()?;
    // `+1` and `01` are numbers too, but not how a state dict spells them.
    (number.to_string() == digits).then_some(Some(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notebooks_xl_has_821_tensors_in_its_order() {
        let config = Config::named("xl").unwrap();
        let names: Vec<String> = Naming::Notebook.tensors(config).map(|(_, name)| name).collect();
        assert_eq!(names.len(), 821);
        assert_eq!(names[2], "trf_blocks.0.att.mask");
        assert_eq!(names[19], "trf_blocks.1.att.mask");
        assert_eq!(names[820], "out_head.weight");
    }

    #[test]
    fn every_name_is_parsed_back_and_oddly_spelled_ones_are_not() {
        let config = Config { n_layers: 11, ..Config::named("tiny").unwrap() };
        for naming in Naming::ALL {
            for (row, name) in naming.tensors(config) {
                let (found, _) = naming.parse(&name).unwrap();
                assert_eq!(found.role, row.role, "{name}");
            }
        }
        let parse = |name: &str| Naming::HuggingFace { prefixed: false }.parse(name).map(|(_, block)| block);
        assert_eq!(parse("h.10.ln_1.bias"), Some(Some(10)));
        assert_eq!(parse("h.010.ln_1.bias"), None);
        assert_eq!(parse("h.+1.ln_1.bias"), None);
        assert_eq!(parse("h.99999999999999999999.ln_1.bias"), None);
        assert_eq!(parse("transformer.wte.weight"), None);
        assert!(Naming::HuggingFace { prefixed: true }.ignores("transformer.h.3.attn.bias"));
    }
}
