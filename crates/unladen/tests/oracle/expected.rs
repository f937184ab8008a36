//! What a load must give: every tensor an element at a time, by the simplest code there is.

use crate::checkpoint::{Case, is_integer};
use half::{bf16, f16};
use unladen::{
    DType,
    tensor::{Backing, Layout, StorageId},
};

/// Casts, as rules of the library and as the oracle understands them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules {
    /// By name, decided first.
    pub(crate) named: Vec<(String, Option<DType>)>,
    /// For every float that is not named.
    pub(crate) all: Option<DType>,
}

impl Rules {
    pub(crate) fn text(&self) -> String {
        let short = |dtype: &Option<DType>| dtype.map_or("keep", DType::name);
        let named = self.named.iter().map(|(name, dtype)| format!("{name}={}", short(dtype)));
        named.chain([short(&self.all).to_owned()]).collect::<Vec<_>>().join(",")
    }

    pub(crate) fn dtype_of(&self, name: &str, dtype: DType) -> DType {
        let named = self.named.iter().find(|(it, _)| it == name).map(|(_, dtype)| *dtype);
        named.unwrap_or(self.all.filter(|_| is_float(dtype))).unwrap_or(dtype)
    }
}

pub(crate) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
}

/// The row-major bytes of each tensor as they stand in the file, views resolved; nothing for those without data.
pub(crate) fn resolved(case: &Case) -> Vec<Option<Vec<u8>>> {
    let of_tensor = |tensor: &unladen::tensor::Tensor| match &tensor.backing {
        Backing::Meta => None,
        Backing::Storage(storage) => {
            let mut bytes = Vec::new();
            for_each_index(tensor.layout.shape(), |index| {
                bytes.extend(element(case, *storage, &tensor.layout, index))
            });
            Some(bytes)
        }
        Backing::Extents(range) => {
            let mut bytes = vec![0; tensor.layout.len_bytes() as usize];
            for extent in &case.extents[range.start as usize..range.end as usize] {
                for_each_index(extent.layout.shape(), |index| {
                    let row = extent.at[0] + index[0];
                    let number = row * tensor.layout.shape()[1] + extent.at[1] + index[1];
                    let element = element(case, extent.storage, &extent.layout, index);
                    bytes[number as usize * element.len()..][..element.len()].copy_from_slice(&element);
                });
            }
            Some(bytes)
        }
    };
    case.tensors.iter().map(of_tensor).collect()
}

/// Every index of a shape, the last dimension fastest.
fn for_each_index(shape: &[u64], mut visit: impl FnMut(&[u64])) {
    if shape.contains(&0) {
        return;
    }
    let mut index = vec![0; shape.len()];
    loop {
        visit(&index);
        let Some(dim) = (0..shape.len()).rev().find(|&dim| index[dim] + 1 < shape[dim]) else { return };
        index[dim] += 1;
        index[dim + 1..].fill(0);
    }
}

fn element(case: &Case, storage: StorageId, layout: &Layout, index: &[u64]) -> Vec<u8> {
    let (storage, dtype) = (&case.storages[storage.0 as usize], layout.dtype());
    let steps = index.iter().zip(layout.stride()).map(|(at, step)| at * step);
    let number = layout.offset_elems() + steps.sum::<u64>();
    let start_byte = (storage.start_byte + number * dtype.size_bytes()) as usize;
    let mut bytes = case.bytes[storage.file.0 as usize][start_byte..][..dtype.size_bytes() as usize].to_vec();
    let resolve = layout.resolve(storage.swapped);
    let n_units = bytes.len() / dtype.swap_bytes();
    for (number, unit) in bytes.chunks_mut(dtype.swap_bytes()).enumerate() {
        if storage.swapped {
            unit.reverse();
        }
        let is_imaginary = n_units == 2 && number == 1;
        if is_integer(dtype) && resolve.neg {
            let mut word = [0; 8];
            word[..unit.len()].copy_from_slice(unit);
            let negative = u64::from_le_bytes(word).wrapping_neg().to_le_bytes();
            unit.copy_from_slice(&negative[..unit.len()]);
        } else if resolve.neg != (is_imaginary && resolve.conj) {
            *unit.last_mut().unwrap() ^= 0x80;
        }
    }
    bytes
}

/// Casts by way of 32 bits, as PyTorch does.
pub(crate) fn cast(from: DType, to: DType, bytes: &[u8]) -> Vec<u8> {
    if from == to {
        return bytes.to_vec();
    }
    let elements = bytes.chunks_exact(from.size_bytes() as usize);
    elements.flat_map(|element| from_f32(to, to_f32(from, element))).collect()
}

fn to_f32(dtype: DType, element: &[u8]) -> f32 {
    match dtype {
        DType::F64 => f64::from_le_bytes(element.try_into().unwrap()) as f32,
        DType::F32 => f32::from_le_bytes(element.try_into().unwrap()),
        DType::F16 => f16::from_le_bytes(element.try_into().unwrap()).to_f32(),
        _ => bf16::from_le_bytes(element.try_into().unwrap()).to_f32(),
    }
}

fn from_f32(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F64 => f64::from(value).to_le_bytes().to_vec(),
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        _ => bf16::from_f32(value).to_le_bytes().to_vec(),
    }
}

/// True if the bytes are the same. After a cast, NaNs may differ in their payload.
pub(crate) fn are_equal(dtype: DType, is_cast: bool, found: &[u8], expected: &[u8]) -> bool {
    let size = dtype.size_bytes() as usize;
    let is_nan = |element: &[u8]| to_f32(dtype, element).is_nan();
    found == expected
        || is_cast
            && found.len() == expected.len()
            && found
                .chunks_exact(size)
                .zip(expected.chunks_exact(size))
                .all(|(found, expected)| found == expected || is_nan(found) && is_nan(expected))
}
