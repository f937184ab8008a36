//! The functions between the matrix products, written so that the compiler makes vector instructions of them.

use crate::weights::Norm;

/// Elements that a loop keeps apart, so that no addition waits for the one before.
const LANES: usize = 8;

/// eˣ, within 2 units in the last place. 0 below -87, where `f32` runs out of normal numbers; the largest below infinity
/// above 88; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    const HIGHEST: f32 = 88.0;
    /// ln 2 in two parts: the first has so few bits that its products with whole numbers are exact.
    const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    /// Added and taken away again, it rounds to a whole number, which then stands in the lowest bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons instead of `clamp`: NaN must go through.
    let bounded = if x < LOWEST { LOWEST } else { x };
    let bounded = if bounded > HIGHEST { HIGHEST } else { bounded };
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = bounded - whole * LN_2[0] - whole * LN_2[1];
    // e^rest for |rest| <= ln(2) / 2: the Taylor series up to the seventh power.
    let mut sum = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * rest + factor;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < LOWEST { 0.0 } else { sum * power }
}

/// GELU in its tanh form, in place: `x/2 · (1 + tanh u)` is `x / (1 + e^(-2u))`.
pub(crate) fn gelu(elements: &mut [f32]) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    for x in elements {
        let u = SQRT_2_OVER_PI * (*x + 0.044715 * *x * *x * *x);
        *x /= 1.0 + exp(-2.0 * u);
    }
}

/// Softmax of a row, in place. NaN if all of it is -inf, as in PyTorch.
pub(crate) fn softmax(row: &mut [f32]) {
    let highest = fold_lanes(row, f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    for it in row.iter_mut() {
        *it = exp(*it - highest);
    }
    let factor = 1.0 / fold_lanes(row, 0.0, |a, b| a + b);
    for it in row.iter_mut() {
        *it *= factor;
    }
}

fn fold_lanes(row: &[f32], start: f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &it) in lanes.iter_mut().zip(chunk) {
            *lane = join(*lane, it);
        }
    }
    lanes.iter().chain(rest).fold(start, |sum, &it| join(sum, it))
}

/// Normalises each token over its features, to mean 0 and variance 1, then scales and shifts.
pub(crate) fn layer_norm(norm: Norm<'_>, x: &[f32], normed: &mut [f32], tokens: usize) {
    const EPSILON: f32 = 1e-5;
    let n_features = norm.scale.len() as f32;
    let mut mean = vec![0.0; tokens];
    for row in x.chunks_exact(tokens) {
        mean.iter_mut().zip(row).for_each(|(sum, it)| *sum += it);
    }
    mean.iter_mut().for_each(|sum| *sum /= n_features);
    let mut factor = vec![0.0; tokens];
    for row in x.chunks_exact(tokens) {
        for ((sum, it), mean) in factor.iter_mut().zip(row).zip(&mean) {
            *sum += (it - mean) * (it - mean);
        }
    }
    factor.iter_mut().for_each(|sum| *sum = 1.0 / (*sum / n_features + EPSILON).sqrt());
    let rows = x.chunks_exact(tokens).zip(normed.chunks_exact_mut(tokens));
    for ((row, normed), (&scale, &shift)) in rows.zip(norm.scale.iter().zip(norm.shift)) {
        for (((out, it), mean), factor) in normed.iter_mut().zip(row).zip(&mean).zip(&factor) {
            *out = (it - mean) * factor * scale + shift;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere_and_keeps_what_is_special() {
        let mut x = -90.0f32;
        while x < 88.0 {
            let right = f64::from(x).exp();
            let is_close = (f64::from(exp(x)) - right).abs() <= 3e-7 * right || x < -87.0;
            assert!(is_close, "exp({x}) = {}, not {right}", exp(x));
            x += 0.0137;
        }
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan() && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn gelu_goes_from_zero_to_the_identity() {
        let mut elements = [-50.0, -1.0, 0.0, 1.0, 50.0];
        gelu(&mut elements);
        let right = [0.0, -0.158_808, 0.0, 0.841_192, 50.0];
        for (found, right) in elements.iter().zip(right) {
            assert!((found - right).abs() < 1e-6, "{elements:?}");
        }
    }

    #[test]
    fn softmax_sums_to_one_and_gives_nothing_to_what_is_masked() {
        let mut row: Vec<f32> = (0..21).map(|it| it as f32 * 3.0).collect();
        row[20] = f32::NEG_INFINITY;
        softmax(&mut row);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(row[20], 0.0);
        let mut masked = [f32::NEG_INFINITY; 3];
        softmax(&mut masked);
        assert!(masked.iter().all(|it| it.is_nan()));
    }
}
