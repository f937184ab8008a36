//! Writes a `.pth` file: one archive with the pickle of an ordered dictionary and a record per storage.

use super::{
    Checked, Output, Source,
    archive::{ALIGN_BYTES, Archive, RECORD_OVERHEAD_BYTES},
    pickle::{self, Record},
    target::{self, TargetFile},
};
use crate::{checkpoint::Warning, error::Result};
use std::{collections::HashMap, path::Path};

pub(super) fn write(
    output: &Output<'_>,
    tensors: &[Checked<'_>],
    source: &mut Source<'_, '_>,
) -> Result<Vec<Warning>> {
    tensors.iter().try_for_each(check_dtype)?;
    target::check_free(output, false)?;
    // Tied tensors name one storage, the one of whoever comes first.
    let mut storages: Vec<&Checked<'_>> = Vec::new();
    let mut number_of = HashMap::new();
    let records: Vec<Record<'_>> = tensors
        .iter()
        .map(|tensor| {
            let storage = *number_of.entry(tensor.data).or_insert_with(|| {
                storages.push(tensor);
                storages.len() - 1
            });
            Record { name: tensor.name, layout: &tensor.layout, storage }
        })
        .collect();
    let pickle = pickle::dictionary(&records)?;
    target::check_room(output.path, archive_bytes(output.path, &pickle, &storages))?;
    source.progress.expect(storages.iter().map(|it| it.len_bytes()).sum());
    target::write_file(output, |file| write_archive(file, &root(output.path), &pickle, &storages, source))?;
    Ok(Vec::new())
}

/// Fails for a tensor that `torch.save` would write as more than a tensor.
pub(super) fn check_dtype(tensor: &Checked<'_>) -> Result<()> {
    let dtype = tensor.layout.dtype();
    if pickle::has_plain_tensors(dtype) {
        return Ok(());
    }
    if !dtype.is_in_pytorch() {
        return Err(tensor.unsupported("a dtype that PyTorch has", "write a safetensors file"));
    }
    Err(tensor.unsupported(
        "a dtype other than PyTorch's quantised ones",
        "no format that is written here has them: dequantise it in PyTorch (`Tensor.dequantize`), or keep the file",
    ))
}

/// An upper bound of the file's size.
pub(super) fn archive_bytes(path: &Path, pickle: &[u8], storages: &[&Checked<'_>]) -> u64 {
    let data_bytes: u64 = storages.iter().map(|it| it.len_bytes()).sum();
    let name_bytes = 2 * (root(path).len() as u64 + 32);
    let n_records = storages.len() as u64 + 6;
    data_bytes + pickle.len() as u64 + n_records * (RECORD_OVERHEAD_BYTES + name_bytes) + 200
}

/// The archive in PyTorch's order of records.
pub(super) fn write_archive(
    file: &mut TargetFile,
    root: &str,
    pickle: &[u8],
    storages: &[&Checked<'_>],
    source: &mut Source<'_, '_>,
) -> Result<()> {
    let mut archive = Archive::new(file, root);
    archive.bytes("data.pkl", pickle)?;
    archive.bytes(".format_version", b"1")?;
    archive.bytes(".storage_alignment", ALIGN_BYTES.to_string().as_bytes())?;
    archive.bytes("byteorder", b"little")?;
    for (number, tensor) in storages.iter().enumerate() {
        let name = format!("data/{number}");
        archive.record(&name, tensor.len_bytes(), |sink| source.stream(tensor, sink))?;
    }
    archive.bytes("version", b"3\n")?;
    let id = archive.serialization_id();
    archive.bytes(".data/serialization_id", id.as_bytes())?;
    archive.finish()
}

/// The folder inside the archive: the file's stem, or "archive" where PyTorch would not take that.
pub(super) fn root(path: &Path) -> String {
    let stem = path.file_stem().and_then(|it| it.to_str()).unwrap_or_default();
    let is_plain = stem.bytes().all(|it| (b' '..=b'~').contains(&it) && it != b'\\');
    let is_name = stem.bytes().any(|it| it != b'.');
    if is_plain && is_name { stem.to_owned() } else { "archive".to_owned() }
}
