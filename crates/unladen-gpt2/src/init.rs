//! Random weights with PyTorch's default distributions, any piece of any tensor on its own.
//!
//! An element is a function of the seed, the tensor's name and the element's position, so pieces can be made in any order,
//! of any length, on any thread, and no model has to fit into memory to be written.

use crate::{
    config::Config,
    names::{Dim, Naming, Part, Role},
};
use unladen::{DType, error::Result};

/// A tensor of a model that does not exist yet.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The notebook's name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    rule: Rule,
}

/// How elements are drawn.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// From the normal distribution of mean 0 and variance 1.
    Normal,
    /// Evenly from `-limit..limit`.
    Uniform { limit: f32 },
    /// All the same.
    Constant(f32),
    /// 1 above the diagonal of a square matrix, 0 elsewhere.
    AboveDiagonal { n_cols: u64 },
}

/// Every tensor of a model, masks included, in the order and with the names of the notebook's state dict.
///
/// Fails with `Mismatch` if a size is zero or absurdly large, or the heads do not share the width evenly.
pub fn tensors(config: &Config) -> Result<Vec<Planned>> {
    config.check()?;
    let planned = Naming::Notebook.tensors(*config).map(|(row, name)| {
        let shape: Vec<u64> = row.shape.iter().map(|it| it.of(config)).collect();
        Planned { name, shape, rule: rule(row.role, config) }
    });
    Ok(planned.collect())
}

/// PyTorch's default for the module that the tensor belongs to.
fn rule(role: Role, config: &Config) -> Rule {
    match role {
        Role::TokenEmbedding | Role::PositionEmbedding => Rule::Normal,
        Role::Mask => Rule::AboveDiagonal { n_cols: Dim::Context.of(config) },
        Role::Norm1(part) | Role::Norm2(part) | Role::FinalNorm(part) => match part {
            Part::Weight => Rule::Constant(1.0),
            Part::Bias => Rule::Constant(0.0),
        },
        // A linear layer's weight and bias alike: 1 / sqrt(inputs).
        Role::Down(_) => Rule::uniform(Dim::FourEmb, config),
        Role::Query(_) | Role::Key(_) | Role::Value(_) | Role::Fused(_) => Rule::uniform(Dim::Emb, config),
        Role::Output(_) | Role::Up(_) | Role::Head => Rule::uniform(Dim::Emb, config),
    }
}

impl Rule {
    fn uniform(inputs: Dim, config: &Config) -> Rule {
        Rule::Uniform { limit: 1.0 / (inputs.of(config) as f32).sqrt() }
    }
}

impl Planned {
    /// The element type of every planned tensor.
    pub const DTYPE: DType = DType::F32;

    /// Number of elements.
    pub fn n_elems(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes of all elements.
    pub fn len_bytes(&self) -> u64 {
        self.n_elems() * Planned::DTYPE.size_bytes()
    }

    /// Makes the elements from `start_elem` on, as many as `target` holds.
    ///
    /// Whatever is asked for in whatever pieces, an element is always the same for the same seed.
    pub fn fill(&self, seed: u64, start_elem: u64, target: &mut [f32]) {
        match self.rule {
            Rule::Constant(value) => target.fill(value),
            Rule::AboveDiagonal { n_cols } => {
                for (elem, it) in (start_elem..).zip(target) {
                    *it = if elem % n_cols > elem / n_cols { 1.0 } else { 0.0 };
                }
            }
            Rule::Uniform { limit } => self.draw(seed, start_elem, target, |bits| {
                [bits as u32, (bits >> 32) as u32].map(|it| (unit(it) * 2.0 - 1.0) * limit)
            }),
            Rule::Normal => self.draw(seed, start_elem, target, two_normals),
        }
    }

    /// As [`Planned::fill`], little-endian bytes of whole elements; a rest shorter than an element stays as it is.
    pub fn fill_bytes(&self, seed: u64, start_elem: u64, target: &mut [u8]) {
        const N_AT_ONCE: usize = 1024;
        let mut elements = [0.0f32; N_AT_ONCE];
        for (at, bytes) in target.chunks_mut(size_of::<f32>() * N_AT_ONCE).enumerate() {
            let elements = &mut elements[..bytes.len() / size_of::<f32>()];
            self.fill(seed, start_elem + (at * N_AT_ONCE) as u64, elements);
            for (bytes, it) in bytes.chunks_exact_mut(size_of::<f32>()).zip(elements) {
                bytes.copy_from_slice(&it.to_le_bytes());
            }
        }
    }

    /// Elements come in twos: 64 random bits make both.
    fn draw(&self, seed: u64, start_elem: u64, target: &mut [f32], two: impl Fn(u64) -> [f32; 2]) {
        let key = self.name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
        let pair_at = |pair: u64| two(mix(key.wrapping_add(pair.wrapping_mul(STEP))));
        let n_before = usize::from(start_elem % 2 == 1).min(target.len());
        let (before, rest) = target.split_at_mut(n_before);
        if let [it] = before {
            *it = pair_at(start_elem / 2)[1];
        }
        let mut pair = start_elem.div_ceil(2);
        let mut pairs = rest.chunks_exact_mut(2);
        for it in &mut pairs {
            it.copy_from_slice(&pair_at(pair));
            pair += 1;
        }
        if let [it] = pairs.into_remainder() {
            *it = pair_at(pair)[0];
        }
    }
}

/// The step of SplitMix64's counter.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function of the state after `state`.
fn mix(state: u64) -> u64 {
    let it = state.wrapping_add(STEP);
    let it = (it ^ (it >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let it = (it ^ (it >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    it ^ (it >> 31)
}

/// 24 of the bits as a number from 0 to 1, both exclusive.
fn unit(bits: u32) -> f32 {
    ((bits >> 8) as f32 + 0.5) * (1.0 / (1 << 24) as f32)
}

/// Two independent normal numbers: a point at a random angle, its distance drawn so that both coordinates are normal
/// (Box and Muller's way).
///
/// The logarithm and the angle's functions are sums and products of our own, so that a seed gives the same weights on every
/// machine; the standard library's may differ in the last bits.
fn two_normals(bits: u64) -> [f32; 2] {
    let distance = (-2.0 * ln(unit(bits as u32))).sqrt();
    let bits = (bits >> 32) as u32;
    // An angle below 45 degrees, then one of the eight mirror images of its point.
    let angle = unit(bits) * std::f32::consts::FRAC_PI_4;
    let square = angle * angle;
    let sin = angle * polynomial(square, [1.0 / 362_880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0, 1.0]);
    let cos = polynomial(square, [1.0 / 40_320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5, 1.0]);
    let [x, y] = if bits & 1 == 0 { [cos, sin] } else { [sin, cos] };
    let signed = |it: f32, bit: u32| f32::from_bits((it * distance).to_bits() ^ (bits >> bit << 31));
    [signed(x, 1), signed(y, 2)]
}

/// The natural logarithm of a positive normal number.
fn ln(x: f32) -> f32 {
    // x = part · 2^exponent, with the part from sqrt(1/2) to sqrt(2).
    let exponent = (x.to_bits() as i32 - std::f32::consts::FRAC_1_SQRT_2.to_bits() as i32) >> 23;
    let part = f32::from_bits((x.to_bits() as i32 - (exponent << 23)) as u32);
    // ln(part) = 2 artanh(s), and s is small.
    let s = (part - 1.0) / (part + 1.0);
    let series = polynomial(s * s, [1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0]);
    exponent as f32 * std::f32::consts::LN_2 + 2.0 * s * series
}

/// Coefficients from the highest power down.
fn polynomial(x: f32, coefficients: [f32; 5]) -> f32 {
    coefficients.iter().fold(0.0, |sum, it| sum * x + it)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str) -> Planned {
        let config = Config { vocab_size: 997, context_length: 33, ..Config::named("tiny").unwrap() };
        tensors(&config).unwrap().into_iter().find(|it| it.name == name).unwrap()
    }

    fn all(tensor: &Planned, seed: u64) -> Vec<f32> {
        let mut elements = vec![f32::NAN; tensor.n_elems() as usize];
        tensor.fill(seed, 0, &mut elements);
        elements
    }

    #[test]
    fn pieces_of_any_length_are_the_whole() {
        for name in
            ["tok_emb.weight", "trf_blocks.1.att.mask", "trf_blocks.0.ff.layers.2.bias", "final_norm.scale"]
        {
            let tensor = tensor(name);
            let whole = all(&tensor, 7);
            for len in [1, 2, 3, 1000, 1027] {
                let mut pieces = vec![f32::NAN; whole.len()];
                for (at, piece) in pieces.chunks_mut(len).enumerate() {
                    tensor.fill(7, (at * len) as u64, piece);
                }
                assert!(pieces == whole, "{name} in pieces of {len}");
            }
            let mut bytes = vec![0; whole.len() * 4 - 4];
            tensor.fill_bytes(7, 1, &mut bytes);
            assert!(bytes.chunks(4).zip(&whole[1..]).all(|(bytes, it)| *bytes == it.to_le_bytes()), "{name}");
        }
    }

    #[test]
    fn numbers_have_the_moments_of_their_distributions() {
        let moments = |elements: &[f32]| {
            let n = elements.len() as f64;
            let mean = elements.iter().map(|&it| f64::from(it)).sum::<f64>() / n;
            (mean, elements.iter().map(|&it| (f64::from(it) - mean).powi(2)).sum::<f64>() / n)
        };
        let (mean, variance) = moments(&all(&tensor("tok_emb.weight"), 1));
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        let uniform = all(&tensor("out_head.weight"), 1);
        let (mean, variance) = moments(&uniform);
        let limit = 1.0 / 8.0;
        assert!(
            mean.abs() < 0.002 && (variance * 3.0 / (limit * limit) - 1.0).abs() < 0.03,
            "{mean} {variance}"
        );
        assert!(uniform.iter().all(|it| f64::from(it.abs()) < limit));
        let wide = all(&tensor("trf_blocks.0.ff.layers.2.weight"), 1);
        assert!(wide.iter().all(|it| it.abs() < 1.0 / 16.0));
    }

    #[test]
    fn normals_are_round_and_have_the_tails_of_the_distribution() {
        let pairs: Vec<[f32; 2]> = (0..100_000).map(|it| two_normals(mix(it))).collect();
        let part = |is_one: &dyn Fn(&[f32; 2]) -> bool| {
            pairs.iter().filter(|it| is_one(it)).count() as f32 / pairs.len() as f32
        };
        for (limit, inside) in [(0.5, 0.3829), (1.0, 0.6827), (2.0, 0.9545), (3.0, 0.9973)] {
            let found = [part(&|it| it[0].abs() < limit), part(&|it| it[1].abs() < limit)];
            assert!(found.iter().all(|it| (it - inside).abs() < 0.006), "{found:?} within {limit}");
        }
        for octant in 0..8u8 {
            let is_in = |it: &[f32; 2]| {
                u8::from(it[0] > 0.0) + 2 * u8::from(it[1] > 0.0) + 4 * u8::from(it[0].abs() > it[1].abs())
                    == octant
            };
            assert!((part(&is_in) - 0.125).abs() < 0.005, "octant {octant}");
        }
        let mut x = 1e-9f32;
        while x < 1.0 {
            assert!((ln(x) - x.ln()).abs() <= 1e-6 * x.ln().abs().max(1e-3), "ln({x}) = {}", ln(x));
            x *= 1.01;
        }
    }

    #[test]
    fn seeds_and_tensors_have_numbers_of_their_own() {
        let query = all(&tensor("trf_blocks.0.att.W_query.weight"), 1);
        assert!(query == all(&tensor("trf_blocks.0.att.W_query.weight"), 1));
        assert!(query != all(&tensor("trf_blocks.0.att.W_query.weight"), 2));
        assert!(query != all(&tensor("trf_blocks.0.att.W_key.weight"), 1));
        assert!(query != all(&tensor("trf_blocks.1.att.W_query.weight"), 1));
    }

    #[test]
    fn positions_beyond_32_bits_are_positions() {
        let tensor = tensor("tok_emb.weight");
        let at = |start: u64| {
            let mut elements = [0.0; 5];
            tensor.fill(1, start, &mut elements);
            elements
        };
        assert_ne!(at(3), at(3 + (1 << 32)));
        assert_eq!(at((1 << 40) + 1)[1..], at((1 << 40) + 2)[..4]);
    }

    #[test]
    fn a_mask_is_one_above_the_diagonal() {
        let mask = all(&tensor("trf_blocks.0.att.mask"), 1);
        assert!(mask.iter().enumerate().all(|(at, &it)| it == f32::from(at % 33 > at / 33)));
    }
}
