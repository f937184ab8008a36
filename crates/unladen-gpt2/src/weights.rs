//! Finds every weight of a model in a state dict, once, and sees it as what it is: a matrix or a vector, in place.

use crate::{
    config::Config,
    matmul::Matrix,
    names::{Naming, Part, Role},
    recognise::{HOST_FLOATS, check, tensors_of},
};
use std::ops::Range;
use unladen::{
    DType, StateDict, TensorView,
    error::{Fault, Result},
};

/// `y = weight · x + bias`, whatever the weight's strides are.
#[derive(Clone, Copy)]
pub(crate) struct Linear<'a> {
    pub(crate) weight: Matrix<'a>, // (out, in)
    pub(crate) bias: &'a [f32],    // (out)
}

impl Linear<'_> {
    /// The layer that computes some of the outputs.
    pub(crate) fn outputs(self, range: Range<usize>) -> Self {
        Linear { weight: self.weight.slice_rows(range.clone()), bias: &self.bias[range] }
    }
}

/// Scale and shift of a layer norm.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) scale: &'a [f32], // (emb)
    pub(crate) shift: &'a [f32], // (emb)
}

/// Which keys a query may not see: where an element is not zero.
#[derive(Clone, Copy)]
pub(crate) enum Mask<'a> {
    /// Those that come after it.
    Causal,
    /// Numbers of a buffer, queries by keys.
    Numbers(Matrix<'a>),
    /// Booleans of a buffer, and the steps from a query and from a key to the next.
    Booleans(&'a [u8], [usize; 2]),
}

impl Mask<'_> {
    /// Makes the scores of the keys that the query may not see -inf.
    pub(crate) fn hide(&self, query: usize, scores: &mut [f32]) {
        let hide_if = |(score, is_hidden): (&mut f32, bool)| {
            if is_hidden {
                *score = f32::NEG_INFINITY;
            }
        };
        match *self {
            Mask::Causal => scores.iter_mut().skip(query + 1).for_each(|it| *it = f32::NEG_INFINITY),
            Mask::Numbers(mask) => {
                scores.iter_mut().zip(mask.row(query).map(|it| it != 0.0)).for_each(hide_if)
            }
            Mask::Booleans(mask, [row, col]) => {
                let keys = (0..scores.len()).map(|key| mask[query * row + key * col] != 0);
                scores.iter_mut().zip(keys).for_each(hide_if);
            }
        }
    }
}

pub(crate) struct Block<'a> {
    pub(crate) norm1: Norm<'a>,
    pub(crate) query: Linear<'a>,
    pub(crate) key: Linear<'a>,
    pub(crate) value: Linear<'a>,
    pub(crate) mask: Mask<'a>,
    pub(crate) output: Linear<'a>,
    pub(crate) norm2: Norm<'a>,
    pub(crate) up: Linear<'a>,
    pub(crate) down: Linear<'a>,
}

pub(crate) struct Weights<'a> {
    pub(crate) token_embedding: Matrix<'a>,    // (vocab, emb)
    pub(crate) position_embedding: Matrix<'a>, // (context, emb)
    pub(crate) blocks: Vec<Block<'a>>,
    pub(crate) final_norm: Norm<'a>,
    pub(crate) head: Matrix<'a>, // (vocab, emb)
}

impl<'a> Weights<'a> {
    /// Fails with `Mismatch` unless the state dict is exactly the model's, aligned for `f32`, vectors contiguous.
    pub(crate) fn find(state: &'a StateDict<'_>, config: &Config, naming: Naming) -> Result<Weights<'a>> {
        check(tensors_of(state), config, naming, &HOST_FLOATS)?;
        let finder = Finder { state, naming, emb_dim: config.emb_dim };
        let token_embedding = finder.matrix(Role::TokenEmbedding, 0)?;
        Ok(Weights {
            token_embedding,
            position_embedding: finder.matrix(Role::PositionEmbedding, 0)?,
            blocks: (0..config.n_layers).map(|it| finder.block(it)).collect::<Result<_>>()?,
            final_norm: finder.norm(Role::FinalNorm, 0)?,
            head: finder.get(Role::Head, 0).map_or(Ok(token_embedding), |(name, view)| {
                matrix(&view).map_err(|error| error.in_tensor(&name))
            })?,
        })
    }
}

struct Finder<'a, 's> {
    state: &'a StateDict<'s>,
    naming: Naming,
    emb_dim: usize,
}

impl<'a> Finder<'a, '_> {
    fn block(&self, block: usize) -> Result<Block<'a>> {
        let [query, key, value] = match self.naming {
            Naming::Notebook => [
                self.linear(Role::Query, block)?,
                self.linear(Role::Key, block)?,
                self.linear(Role::Value, block)?,
            ],
            Naming::HuggingFace { .. } => {
                let fused = self.linear(Role::Fused, block)?; // (3 * emb, emb)
                [0, 1, 2].map(|it| fused.outputs(it * self.emb_dim..(it + 1) * self.emb_dim))
            }
        };
        Ok(Block {
            norm1: self.norm(Role::Norm1, block)?,
            query,
            key,
            value,
            mask: self.mask(block)?,
            output: self.linear(Role::Output, block)?,
            norm2: self.norm(Role::Norm2, block)?,
            up: self.linear(Role::Up, block)?,
            down: self.linear(Role::Down, block)?,
        })
    }

    fn linear(&self, role: fn(Part) -> Role, block: usize) -> Result<Linear<'a>> {
        let weight = self.matrix(role(Part::Weight), block)?;
        let weight = match self.naming {
            Naming::Notebook => weight,
            Naming::HuggingFace { .. } => weight.transposed(),
        };
        Ok(Linear { weight, bias: self.vector(role(Part::Bias), block)? })
    }

    fn norm(&self, role: fn(Part) -> Role, block: usize) -> Result<Norm<'a>> {
        Ok(Norm {
            scale: self.vector(role(Part::Weight), block)?,
            shift: self.vector(role(Part::Bias), block)?,
        })
    }

    fn mask(&self, block: usize) -> Result<Mask<'a>> {
        let Some((name, view)) = self.get(Role::Mask, block) else { return Ok(Mask::Causal) };
        let mask = match view.dtype {
            DType::Bool => view
                .host_bytes()
                .map(|it| Mask::Booleans(it, [view.stride[0], view.stride[1]].map(|it| it as usize))),
            _ => matrix(&view).map(Mask::Numbers),
        };
        mask.map_err(|error| error.in_tensor(&name))
    }

    fn matrix(&self, role: Role, block: usize) -> Result<Matrix<'a>> {
        self.required(role, block, matrix)
    }

    fn vector(&self, role: Role, block: usize) -> Result<&'a [f32]> {
        self.required(role, block, |view| view.contiguous())
    }

    fn required<T>(&self, role: Role, block: usize, see: impl Fn(&TensorView<'a>) -> Result<T>) -> Result<T> {
        let missing = || Fault::new(format!("a tensor for {role:?}"), "none").mismatch();
        let (name, view) = self.get(role, block).ok_or_else(missing)?;
        see(&view).map_err(|error| error.in_tensor(&name))
    }

    fn get(&self, role: Role, block: usize) -> Option<(String, TensorView<'a>)> {
        let row = self.naming.rows().iter().find(|row| row.role == role)?;
        let name = self.naming.name_of(row, block);
        let view = self.state.get(&name)?;
        Some((name, view))
    }
}

/// Sees a tensor of two dimensions as a matrix. Any strides will do.
fn matrix<'a>(view: &TensorView<'a>) -> Result<Matrix<'a>> {
    let wrong = || {
        let found =
            format!("shape {:?}, stride {:?}, {} bytes", view.shape, view.stride, view.bytes.len_bytes());
        Fault::new("a matrix in memory", found).mismatch()
    };
    let size = |dims: &[u64]| -> Option<[usize; 2]> {
        let [first, second] = *dims else { return None };
        // A size of 1 may come with any stride, also one that no address space holds.
        Some([first, second].map(|it| usize::try_from(it).unwrap_or(usize::MAX)))
    };
    let (shape, stride) = size(view.shape).zip(size(view.stride)).ok_or_else(wrong)?;
    Matrix::new(view.elements()?, shape, stride).ok_or_else(wrong)
}
