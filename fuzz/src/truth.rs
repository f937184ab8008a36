//! Files in which nothing is a lie, and what their tensors hold, told apart from the library: it must give back these bytes.

use crate::{
    archive, legacy, one_in,
    pickle::{self, Ids, N_VIEWS, Pickle, STORAGES, View, storage_bytes},
    safetensors::{DTYPES, N_WHOLE},
};
use arbitrary::{Result, Unstructured};

/// A file, and what it holds.
pub struct Truth {
    pub file: Vec<u8>,
    pub tensors: Vec<Meant>,
}

/// A tensor, its elements in row-major order and in this machine's byte order, which is little-endian.
pub struct Meant {
    pub name: String,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

/// An archive as `torch.save` writes it, or as a tool packed it again, of a machine of either byte order.
pub fn zip(u: &mut Unstructured<'_>) -> Result<Truth> {
    let is_big_endian = one_in(u, 4)?;
    let (pickle, tensors) = tensors(u, Ids::Zip, is_big_endian)?;
    let mut records = archive::records_of(pickle.bytes);
    if is_big_endian {
        let order = records.iter_mut().filter(|it| it.name == b"a/byteorder");
        order.for_each(|it| it.bytes = b"big".to_vec());
    }
    Ok(Truth { file: archive::write_truly(&records, u)?, tensors })
}

/// A file of the format before PyTorch 1.6.
pub fn legacy(u: &mut Unstructured<'_>) -> Result<Truth> {
    let (pickle, tensors) = tensors(u, Ids::Legacy, false)?;
    // Without bytes to choose from, nothing is a lie.
    Ok(Truth { file: legacy::around(&mut Unstructured::new(&[]), pickle)?, tensors })
}

/// The pickle of some views of the known storages, and what they hold.
fn tensors(u: &mut Unstructured<'_>, ids: Ids, is_big_endian: bool) -> Result<(Pickle, Vec<Meant>)> {
    let (mut out, mut tensors) = (Pickle::new(ids), Vec::new());
    out.extend_from_slice(b"\x80\x02}(");
    for number in 0..u.int_in_range(1..=6)? {
        let name = format!("w{number}");
        let index = u.int_in_range(0..=STORAGES.len() - 1)?;
        let view = pickle::view(u.int_in_range(0..=N_VIEWS - 1)?, STORAGES[index].2);
        pickle::text(&mut out, &name);
        pickle::honest_tensor(&mut out, index, &view);
        let bytes = gathered(index, &view, is_big_endian);
        tensors.push(Meant { name, shape: view.1, bytes });
    }
    out.extend_from_slice(b"u.");
    Ok((out, tensors))
}

/// The elements of a view of a known storage, one after the other.
fn gathered(index: usize, (offset, shape, strides): &View, is_big_endian: bool) -> Vec<u8> {
    let storage = storage_bytes(index as u8);
    let elem_bytes = storage.len() / STORAGES[index].2 as usize;
    let mut out = Vec::new();
    for position in 0..shape.iter().product() {
        let (mut rest, mut at): (u64, u64) = (position, *offset);
        for (n, stride) in shape.iter().zip(strides).rev() {
            at += rest % n * stride;
            rest /= n;
        }
        let mut elem = storage[at as usize * elem_bytes..][..elem_bytes].to_vec();
        if is_big_endian {
            elem.reverse();
        }
        out.extend(elem);
    }
    out
}

/// A safetensors file, its header in the order of the bytes or the other way round.
pub fn safetensors(u: &mut Unstructured<'_>) -> Result<Truth> {
    let (mut fields, mut tensors, mut data) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..u.int_in_range(1..=6)? {
        let name = format!("t{number}");
        let (dtype, elem_bytes) = *u.choose(&DTYPES[..N_WHOLE])?;
        let mut shape: Vec<u64> = Vec::new();
        for _ in 0..u.int_in_range(0..=3)? {
            shape.push(u.int_in_range(0..=5)?);
        }
        let start_byte = data.len() as u64;
        let end_byte = start_byte + elem_bytes * shape.iter().product::<u64>();
        // Bytes that stand in no other place nearby, nor in the same order.
        let bytes: Vec<u8> = (start_byte..end_byte).map(|it| (it ^ (it >> 8)) as u8).collect();
        data.extend_from_slice(&bytes);
        fields.push(format!(
            "\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start_byte},{end_byte}]}}"
        ));
        tensors.push(Meant { name, shape, bytes });
    }
    if one_in(u, 2)? {
        fields.reverse();
    }
    let header = format!("{{{}}}{}", fields.join(","), " ".repeat(u.int_in_range(0..=7)?));
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    Ok(Truth { file, tensors })
}
