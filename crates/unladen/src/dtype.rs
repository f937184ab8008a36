//! Element types: one table of names and sizes, and the few operations that depend on the type.

use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $id:ident, $torch:literal, $bytes:literal, $swap:literal, $storage:expr, $safetensors:expr;)*) => {
        /// The type of a tensor's elements. Types of less than a byte count in bytes, as PyTorch counts those that it has.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum DType { $($(#[$doc])* $id,)* }
        const TABLE: &[Row] = &[$(Row { dtype: DType::$id, torch: $torch, bytes: $bytes, swap_bytes: $swap, storage: $storage, safetensors: $safetensors },)*];
    };
}

/// `swap_bytes`: the unit that changes order between little and big endian. `storage`: PyTorch's storage class, for
/// types that have one (PyTorch's others are saved as untyped bytes, with `_rebuild_tensor_v3`).
struct Row {
    dtype: DType,
    torch: &'static str,
    bytes: u32,
    swap_bytes: u32,
    storage: Option<&'static str>,
    safetensors: Option<&'static str>,
}

dtypes! {
    /// 64-bit float.
    F64, "float64", 8, 8, Some("DoubleStorage"), Some("F64");
    /// 32-bit float.
    F32, "float32", 4, 4, Some("FloatStorage"), Some("F32");
    /// 16-bit float.
    F16, "float16", 2, 2, Some("HalfStorage"), Some("F16");
    /// bfloat16.
    BF16, "bfloat16", 2, 2, Some("BFloat16Storage"), Some("BF16");
    /// Signed 64-bit.
    I64, "int64", 8, 8, Some("LongStorage"), Some("I64");
    /// Signed 32-bit.
    I32, "int32", 4, 4, Some("IntStorage"), Some("I32");
    /// Signed 16-bit.
    I16, "int16", 2, 2, Some("ShortStorage"), Some("I16");
    /// Signed 8-bit.
    I8, "int8", 1, 1, Some("CharStorage"), Some("I8");
    /// Unsigned 8-bit.
    U8, "uint8", 1, 1, Some("ByteStorage"), Some("U8");
    /// One byte each; bytes other than 0 and 1 exist in the wild and are kept.
    Bool, "bool", 1, 1, Some("BoolStorage"), Some("BOOL");
    /// Two 64-bit floats.
    C128, "complex128", 16, 8, Some("ComplexDoubleStorage"), None;
    /// Two 32-bit floats.
    C64, "complex64", 8, 4, Some("ComplexFloatStorage"), Some("C64");
    /// Quantised, signed 8-bit.
    QI8, "qint8", 1, 1, Some("QInt8Storage"), None;
    /// Quantised, unsigned 8-bit.
    QU8, "quint8", 1, 1, Some("QUInt8Storage"), None;
    /// Quantised, signed 32-bit.
    QI32, "qint32", 4, 4, Some("QInt32Storage"), None;
    /// Quantised, two 4-bit values a byte.
    QU4x2, "quint4x2", 1, 1, Some("QUInt4x2Storage"), None;
    /// Quantised, four 2-bit values a byte.
    QU2x4, "quint2x4", 1, 1, Some("QUInt2x4Storage"), None;
    /// Unsigned 16-bit.
    U16, "uint16", 2, 2, None, Some("U16");
    /// Unsigned 32-bit.
    U32, "uint32", 4, 4, None, Some("U32");
    /// Unsigned 64-bit.
    U64, "uint64", 8, 8, None, Some("U64");
    /// Two 16-bit floats.
    C32, "complex32", 4, 2, None, None;
    /// Two bfloat16.
    BC32, "bcomplex32", 4, 2, None, None;
    /// 8-bit float, 4 bits of exponent, finite.
    F8E4M3, "float8_e4m3fn", 1, 1, None, Some("F8_E4M3");
    /// 8-bit float, 5 bits of exponent.
    F8E5M2, "float8_e5m2", 1, 1, None, Some("F8_E5M2");
    /// 8-bit float, 4 bits of exponent, no negative zero.
    F8E4M3Fnuz, "float8_e4m3fnuz", 1, 1, None, Some("F8_E4M3FNUZ");
    /// 8-bit float, 5 bits of exponent, no negative zero.
    F8E5M2Fnuz, "float8_e5m2fnuz", 1, 1, None, Some("F8_E5M2FNUZ");
    /// 8-bit exponent alone, a scale.
    F8E8M0, "float8_e8m0fnu", 1, 1, None, Some("F8_E8M0");
    /// Two 4-bit floats a byte; safetensors counts the halves.
    F4x2, "float4_e2m1fn_x2", 1, 1, None, None;
    /// 6-bit floats, 2 bits of exponent, four in three bytes; safetensors counts them, here it is the bytes.
    F6E2M3, "float6_e2m3_packed", 1, 1, None, None;
    /// 6-bit floats, 3 bits of exponent, four in three bytes; safetensors counts them, here it is the bytes.
    F6E3M2, "float6_e3m2_packed", 1, 1, None, None;
    /// 8 bits without a meaning.
    Bits8, "bits8", 1, 1, None, None;
    /// 16 bits without a meaning.
    Bits16, "bits16", 2, 2, None, None;
    /// Eight 1-bit values a byte.
    Bits1x8, "bits1x8", 1, 1, None, None;
    /// Four 2-bit values a byte.
    Bits2x4, "bits2x4", 1, 1, None, None;
    /// Two 4-bit values a byte.
    Bits4x2, "bits4x2", 1, 1, None, None;
}

impl DType {
    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// Every type, in the table's order.
    pub fn all() -> impl Iterator<Item = DType> {
        TABLE.iter().map(|row| row.dtype)
    }

    /// PyTorch's name, `float32`; what PyTorch lacks has one after its fashion.
    pub fn name(self) -> &'static str {
        self.row().torch
    }

    /// Bytes an element takes.
    pub fn size_bytes(self) -> u64 {
        u64::from(self.row().bytes)
    }

    /// Bytes that change order together between little and big endian: half an element for complex types.
    pub fn swap_bytes(self) -> usize {
        self.row().swap_bytes as usize
    }

    /// PyTorch's storage class, `FloatStorage`; `None`: saved as `UntypedStorage`.
    pub fn storage_class(self) -> Option<&'static str> {
        self.row().storage
    }

    /// safetensors' name, `F32`; `None`: safetensors has no such type, or counts it in [another unit](DType::packed).
    pub fn safetensors_name(self) -> Option<&'static str> {
        self.row().safetensors
    }

    /// safetensors' name of a type whose elements it counts in so many bits, and this crate in bytes.
    pub fn packed(self) -> Option<(&'static str, u64)> {
        match self {
            DType::F4x2 => Some(("F4", 4)),
            DType::F6E2M3 => Some(("F6_E2M3", 6)),
            DType::F6E3M2 => Some(("F6_E3M2", 6)),
            _ => None,
        }
    }

    /// True if PyTorch has the type.
    pub fn is_in_pytorch(self) -> bool {
        !matches!(self, DType::F6E2M3 | DType::F6E3M2)
    }

    /// By [`DType::name`].
    pub fn from_name(name: &str) -> Option<DType> {
        TABLE.iter().find(|row| row.torch == name).map(|row| row.dtype)
    }

    /// By PyTorch's storage class.
    pub fn from_storage_class(class: &str) -> Option<DType> {
        TABLE.iter().find(|row| row.storage == Some(class)).map(|row| row.dtype)
    }

    /// By safetensors' name.
    pub fn from_safetensors_name(name: &str) -> Option<DType> {
        TABLE.iter().find(|row| row.safetensors == Some(name)).map(|row| row.dtype)
    }

    /// True for types with an imaginary half.
    pub fn is_complex(self) -> bool {
        matches!(self, DType::C128 | DType::C64 | DType::C32 | DType::BC32)
    }

    /// True for IEEE-like floats and complex numbers, whose sign is the top bit of each half.
    pub fn has_sign_bit(self) -> bool {
        self.is_complex() || matches!(self, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What must be done to elements as they stand in the file, besides moving them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resolve {
    /// The file's byte order is not the machine's.
    pub swap: bool,
    /// The tensor is a conjugate view: imaginary halves change sign.
    pub conj: bool,
    /// The tensor is a negative view: everything changes sign.
    pub neg: bool,
}

impl Resolve {
    /// True when bytes can be taken as they are.
    pub fn is_nothing(self) -> bool {
        self == Resolve::default()
    }

    /// Applies it in place to whole elements, little-endian machines assumed as everywhere in this crate.
    pub fn apply(self, dtype: DType, elements: &mut [u8]) {
        if self.swap && dtype.swap_bytes() > 1 {
            elements.chunks_exact_mut(dtype.swap_bytes()).for_each(<[u8]>::reverse);
        }
        if self.neg {
            negate(dtype, elements);
        }
        if self.conj && dtype.is_complex() {
            let half = dtype.swap_bytes();
            elements.chunks_exact_mut(2 * half).for_each(|pair| pair[2 * half - 1] ^= 0x80);
        }
    }
}

fn negate(dtype: DType, elements: &mut [u8]) {
    let unit = dtype.swap_bytes();
    if dtype.has_sign_bit() {
        elements.chunks_exact_mut(unit).for_each(|it| it[unit - 1] ^= 0x80);
    } else {
        // Two's complement: invert, then add one with the carry going up.
        elements.chunks_exact_mut(unit).for_each(|it| {
            let mut carry = true;
            for byte in it {
                let (sum, over) = (!*byte).overflowing_add(u8::from(carry));
                (*byte, carry) = (sum, over);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_stands_in_the_order_of_the_enum() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.dtype as usize, index);
            assert_eq!(DType::from_name(row.torch), Some(row.dtype));
            assert_eq!(row.bytes % row.swap_bytes, 0);
        }
    }

    #[test]
    fn swapping_turns_each_half_of_a_complex_number() {
        let mut bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        Resolve { swap: true, ..Resolve::default() }.apply(DType::C64, &mut bytes);
        assert_eq!(bytes, [4, 3, 2, 1, 8, 7, 6, 5]);
    }

    #[test]
    fn negative_and_conjugate_views_resolve_as_arithmetic_does() {
        let mut bytes = [1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat();
        Resolve { conj: true, ..Resolve::default() }.apply(DType::C64, &mut bytes);
        assert_eq!(bytes, [1.5f32.to_le_bytes(), 2.0f32.to_le_bytes()].concat());
        Resolve { neg: true, ..Resolve::default() }.apply(DType::F32, &mut bytes);
        assert_eq!(bytes, [(-1.5f32).to_le_bytes(), (-2.0f32).to_le_bytes()].concat());
        let mut ints = [0i16, 1, -5, i16::MIN, 256].map(i16::to_le_bytes).concat();
        Resolve { neg: true, ..Resolve::default() }.apply(DType::I16, &mut ints);
        assert_eq!(ints, [0i16, -1, 5, i16::MIN, -256].map(i16::to_le_bytes).concat());
    }
}
