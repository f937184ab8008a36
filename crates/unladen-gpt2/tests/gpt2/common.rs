//! Models in memory for tests: from the fixtures, or changed from them.

use safetensors::SafeTensors;
use std::{fs, path::PathBuf};
use unladen::{
    DType, StateDict,
    destination::{Arena, Placed},
    memory::{HostBuffer, Reservation},
    tensor::Layout,
};

pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) stride: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f32(name: &str, shape: &[u64], elements: impl IntoIterator<Item = f32>) -> Tensor {
        let layout = Layout::contiguous(DType::F32, shape).unwrap();
        let bytes = elements.into_iter().flat_map(f32::to_le_bytes).collect();
        let (shape, stride) = (shape.to_vec(), layout.stride().to_vec());
        Tensor { name: name.to_owned(), dtype: DType::F32, shape, stride, bytes }
    }

    pub(crate) fn elements(&self) -> Vec<f32> {
        self.bytes.chunks_exact(4).map(|it| f32::from_le_bytes(it.try_into().unwrap())).collect()
    }

    /// The same matrix, stored column by column.
    pub(crate) fn stored_transposed(&self) -> Tensor {
        let [rows, cols] = self.shape[..] else { panic!("{} is no matrix", self.name) };
        let elements = self.elements();
        let turned = (0..rows * cols).map(|at| elements[(at % rows * cols + at / rows) as usize]);
        Tensor { stride: vec![1, rows], ..Tensor::f32(&self.name, &self.shape, turned) }
    }
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name].iter().collect()
}

pub(crate) fn expected() -> serde_json::Value {
    serde_json::from_str(&fs::read_to_string(fixture("expected.json")).unwrap()).unwrap()
}

pub(crate) fn numbers<T: serde::de::DeserializeOwned>(json: &serde_json::Value) -> Vec<T> {
    serde_json::from_value(json.clone()).unwrap()
}

/// The logits of one of the models in `expected.json`, row-major.
pub(crate) fn expected_logits(model: &str) -> Vec<f32> {
    numbers::<Vec<f32>>(&expected()[model]["logits"]).concat()
}

pub(crate) fn load(name: &str) -> Vec<Tensor> {
    let file = fs::read(fixture(name)).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut tensors: Vec<Tensor> = tensors
        .iter()
        .map(|(name, view)| {
            let shape: Vec<u64> = view.shape().iter().map(|&it| it as u64).collect();
            let elements = view.data().chunks_exact(4).map(|it| f32::from_le_bytes(it.try_into().unwrap()));
            Tensor::f32(name, &shape, elements)
        })
        .collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

pub(crate) fn find<'t>(tensors: &'t mut [Tensor], name: &str) -> &'t mut Tensor {
    tensors.iter_mut().find(|it| it.name == name).unwrap()
}

/// Where tensors stand that stand one after the other, 64-byte aligned, and the bytes of all.
pub(crate) fn place(tensors: &[Tensor]) -> (Vec<(String, Placed)>, Vec<u8>) {
    let mut all = Vec::new();
    let place = |it: &Tensor| {
        all.resize(all.len().next_multiple_of(64), 0);
        let start_byte = all.len() as u64;
        all.extend_from_slice(&it.bytes);
        let layout = Layout::strided(it.dtype, &it.shape, &it.stride, 0).unwrap();
        (it.name.clone(), Placed { arena: 0, start_byte, layout })
    };
    (tensors.iter().map(place).collect(), all)
}

/// Puts the tensors into one owned arena.
pub(crate) fn owned(tensors: &[Tensor]) -> StateDict<'static> {
    let (placed, bytes) = place(tensors);
    let mut buffer = HostBuffer::new(Reservation::uncounted(bytes.len() as u64), "test".as_ref()).unwrap();
    buffer.as_mut_slice().copy_from_slice(&bytes);
    StateDict::new(vec![Arena::Owned(buffer)], placed).unwrap()
}

/// Largest difference, as a part of the largest number.
pub(crate) fn deviation(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest =
        |numbers: &mut dyn Iterator<Item = f32>| numbers.fold(0.0, |a, b| if b <= a { a } else { b });
    largest(&mut found.iter().zip(expected).map(|(a, b)| (a - b).abs()))
        / largest(&mut expected.iter().map(|it| it.abs()))
}
