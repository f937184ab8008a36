//! One element as people read it, and as a number that differences are measured in.

use crate::dtype::DType;
use half::{bf16, f16};

/// How elements, or the halves of complex ones, become numbers. `None`: the type has no fractions.
pub(super) fn real(dtype: DType) -> Option<Real> {
    let (len_bytes, read): (usize, fn(&[u8]) -> f64) = match dtype {
        DType::F64 | DType::C128 => (8, |it| f64::from_le_bytes(whole(it))),
        DType::F32 | DType::C64 => (4, |it| f32::from_le_bytes(whole(it)).into()),
        DType::F16 | DType::C32 => (2, |it| f16::from_le_bytes(whole(it)).into()),
        DType::BF16 | DType::BC32 => (2, |it| bf16::from_le_bytes(whole(it)).into()),
        DType::F8E4M3 => (1, |it| if it[0] & 0x7f == 0x7f { f64::NAN } else { small(it[0], 3, 7) }),
        DType::F8E5M2 => (1, |it| match it[0] & 0x7f {
            0x7d.. => f64::NAN,
            0x7c => f64::INFINITY.copysign(small(it[0] & 0x80 | 0x3c, 2, 15)),
            _ => small(it[0], 2, 15),
        }),
        DType::F8E4M3Fnuz => (1, |it| if it[0] == 0x80 { f64::NAN } else { small(it[0], 3, 8) }),
        DType::F8E5M2Fnuz => (1, |it| if it[0] == 0x80 { f64::NAN } else { small(it[0], 2, 16) }),
        DType::F8E8M0 => (1, |it| if it[0] == 0xff { f64::NAN } else { 2f64.powi(i32::from(it[0]) - 127) }),
        _ => return None,
    };
    Some(Real { len_bytes, read })
}

/// How some bytes become a number.
#[derive(Clone, Copy)]
pub(super) struct Real {
    pub(super) len_bytes: usize,
    pub(super) read: fn(&[u8]) -> f64,
}

/// The first bytes. Callers cut elements to their size; bytes that lack count as zeros.
fn whole<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}

/// A finite float of one byte: a sign, an exponent, and so many bits of fraction.
fn small(byte: u8, fraction_bits: u32, bias: i32) -> f64 {
    let fraction = f64::from(byte & ((1 << fraction_bits) - 1)) / f64::from(1 << fraction_bits);
    let exponent = i32::from((byte & 0x7f) >> fraction_bits);
    let size = match exponent {
        0 => fraction * 2f64.powi(1 - bias),
        _ => (1.0 + fraction) * 2f64.powi(exponent - bias),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

/// An element as text: `1.5`, `-3`, `true`, `(1.0, -2.0)`, or its bytes where it is no number.
pub(super) fn show(dtype: DType, elem: &[u8]) -> String {
    let float = |elem: &[u8]| match dtype {
        // In the type's own digits: of a 64-bit float there would be twice as many.
        DType::F32 | DType::C64 => format!("{:?}", f32::from_le_bytes(whole(elem))),
        DType::F16 | DType::C32 => format!("{:?}", f16::from_le_bytes(whole(elem)).to_f32()),
        DType::BF16 | DType::BC32 => format!("{:?}", bf16::from_le_bytes(whole(elem)).to_f32()),
        _ => format!("{:?}", real(dtype).map_or(f64::NAN, |it| (it.read)(elem))),
    };
    match dtype {
        DType::Bool if elem == [0] => "false".to_owned(),
        DType::Bool if elem == [1] => "true".to_owned(),
        DType::I64 => i64::from_le_bytes(whole(elem)).to_string(),
        DType::I32 | DType::QI32 => i32::from_le_bytes(whole(elem)).to_string(),
        DType::I16 => i16::from_le_bytes(whole(elem)).to_string(),
        DType::I8 | DType::QI8 => i8::from_le_bytes(whole(elem)).to_string(),
        DType::U64 => u64::from_le_bytes(whole(elem)).to_string(),
        DType::U32 => u32::from_le_bytes(whole(elem)).to_string(),
        DType::U16 => u16::from_le_bytes(whole(elem)).to_string(),
        DType::U8 | DType::QU8 => u8::from_le_bytes(whole(elem)).to_string(),
        _ if dtype.is_complex() => {
            let (re, im) = elem.split_at(elem.len() / 2);
            format!("({}, {})", float(re), float(im))
        }
        _ if real(dtype).is_some() => float(elem),
        _ => elem.iter().rev().fold("0x".to_owned(), |text, byte| format!("{text}{byte:02x}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_shown_as_what_they_are() {
        let shown = |dtype, bytes: &[u8]| show(dtype, bytes);
        assert_eq!(shown(DType::F32, &0.1f32.to_le_bytes()), "0.1");
        assert_eq!(shown(DType::F64, &1e-300f64.to_le_bytes()), "1e-300");
        assert_eq!(shown(DType::BF16, &bf16::from_f32(-2.0).to_le_bytes()), "-2.0");
        assert_eq!(shown(DType::C64, &[1.5f32, -0.0].map(f32::to_le_bytes).concat()), "(1.5, -0.0)");
        assert_eq!(shown(DType::I16, &(-300i16).to_le_bytes()), "-300");
        assert_eq!(shown(DType::U64, &u64::MAX.to_le_bytes()), u64::MAX.to_string());
        assert_eq!([0u8, 1, 7].map(|it| shown(DType::Bool, &[it])).join(" "), "false true 0x07");
        assert_eq!(shown(DType::Bits16, &[0x34, 0x12]), "0x1234");
    }

    #[test]
    fn every_type_shows_any_bytes() {
        for dtype in DType::all() {
            for byte in 0..=255 {
                assert!(!show(dtype, &vec![byte; dtype.size_bytes() as usize]).is_empty());
            }
        }
    }

    /// Values as PyTorch gives them: `torch.tensor([byte], dtype=torch.uint8).view(dtype).double()`.
    #[test]
    fn floats_of_one_byte_have_the_values_that_pytorch_gives_them() {
        let known: &[(DType, u8, f64)] = &[
            (DType::F8E4M3, 0x01, 0.001953125),
            (DType::F8E4M3, 0x7e, 448.0),
            (DType::F8E4M3, 0xb8, -1.0),
            (DType::F8E4M3, 0xff, f64::NAN),
            (DType::F8E5M2, 0x01, 1.52587890625e-05),
            (DType::F8E5M2, 0x7b, 57344.0),
            (DType::F8E5M2, 0xfc, f64::NEG_INFINITY),
            (DType::F8E5M2, 0x7c, f64::INFINITY),
            (DType::F8E5M2, 0x7d, f64::NAN),
            (DType::F8E4M3Fnuz, 0x7f, 240.0),
            (DType::F8E4M3Fnuz, 0x01, 0.0009765625),
            (DType::F8E4M3Fnuz, 0x80, f64::NAN),
            (DType::F8E5M2Fnuz, 0x7f, 57344.0),
            (DType::F8E5M2Fnuz, 0xc0, -1.0),
            (DType::F8E8M0, 0x7f, 1.0),
            (DType::F8E8M0, 0x00, 5.877471754111438e-39),
            (DType::F8E8M0, 0xff, f64::NAN),
        ];
        for &(dtype, byte, expected) in known {
            let found = (real(dtype).unwrap().read)(&[byte]);
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{dtype} {byte:#x}: {found}");
        }
    }
}
