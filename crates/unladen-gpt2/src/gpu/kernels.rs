//! The launches of GPT-2's kernels: the one file of this crate that hands a GPU's memory to code that runs there.
//!
//! What a kernel reads and writes follows from the sizes that it is given. Each function here works out how far that
//! reaches in each place, and launches nothing unless the places are as long.
#![allow(unsafe_code)]

use super::weights::{Linear, Norm, Orientation, Place, Tensor};
use unladen::{
    DType,
    cuda::{Arg, Context, Function, Module},
    error::{Fault, Result},
};

/// Tokens that stand together in activations, which are (groups, features, 8).
pub(crate) const TOKENS: u64 = 8;

/// Threads of a block, and what a block computes: as the kernels' source has them.
const EMBED_THREADS: u32 = 256;
const NORM_THREADS: u32 = 1024;
const ROWS_THREADS: u32 = 128;
const ROWS_PER_BLOCK: u64 = 4;
const COLS_THREADS: u32 = 1024;
const COLS_PER_BLOCK: u64 = 32;
const KEYS_THREADS: u32 = 64;

/// What products read of their input at a time.
const LOAD_BYTES: u64 = 16;

/// The kernels, compiled for one GPU.
pub struct Kernels {
    context: Context,
    embed: Function,
    layer_norm: Function,
    multiply_rows: ByDtype,
    multiply_cols: ByDtype,
    attention: Function,
}

struct ByDtype([Function; 3]);

impl ByDtype {
    fn find(module: &Module, name: &str) -> Result<ByDtype> {
        let of = |dtype: &str| module.function(&format!("{name}_{dtype}"));
        Ok(ByDtype([of("f32")?, of("f16")?, of("bf16")?]))
    }

    fn of(&self, dtype: DType) -> Result<&Function> {
        Ok(&self.0[dtype_code(dtype)? as usize - 1])
    }
}

/// The number by which the kernels know a type. 0 is no tensor at all.
fn dtype_code(dtype: DType) -> Result<u32> {
    match dtype {
        DType::F32 => Ok(1),
        DType::F16 => Ok(2),
        DType::BF16 => Ok(3),
        _ => Err(Fault::new(super::FLOATS.spelled, dtype.to_string()).hint(super::FLOATS.hint).mismatch()),
    }
}

/// What becomes of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// It replaces what stands there.
    Replace = 0,
    /// GELU of it replaces what stands there.
    Gelu = 1,
    /// It is added.
    Add = 2,
}

/// How a block masks its attention.
#[derive(Clone, Copy)]
pub(crate) enum Mask<'m> {
    /// A query sees the keys up to itself.
    Causal,
    /// It does not see those whose element is not zero: (context, context).
    Elements(Tensor<'m>),
}

/// What attention must know of a model.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) n_heads: u64,
    pub(crate) head_dim: u64,
    pub(crate) context_length: u64,
}

impl Kernels {
    /// Has the driver compile the kernels. That takes a while when it does it for the first time, and needs none of the
    /// weights: it can be done on another thread while they are loaded.
    pub fn load(context: &Context) -> Result<Kernels> {
        let module = Module::load(context, include_str!("kernels/gpt2.ptx"))?;
        Ok(Kernels {
            context: context.clone(),
            embed: module.function("embed")?,
            layer_norm: module.function("layer_norm")?,
            multiply_rows: ByDtype::find(&module, "multiply_rows")?,
            multiply_cols: ByDtype::find(&module, "multiply_cols")?,
            attention: module.function("attention")?,
        })
    }

    /// The GPU that they are for.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Writes `ids` to the GPU, and to `x`, (groups, features, 8), the sums of their embeddings and their positions'.
    pub(crate) fn embed(
        &self,
        x: Place<'_>,
        ids: &[u32],
        ids_on_gpu: Place<'_>,
        [tokens, positions]: [Tensor<'_>; 2], // (vocab, features), (context, features)
        n_features: u64,
    ) -> Result<()> {
        let n_tokens = ids.len() as u64;
        let n_elems = product(&[n_tokens.div_ceil(TOKENS), n_features, TOKENS])?;
        let n_rows = ids.iter().max().map_or(0, |&it| u64::from(it) + 1);
        x.check_holds(n_elems, DType::F32)?;
        tokens.check_holds(product(&[n_rows, n_features])?)?;
        positions.check_holds(product(&[n_tokens, n_features])?)?;
        ids_on_gpu.check_holds(n_tokens, DType::U32)?;
        let bytes: Vec<u8> = ids.iter().flat_map(|it| it.to_le_bytes()).collect();
        ids_on_gpu.write(&bytes)?;
        let args = [
            x.arg(),
            ids_on_gpu.arg(),
            tokens.place.arg(),
            Arg::U32(dtype_code(tokens.dtype)?),
            positions.place.arg(),
            Arg::U32(dtype_code(positions.dtype)?),
            Arg::U32(small(n_features)?),
            Arg::U32(small(n_tokens)?),
        ];
        let n_blocks = small(n_elems.div_ceil(u64::from(EMBED_THREADS)))?;
        // SAFETY: these are the parameters of `embed`. It writes the first `n_elems` elements of `x`, and reads
        // `n_tokens` ids, the row of each id, of which none is larger than the last of `n_rows`, and a row of `positions`
        // for each token: all were checked above to lie in their places, and the ids there are those that were checked.
        unsafe { self.embed.launch(n_blocks, EMBED_THREADS, &args) }
    }

    /// Normalises each token of `x` over its features: both places (groups, features, 8).
    pub(crate) fn layer_norm(
        &self,
        normed: Place<'_>,
        x: Place<'_>,
        norm: Norm<'_>,
        n_features: u64,
        n_groups: u64,
    ) -> Result<()> {
        let n_elems = product(&[n_groups, n_features, TOKENS])?;
        normed.check_holds(n_elems, DType::F32)?;
        x.check_holds(n_elems, DType::F32)?;
        norm.scale.check_holds(n_features)?;
        norm.shift.check_holds(n_features)?;
        let args = [
            normed.arg(),
            x.arg(),
            norm.scale.place.arg(),
            Arg::U32(dtype_code(norm.scale.dtype)?),
            norm.shift.place.arg(),
            Arg::U32(dtype_code(norm.shift.dtype)?),
            Arg::U32(small(n_features)?),
        ];
        small(product(&[n_features, TOKENS])?)?; // the kernel counts a group's elements in 32 bits
        // SAFETY: these are the parameters of `layer_norm`. A block reads and writes the elements of its group, of which
        // there are `n_groups`, and reads an element of `scale` and `shift` for each feature: checked above. It counts on
        // `NORM_THREADS` threads.
        unsafe { self.layer_norm.launch(small(n_groups)?, NORM_THREADS, &args) }
    }

    /// `y = then(layer(x))`, from (groups, in, 8) to (groups, out, 8), or to a part of something wider: `y` has
    /// `y_features`, and the first output becomes the one at `first_feature`.
    pub(crate) fn multiply(
        &self,
        layer: &Linear<'_>,
        (y, y_features, first_feature): (Place<'_>, u64, u64),
        x: Place<'_>,
        n_groups: u64,
        then: Then,
    ) -> Result<()> {
        let &Linear { weight, bias, orientation, n_in, n_out } = layer;
        if first_feature.saturating_add(n_out) > y_features {
            let found = format!("{n_out} after the first {first_feature}");
            return Err(Fault::new(format!("{y_features} features"), found).mismatch());
        }
        y.check_holds(product(&[n_groups, y_features, TOKENS])?, DType::F32)?;
        x.check_holds(product(&[n_groups, n_in, TOKENS])?, DType::F32)?;
        x.check_aligned(LOAD_BYTES)?;
        weight.check_holds(product(&[n_in, n_out])?)?;
        let (bias_place, bias_dtype) = match bias {
            Some(bias) => {
                bias.check_holds(n_out)?;
                (bias.place.arg(), dtype_code(bias.dtype)?)
            }
            None => (Arg::U64(0), 0),
        };
        let (kernels, n_threads, per_block) = match orientation {
            Orientation::Rows => (&self.multiply_rows, ROWS_THREADS, ROWS_PER_BLOCK),
            Orientation::Cols => (&self.multiply_cols, COLS_THREADS, COLS_PER_BLOCK),
        };
        let args = [
            y.arg_at(first_feature * TOKENS, DType::F32),
            Arg::U64(y_features * TOKENS),
            x.arg(),
            weight.place.arg(),
            bias_place,
            Arg::U32(bias_dtype),
            Arg::U32(small(n_in)?),
            Arg::U32(small(n_out)?),
            Arg::U32(small(n_groups)?),
            Arg::U32(then as u32),
        ];
        let n_blocks = small(product(&[n_groups, n_out.div_ceil(per_block)])?)?;
        // SAFETY: these are the parameters of the products, and the kernel is that of the weight's type. Counted from the
        // first element of `y` that it is given, a block writes elements `y_features * 8` times its group, which is below
        // `n_groups`, and 8 times an output, which is below `n_out`: the last lies in `y`, since the outputs end within
        // its features. It reads the elements of `x` for its group, those of `weight` whose row and column there are, and
        // an element of `bias` for each output, none without a type. All places were checked to be as long, and aligned
        // for their elements; `x` for loads of 16 bytes, since whatever it is read from is 8 `f32`, or 4, from its start.
        // The numbers of threads are those that the kernels count on.
        unsafe { kernels.of(weight.dtype)?.launch(n_blocks, n_threads, &args) }
    }

    /// Mixes the values of the keys that each query sees: `qkv` is (groups, 3 · emb, 8), `mixed` is (groups, emb, 8).
    pub(crate) fn attention(
        &self,
        mixed: Place<'_>,
        qkv: Place<'_>,
        mask: Mask<'_>,
        heads: Heads,
        n_tokens: u64,
    ) -> Result<()> {
        let Heads { n_heads, head_dim, context_length } = heads;
        let n_slots = n_tokens.next_multiple_of(TOKENS);
        let n_elems = product(&[n_slots, n_heads, head_dim])?;
        mixed.check_holds(n_elems, DType::F32)?;
        qkv.check_holds(product(&[3, n_elems])?, DType::F32)?;
        let (mask, mask_elem_bytes) = match mask {
            Mask::Causal => (Arg::U64(0), 0),
            Mask::Elements(mask) => {
                if n_tokens > context_length {
                    return Err(
                        Fault::new(format!("{context_length} tokens"), n_tokens.to_string()).mismatch()
                    );
                }
                mask.check_holds(product(&[context_length, context_length])?)?;
                let elem_bytes = match mask.dtype {
                    DType::Bool => 1,
                    _ if dtype_code(mask.dtype)? == 1 => 4,
                    _ => 2,
                };
                (mask.place.arg(), elem_bytes)
            }
        };
        let args = [
            mixed.arg(),
            qkv.arg(),
            mask,
            Arg::U32(mask_elem_bytes),
            Arg::U32(small(context_length)?),
            Arg::U32(small(n_heads)?),
            Arg::U32(small(head_dim)?),
            Arg::U32(small(n_tokens)?),
        ];
        let n_blocks = small(product(&[n_slots, n_heads])?)?;
        // SAFETY: these are the parameters of `attention`. A block writes the features of its head for its place in
        // `mixed`, of `n_slots`, and reads those of queries, keys and values of `n_tokens` tokens in `qkv`; from the mask
        // it reads elements whose row and column are below `n_tokens`, which is at most its size; none without a size of
        // elements. All places were checked to be as long. It counts on `KEYS_THREADS` threads.
        unsafe { self.attention.launch(n_blocks, KEYS_THREADS, &args) }
    }
}

/// A product of sizes, if there can be so many elements of a few bytes.
pub(crate) fn product(sizes: &[u64]) -> Result<u64> {
    let product = sizes.iter().try_fold(1u64, |product, &it| product.checked_mul(it));
    let too_many = || Fault::new("sizes that a GPU can hold", format!("{sizes:?}")).mismatch();
    product.filter(|&it| it <= 1 << 56).ok_or_else(too_many)
}

/// A size as kernels take it: one that a signed number of 32 bits holds, as numbers of blocks must be.
fn small(size: u64) -> Result<u32> {
    let too_large = || {
        Fault::new(format!("a size below {}", i32::MAX), size.to_string())
            .hint("give fewer tokens, or use --device host")
            .unsupported()
    };
    i32::try_from(size).map(i32::cast_unsigned).map_err(|_| too_large())
}
