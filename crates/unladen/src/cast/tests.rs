//! Casts against slow arithmetic on tables of every value that 16 bits can hold.

use super::*;
use std::sync::LazyLock;

/// A 16-bit type by its definition, and all its finite values from zero upwards: `values[bits]`. One more stands at the
/// end, where infinity is: the value that would come next.
struct Narrow {
    dtype: DType,
    values: Vec<f64>,
}

static NARROW: LazyLock<[Narrow; 2]> =
    LazyLock::new(|| [Narrow::new(DType::F16, 10, 15), Narrow::new(DType::BF16, 7, 127)]);

impl Narrow {
    fn new(dtype: DType, n_mantissa_bits: u32, bias: i32) -> Narrow {
        let infinity = 0x7fff >> n_mantissa_bits << n_mantissa_bits;
        let steps = 2f64.powi(n_mantissa_bits as i32);
        let value = |bits: u16| {
            let (exponent, mantissa) = (bits >> n_mantissa_bits, bits & ((1 << n_mantissa_bits) - 1));
            match exponent {
                0 => f64::from(mantissa) / steps * 2f64.powi(1 - bias),
                _ => (1.0 + f64::from(mantissa) / steps) * 2f64.powi(i32::from(exponent) - bias),
            }
        };
        Narrow { dtype, values: (0..=infinity).map(value).collect() }
    }

    fn infinity_bits(&self) -> u16 {
        self.values.len() as u16 - 1
    }

    fn value(&self, bits: u16) -> f64 {
        let (sign, magnitude) = (if bits >> 15 == 0 { 1.0 } else { -1.0 }, bits & 0x7fff);
        match magnitude.cmp(&self.infinity_bits()) {
            std::cmp::Ordering::Less => sign * self.values[usize::from(magnitude)],
            std::cmp::Ordering::Equal => sign * f64::INFINITY,
            std::cmp::Ordering::Greater => f64::NAN,
        }
    }

    /// The bits of the value nearest to a number that is none of NaN; of two as near, the even one's.
    fn nearest(&self, number: f64) -> u16 {
        let sign = u16::from(number.is_sign_negative()) << 15;
        let above = self.values.partition_point(|&value| value < number.abs());
        let magnitude = match above {
            0 => 0,
            _ if above == self.values.len() => self.infinity_bits(),
            _ => {
                let below = above - 1;
                let middle = (self.values[below] + self.values[above]) / 2.0; // exact: a few bits wide
                let is_up = number.abs() > middle || (number.abs() == middle && above % 2 == 0);
                (if is_up { above } else { below }) as u16
            }
        };
        sign | magnitude
    }

    /// All values and the middles between them, of both signs.
    fn landmarks(&self) -> impl Iterator<Item = f64> {
        let middles = self.values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        self.values.iter().copied().chain(middles).flat_map(|value| [value, -value])
    }
}

fn run(from: DType, to: DType, source: &[u8]) -> Vec<u8> {
    let mut target = vec![0xa5; source.len() / from.size_bytes() as usize * to.size_bytes() as usize];
    cast(from, to, source, &mut target);
    target
}

fn f32s(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks().0.iter().map(|it| f32::from_le_bytes(*it))
}

fn f64s(bytes: &[u8]) -> impl Iterator<Item = f64> {
    bytes.as_chunks().0.iter().map(|it| f64::from_le_bytes(*it))
}

fn u16s(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks().0.iter().map(|it| u16::from_le_bytes(*it))
}

fn all_16_bits() -> Vec<u8> {
    (0..=u16::MAX).flat_map(u16::to_le_bytes).collect()
}

fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|it| it.to_le_bytes()).collect()
}

/// Casts 32-bit numbers, and holds the results against the table.
fn assert_nearest(narrow: &Narrow, numbers: &[f32]) {
    let narrowed = run(DType::F32, narrow.dtype, &bytes_of(numbers));
    for (number, bits) in numbers.iter().zip(u16s(&narrowed)) {
        if number.is_nan() {
            assert!(narrow.value(bits).is_nan(), "{:#x} -> {} {bits:#x}", number.to_bits(), narrow.dtype);
        } else {
            let expected = narrow.nearest(f64::from(*number));
            assert_eq!(bits, expected, "{number:e} ({:#x}) -> {}", number.to_bits(), narrow.dtype);
        }
    }
}

#[test]
fn every_value_of_16_bits_widens_exactly() {
    for narrow in NARROW.iter() {
        let source = all_16_bits();
        let (to_f32, to_f64) =
            (run(narrow.dtype, DType::F32, &source), run(narrow.dtype, DType::F64, &source));
        for ((bits, in_f32), in_f64) in (0..=u16::MAX).zip(f32s(&to_f32)).zip(f64s(&to_f64)) {
            let expected = narrow.value(bits);
            if expected.is_nan() {
                assert!(in_f32.is_nan() && in_f64.is_nan(), "{} {bits:#x}", narrow.dtype);
            } else {
                assert_eq!(in_f64.to_bits(), expected.to_bits(), "{} {bits:#x}", narrow.dtype);
                assert_eq!(f64::from(in_f32).to_bits(), expected.to_bits(), "{} {bits:#x}", narrow.dtype);
            }
        }
    }
}

#[test]
fn every_value_of_16_bits_comes_back() {
    for narrow in NARROW.iter() {
        for wide in [DType::F32, DType::F64] {
            let back = run(wide, narrow.dtype, &run(narrow.dtype, wide, &all_16_bits()));
            for (bits, back) in (0..=u16::MAX).zip(u16s(&back)) {
                let is_same = bits == back || (narrow.value(bits).is_nan() && narrow.value(back).is_nan());
                assert!(is_same, "{} {bits:#x} came back by {wide} as {back:#x}", narrow.dtype);
            }
        }
    }
}

#[test]
fn every_value_of_16_bits_rounds_to_the_nearest_of_the_other_type() {
    let [half, brain] = &*NARROW;
    for (from, to) in [(half, brain), (brain, half)] {
        let narrowed = run(from.dtype, to.dtype, &all_16_bits());
        for (bits, found) in (0..=u16::MAX).zip(u16s(&narrowed)) {
            let number = from.value(bits);
            if number.is_nan() {
                assert!(to.value(found).is_nan(), "{} {bits:#x}", from.dtype);
            } else {
                assert_eq!(found, to.nearest(number), "{} {bits:#x}", from.dtype);
            }
        }
    }
}

#[test]
fn numbers_on_beside_and_between_the_values_of_16_bits_round_to_the_nearest() {
    for narrow in NARROW.iter() {
        let landmarks: Vec<f32> = narrow.landmarks().map(|it| it as f32).collect();
        let is_exact = narrow.landmarks().zip(&landmarks).all(|(wide, it)| {
            // bf16's infinity stands where that of 32-bit floats does.
            f64::from(*it) == wide || it.is_infinite()
        });
        assert!(is_exact, "{}: the table is wider than 32-bit floats", narrow.dtype);
        let numbers: Vec<f32> = landmarks.iter().flat_map(|it| [it.next_down(), *it, it.next_up()]).collect();
        assert_nearest(narrow, &numbers);
    }
}

#[test]
fn numbers_from_all_over_32_bits_round_to_the_nearest() {
    let specials = [f32::NAN, -f32::NAN, f32::INFINITY, -f32::INFINITY, f32::MAX, f32::MIN, -0.0]
        .into_iter()
        // NaNs whose payload stands in the lowest or in all bits: rounding may not carry them away.
        .chain([0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff, 0x7fbf_ffff].map(f32::from_bits));
    let sweep = (0..=u32::MAX).step_by(10_007).map(f32::from_bits);
    let numbers: Vec<f32> = specials.chain(sweep).collect();
    NARROW.iter().for_each(|narrow| assert_nearest(narrow, &numbers));
}

#[test]
fn numbers_of_64_bits_round_to_the_nearest_of_32() {
    let steps = (0..=u64::MAX).step_by(0x7_ffff_0123_4567).map(f64::from_bits);
    let floats: Vec<f32> = (0..=u32::MAX).step_by(100_003).map(f32::from_bits).collect();
    let middles = floats.iter().map(|it| (f64::from(*it) + f64::from(it.next_up())) / 2.0);
    let beside = middles.flat_map(|it| [it.next_down(), it, it.next_up()]);
    let numbers: Vec<f64> =
        steps.chain(beside).chain([f64::NAN, f64::MIN_POSITIVE, f64::MAX, -0.0]).collect();
    let source: Vec<u8> = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
    // One past the largest, and so half-way to it is where infinity begins.
    let value = |it: f32| if it.is_infinite() { 2f64.powi(128).copysign(it.into()) } else { it.into() };
    for (number, found) in numbers.iter().zip(f32s(&run(DType::F64, DType::F32, &source))) {
        if number.is_nan() {
            assert!(found.is_nan());
            continue;
        }
        assert_eq!(number.is_sign_negative(), found.is_sign_negative(), "{number:e}");
        for other in [found.next_down(), found.next_up()] {
            let middle = (value(found) + value(other)) / 2.0;
            let is_nearer = *number != middle && (*number > middle) == (value(found) > middle);
            let is_even_tie = *number == middle && found.to_bits() % 2 == 0;
            // Beyond infinity there is nothing.
            assert!(other == found || is_nearer || is_even_tie, "{number:e} -> {found:e}, not {other:e}");
        }
    }
}

#[test]
fn numbers_of_64_bits_round_twice_on_their_way_to_16_as_in_pytorch() {
    for narrow in NARROW.iter() {
        let landmarks = narrow.landmarks().filter(|it| it.is_finite());
        let numbers: Vec<f64> = landmarks.flat_map(|it| [it.next_down(), it, it.next_up()]).collect();
        let source: Vec<u8> = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
        let mut n_other_than_once = 0;
        for (number, bits) in numbers.iter().zip(u16s(&run(DType::F64, narrow.dtype, &source))) {
            assert_eq!(bits, narrow.nearest(f64::from(*number as f32)), "{number:e} -> {}", narrow.dtype);
            n_other_than_once += u32::from(bits != narrow.nearest(*number));
        }
        assert!(n_other_than_once > 10_000, "{}: the numbers do not tell the two apart", narrow.dtype);
    }
    // Just above the middle of 1 and the next f16: a tie in 32 bits, which goes to the even 1.
    let number = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
    assert_eq!(run(DType::F64, DType::F16, &number.to_le_bytes()), 0x3c00u16.to_le_bytes());
}

/// Every pair of types that differ.
fn pairs() -> impl Iterator<Item = (DType, DType)> {
    let floats = [DType::F64, DType::F32, DType::F16, DType::BF16];
    floats.into_iter().flat_map(move |from| floats.map(|to| (from, to))).filter(|(from, to)| from != to)
}

/// Three blocks of numbers from 2^-12 upwards, which all types can hold and no two of which are the same.
fn sample(dtype: DType) -> Vec<u8> {
    let number = |index: u32| f32::from_bits((0x3980 + index) << 16);
    let numbers: Vec<f32> = (0..3 * BLOCK_ELEMS as u32).map(number).collect();
    if dtype == DType::F32 { bytes_of(&numbers) } else { run(DType::F32, dtype, &bytes_of(&numbers)) }
}

#[test]
fn neither_length_nor_alignment_matters_and_nothing_beside_the_target_changes() {
    let lengths: Vec<usize> =
        (0..70).chain([255, 256, BLOCK_ELEMS - 1, BLOCK_ELEMS, BLOCK_ELEMS + 1, 2500]).collect();
    for (from, to) in pairs() {
        let (from_bytes, to_bytes) = (from.size_bytes() as usize, to.size_bytes() as usize);
        let (source, expected) = (sample(from), run(from, to, &sample(from)));
        for &n_elems in &lengths {
            for (source_shift, target_shift) in [(0, 0), (1, 0), (0, 1), (1, 3), (2, 2), (4, 4), (7, 5)] {
                let mut shifted = vec![0x5a; source_shift];
                shifted.extend_from_slice(&source[..n_elems * from_bytes]);
                let mut target = vec![0xa5; target_shift + n_elems * to_bytes + 8];
                let (end, what) = (target_shift + n_elems * to_bytes, format!("{n_elems} {from} -> {to}"));
                cast(from, to, &shifted[source_shift..], &mut target[target_shift..end]);
                assert_eq!(target[target_shift..end], expected[..n_elems * to_bytes], "{what}");
                assert!(target[..target_shift].iter().chain(&target[end..]).all(|it| *it == 0xa5), "{what}");
            }
        }
    }
}

#[test]
fn casts_go_among_floats_and_from_each_type_to_itself() {
    for from in DType::all() {
        for to in DType::all() {
            assert_eq!(
                can_cast(from, to),
                from == to || pairs().any(|it| it == (from, to)),
                "{from} -> {to}"
            );
        }
        let bytes: Vec<u8> = (0..48).collect();
        assert_eq!(run(from, from, &bytes), bytes, "{from}");
    }
}
