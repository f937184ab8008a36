//! Writes a safetensors file, byte for byte as the reference library does. The format has no ties.

use super::{Checked, Output, Source, pickle, target, ties_written_out};
use crate::{
    checkpoint::Warning,
    error::{Fault, Result},
};
use serde::Serialize;

/// A header that is longer is refused by readers.
const MAX_HEADER_BYTES: u64 = 100_000_000;

const WRITE_PTH: &str = "write a .pth file, which has every plain dtype";

/// The reference library writes tensors by type, the last of this list first, then by name.
const ORDER: &[&str] = &[
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
];

#[derive(Serialize)]
struct Info<'a> {
    dtype: &'a str,
    shape: &'a [u64],
    data_offsets: [u64; 2],
}

/// A tensor in the format's terms.
struct Row<'a> {
    tensor: &'a Checked<'a>,
    dtype: &'static str,
    rank: usize,
    shape: Vec<u64>,
}

pub(super) fn write(
    output: &Output<'_>,
    tensors: &[Checked<'_>],
    source: &mut Source<'_, '_>,
) -> Result<Vec<Warning>> {
    let mut rows = tensors.iter().map(row).collect::<Result<Vec<Row<'_>>>>()?;
    rows.sort_by(|a, b| b.rank.cmp(&a.rank).then(a.tensor.name.cmp(b.tensor.name)));
    let header = header(&rows)?;
    target::check_free(output, false)?;
    let data_bytes: u64 = tensors.iter().map(Checked::len_bytes).sum();
    target::check_room(output.path, 8 + header.len() as u64 + data_bytes)?;
    source.progress.expect(data_bytes);
    target::write_file(output, |file| {
        file.write(&(header.len() as u64).to_le_bytes())?;
        file.write(&header)?;
        rows.iter().try_for_each(|row| source.stream(row.tensor, &mut |chunk| file.write(chunk)))
    })?;
    Ok(ties_written_out(tensors))
}

fn row<'a>(tensor: &'a Checked<'a>) -> Result<Row<'a>> {
    if tensor.name == "__metadata__" {
        return Err(Fault::new("another name", "the one that safetensors keeps for its metadata")
            .tensor(tensor.name)
            .hint("write a .pth file, or rename the tensor")
            .unsupported());
    }
    let mut shape = tensor.layout.shape().to_vec();
    let dtype = tensor.layout.dtype();
    let name = match (dtype.packed(), shape.last_mut()) {
        // PyTorch counts the bytes of these, safetensors each; a tensor of one byte has no shape to say so in.
        (Some((name, bits)), Some(last)) if last.checked_mul(8).is_some_and(|it| it % bits == 0) => {
            *last = *last * 8 / bits;
            Some(name)
        }
        (Some(_), _) => {
            let expected = "a last dimension, of bytes that hold whole elements (3 bytes four of 6 bits)";
            let hint = if pickle::has_plain_tensors(dtype) { WRITE_PTH } else { "keep the file" };
            return Err(tensor.unsupported(expected, hint));
        }
        (None, _) => dtype.safetensors_name(),
    };
    match name.and_then(|name| Some((name, ORDER.iter().position(|it| *it == name)?))) {
        Some((dtype, rank)) => Ok(Row { tensor, dtype, rank, shape }),
        None if pickle::has_plain_tensors(dtype) => {
            Err(tensor.unsupported("a dtype that safetensors has", WRITE_PTH))
        }
        None => Err(tensor.unsupported(
            "a dtype other than PyTorch's quantised ones",
            "no format that is written here has them: dequantise it in PyTorch (`Tensor.dequantize`), or keep the file",
        )),
    }
}

/// The header, padded with spaces so that the data is aligned to 8 bytes.
fn header(rows: &[Row<'_>]) -> Result<Vec<u8>> {
    let mut header = br#"{"__metadata__":{"format":"pt"}"#.to_vec();
    let mut at_byte = 0;
    for row in rows {
        let end_byte = at_byte + row.tensor.len_bytes();
        let info = Info { dtype: row.dtype, shape: &row.shape, data_offsets: [at_byte, end_byte] };
        header.push(b',');
        put_json(&mut header, row.tensor.name)?;
        header.push(b':');
        put_json(&mut header, &info)?;
        at_byte = end_byte;
    }
    header.push(b'}');
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() as u64 > MAX_HEADER_BYTES {
        let found = format!("{} bytes", header.len());
        return Err(Fault::new(format!("a header of at most {MAX_HEADER_BYTES} bytes"), found)
            .hint("write a .pth file, which has no such limit")
            .unsupported());
    }
    Ok(header)
}

fn put_json(target: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) -> Result<()> {
    serde_json::to_writer(target, value)
        .map_err(|error| Fault::new("text that JSON can hold", error.to_string()).unsupported())
}
