//! Writes a folder with one `.pt` file per tensor, each as `torch.save(tensor, file)` writes it.

use super::{
    Checked, Output, Source,
    pickle::{self, Record},
    pth, target, ties_written_out,
};
use crate::{
    checkpoint::Warning,
    error::{Fault, Result},
    format::names::encode_file_name,
};
use std::path::Path;

/// What the usual file systems take as a name.
const MAX_NAME_BYTES: usize = 255;

/// What a small file takes on disk beside its bytes.
const BLOCK_BYTES: u64 = 4096;

pub(super) fn write(
    output: &Output<'_>,
    tensors: &[Checked<'_>],
    source: &mut Source<'_, '_>,
) -> Result<Vec<Warning>> {
    if tensors.is_empty() {
        let hint = "write a single file instead";
        return Err(Fault::new("at least one tensor, a file each", "none").hint(hint).unsupported());
    }
    tensors.iter().try_for_each(pth::check_dtype)?;
    let names = tensors.iter().map(file_name).collect::<Result<Vec<String>>>()?;
    target::check_free(output, true)?;
    let file_bytes = |tensor, name: &String| {
        Ok(pth::archive_bytes(Path::new(name), &bare_pickle(tensor)?, &[tensor])
            .next_multiple_of(BLOCK_BYTES))
    };
    let needed_bytes: Result<u64> =
        tensors.iter().zip(&names).map(|(tensor, name)| file_bytes(tensor, name)).sum();
    target::check_room(output.path, needed_bytes?)?;
    source.progress.expect(tensors.iter().map(Checked::len_bytes).sum());
    target::write_folder(output, |folder| {
        tensors.iter().zip(&names).try_for_each(|(tensor, name)| {
            let pickle = bare_pickle(tensor)?;
            folder.write_file(name, |file| {
                pth::write_archive(file, &pth::root(Path::new(name)), &pickle, &[tensor], source)
            })
        })
    })?;
    Ok(ties_written_out(tensors))
}

fn bare_pickle(tensor: &Checked<'_>) -> Result<Vec<u8>> {
    pickle::bare(&Record { name: tensor.name, layout: &tensor.layout, storage: 0 })
}

fn file_name(tensor: &Checked<'_>) -> Result<String> {
    let name = encode_file_name(tensor.name) + ".pt";
    if name.len() <= MAX_NAME_BYTES {
        return Ok(name);
    }
    let expected = format!("a name that makes a file name of at most {MAX_NAME_BYTES} bytes");
    Err(Fault::new(expected, format!("{} bytes", name.len()))
        .tensor(tensor.name)
        .hint("write a single file instead")
        .unsupported())
}
