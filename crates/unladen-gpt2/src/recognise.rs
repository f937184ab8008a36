//! Tells from names and shapes alone if tensors are a GPT-2, and checks every one of them.

use crate::{
    config::Config,
    names::{Naming, Presence, Role, Row},
};
use std::collections::{BTreeSet, HashMap};
use unladen::{
    DType, StateDict,
    error::{Fault, Result},
};

/// The types that a forward pass takes weights in.
pub(crate) struct Floats {
    pub(crate) dtypes: &'static [DType],
    /// As errors name them.
    pub(crate) spelled: &'static str,
    /// For those who have another one.
    pub(crate) hint: &'static str,
}

/// What the host computes with.
pub(crate) const HOST_FLOATS: Floats = Floats {
    dtypes: &[DType::F32],
    spelled: "float32",
    hint: "the forward pass on the host takes no other: cast on the way, as with --dtype f32",
};

/// A tensor as far as it is known before a load: its name, dtype and shape.
pub type Listed<'a> = (&'a str, DType, &'a [u64]);

/// What [`recognise`] wants to know of a state dict.
pub fn tensors_of<'s>(state: &'s StateDict<'_>) -> impl Iterator<Item = Listed<'s>> {
    state.iter().map(|(name, view)| (name, view.dtype, view.shape))
}

/// Tells which GPT-2 the tensors are. `None`: they are something else altogether.
///
/// The number of heads cannot be seen in shapes: it is `n_heads` if given, or that of the named size of the same width.
/// Fails with `Mismatch` if the tensors are those of a GPT-2, but one is missing, too many, or of another shape or dtype.
pub fn recognise<'t>(
    tensors: impl IntoIterator<Item = Listed<'t>>,
    n_heads: Option<usize>,
) -> Result<Option<(Config, Naming)>> {
    recognise_with(tensors, n_heads, &HOST_FLOATS)
}

/// As [`recognise`], for a forward pass that takes other types.
pub(crate) fn recognise_with<'t>(
    tensors: impl IntoIterator<Item = Listed<'t>>,
    n_heads: Option<usize>,
    floats: &Floats,
) -> Result<Option<(Config, Naming)>> {
    let tensors: Vec<Listed<'_>> = tensors.into_iter().collect();
    let Some(naming) = naming_of(&tensors) else { return Ok(None) };
    let config = config_of(&tensors, naming, n_heads)?;
    check(tensors, &config, naming, floats)?;
    Ok(Some((config, naming)))
}

/// The spelling in which most tensors are a GPT-2's, if these are at least half of all and attention is among them.
///
/// Other models share a name or two (`lm_head.weight`); a GPT-2 with something missing still has most of its names.
fn naming_of(tensors: &[Listed<'_>]) -> Option<Naming> {
    let count = |naming: Naming| {
        let roles = tensors.iter().filter_map(move |(name, ..)| Some(naming.parse(name)?.0.role));
        let is_attention = |role: Role| matches!(role, Role::Query(_) | Role::Key(_) | Role::Fused(_));
        let (n_known, n_attention) = roles
            .fold((0, 0), |(known, attention), it| (known + 1, attention + usize::from(is_attention(it))));
        let n_ignored = tensors.iter().filter(|(name, ..)| naming.ignores(name)).count();
        if n_attention > 0 && 2 * (n_known + n_ignored) >= tensors.len() { n_known } else { 0 }
    };
    let (n_known, naming) =
        Naming::ALL.map(|naming| (count(naming), naming)).into_iter().max_by_key(|it| it.0)?;
    (n_known > 0).then_some(naming)
}

/// Reads the sizes from the embeddings' shapes and the blocks' numbers.
fn config_of(tensors: &[Listed<'_>], naming: Naming, n_heads: Option<usize>) -> Result<Config> {
    let embedding = |wanted: Role| {
        let row = row_of(naming, wanted);
        let name = naming.name_of(row, 0);
        let expected = "a shape of two sizes";
        match tensors.iter().find(|(found, ..)| *found == name) {
            Some(&(_, _, &[len, width])) => Ok([to_size(len), to_size(width)]),
            Some((_, _, shape)) => Err(Fault::new(expected, format!("{shape:?}")).tensor(name).mismatch()),
            None => Err(missing(name, expected.to_owned())),
        }
    };
    let [vocab_size, emb_dim] = embedding(Role::TokenEmbedding)?;
    let [context_length, _] = embedding(Role::PositionEmbedding)?;
    let blocks: BTreeSet<u64> = tensors.iter().filter_map(|(name, ..)| naming.parse(name)?.1).collect();
    // Counted, not taken from the last number: a name that claims block 10^15 makes the check find the gap before it.
    let n_layers = blocks.len();
    let n_heads = n_heads.or_else(|| Config::n_heads_by_emb_dim(emb_dim)).ok_or_else(|| {
        Fault::new(
            "a number of heads",
            format!("none known for emb_dim {emb_dim}, and shapes do not show it"),
        )
        .hint("give the number of heads (--heads); it is `n_head` in the model's config.json")
        .mismatch()
    })?;
    let config = Config { vocab_size, context_length, emb_dim, n_layers, n_heads };
    config.check()?;
    Ok(config)
}

/// Too large a size becomes one that [`Config::check`] refuses.
fn to_size(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Fails with `Mismatch` unless the tensors are exactly those of the model: names, shapes and dtypes.
pub(crate) fn check<'t>(
    tensors: impl IntoIterator<Item = Listed<'t>>,
    config: &Config,
    naming: Naming,
    floats: &Floats,
) -> Result<()> {
    config.check()?;
    let mut found: HashMap<&str, (DType, &[u64])> =
        tensors.into_iter().map(|(name, dtype, shape)| (name, (dtype, shape))).collect();
    for (row, name) in naming.tensors(*config) {
        let shape: Vec<u64> = row.shape.iter().map(|it| it.of(config)).collect();
        match found.remove(name.as_str()) {
            Some((dtype, found)) if found != shape || !is_accepted(row, dtype, floats) => {
                let fault = Fault::new(format!("{} {shape:?}", floats.spelled), format!("{dtype} {found:?}"))
                    .tensor(name);
                let is_dtype = found == shape;
                let hint = if is_dtype {
                    floats.hint
                } else {
                    "the embeddings and the blocks come from models of different sizes"
                };
                return Err(fault.hint(hint).mismatch());
            }
            None if row.presence == Presence::Required => {
                return Err(missing(name, format!("{} {shape:?}", floats.spelled)));
            }
            _ => {}
        }
    }
    // The smallest name, so that the same tensors always give the same message.
    let Some(name) = found.into_keys().filter(|name| !naming.ignores(name)).min() else { return Ok(()) };
    let expected = format!("only the tensors of a GPT-2 with {} blocks", config.n_layers);
    Err(Fault::new(expected, "one more").tensor(name).mismatch())
}

/// Masks are compared with zero only, so they may be booleans, as later versions of the notebook's model have them.
fn is_accepted(row: &Row, dtype: DType, floats: &Floats) -> bool {
    floats.dtypes.contains(&dtype) || (row.role == Role::Mask && dtype == DType::Bool)
}

fn missing(name: String, expected: String) -> unladen::Error {
    Fault::new(expected, "no such tensor")
        .tensor(name)
        .hint("the checkpoint is incomplete; find its other part")
        .mismatch()
}

/// The row of a role that every naming has.
fn row_of(naming: Naming, role: Role) -> &'static Row {
    naming.rows().iter().find(|row| row.role == role).expect("a role of both tables")
}
