//! Reads a plain pickle (`pickle.dump`, joblib without compression): tensors stand inside it, and stay in the file.

use super::{
    Limits, OpenOptions, inline,
    pickle::{self, PersistentIds, Value, skim, skim_object},
    whole::{Contents, Parts, prepare},
    window::Window,
};
use crate::{
    checkpoint::{Format, Warning},
    error::{Error, Fault, Result},
    source::ReadAt,
    stamp::FileStamp,
};

/// How joblib names what stands in for an array, whose bytes it writes between the opcodes.
const JOBLIB_ARRAY: &[u8] = b"NumpyArrayWrapper";
/// Where that is looked for, if something is wrong.
const HEAD_BYTES: u64 = 64 << 10;

/// With what such pickles start that hold more than one value: a mark, a container, a class.
const STARTS: &[u8] = b"(]}c";

/// True for a file that is a pickle from its first byte to its last, and of more than one value. Pickles of protocols 0 and 1
/// say so in no other way. `head` is the file's start.
///
/// Fails if the file cannot be read.
pub(super) fn is_unmarked(source: &dyn ReadAt, head: &[u8], limits: &Limits) -> Result<bool> {
    let len_bytes = source.len_bytes();
    let starts = head.first().is_some_and(|it| STARTS.contains(it));
    if !starts || source.read_range(len_bytes.saturating_sub(1)..len_bytes)? != b"." {
        return Ok(false);
    }
    match is_all(source, limits) {
        Err(error @ Error::Io { .. }) => Err(error),
        found => Ok(found.unwrap_or(false)),
    }
}

fn is_all(source: &dyn ReadAt, limits: &Limits) -> Result<bool> {
    let mut window = Window::new(source, 0..source.len_bytes());
    let skeleton = skim(&mut window, 0, limits.pickle_bytes)?;
    if skeleton.end_byte < window.range.end {
        return Ok(false);
    }
    drop(window);
    let pickle = pickle::read_skeleton(&skeleton, PersistentIds::Storages, limits)?;
    Ok(match pickle.root {
        Value::Dict(dict) => !pickle.arena.dicts[dict as usize].items.is_empty(),
        Value::Call(_) => true,
        other => pickle.arena.sequence(other).is_some_and(|it| !it.is_empty()),
    })
}

/// Reads a file that is one pickle, and passes it to `look`.
pub(super) fn with_contents<T>(
    source: &dyn ReadAt,
    stamp: FileStamp,
    options: &OpenOptions,
    look: impl FnOnce(Contents<'_>) -> Result<T>,
) -> Result<T> {
    let head = source.read_range(0..source.len_bytes().min(HEAD_BYTES))?;
    let is_joblib = head.windows(JOBLIB_ARRAY.len()).any(|it| it == JOBLIB_ARRAY);
    drop(head);
    read(source, stamp, options, look).map_err(|error| match error {
        Error::Corrupt(_) | Error::Unsupported(_) if is_joblib => joblib(),
        error => error,
    })
}

fn read<T>(
    source: &dyn ReadAt,
    stamp: FileStamp,
    options: &OpenOptions,
    look: impl FnOnce(Contents<'_>) -> Result<T>,
) -> Result<T> {
    let limits = &options.limits;
    let mut window = Window::new(source, 0..source.len_bytes());
    let skeleton = skim_object(&mut window, 0, limits)?;
    let len_bytes = window.range.end - skeleton.end_byte;
    drop(window);
    let mut pickle = pickle::read_skeleton(&skeleton, PersistentIds::Storages, limits)?;
    if pickle.arena.symbols.iter().any(|it| it.name == JOBLIB_ARRAY) {
        return Err(joblib());
    }
    if !pickle.arena.persistent.is_empty() {
        return Err(Fault::new("a pickle with its tensors inside", "one that names storages elsewhere")
            .hint("this looks like the `data.pkl` of an unpacked archive; open the archive itself")
            .unsupported());
    }
    let mut warnings = Vec::new();
    if len_bytes > 0 {
        warnings.push(Warning::TrailingBytes { after: "the end of the pickle", len_bytes });
    }
    prepare(&mut pickle, options, &mut warnings)?;
    let (mut files, mut storages) = (vec![stamp], Vec::new());
    let inside = inline::Inside { source: Some(source), lists_arrays: true };
    let given = inline::find(&pickle.arena, inside, &mut files, &mut storages, limits, &mut warnings)?;
    look(Contents {
        format: Format::Pickle,
        files,
        arena: &pickle.arena,
        root: pickle.root,
        parts: Parts { storages, refs: Vec::new(), given },
        constants: None,
        warnings,
    })
}

fn joblib() -> Error {
    Fault::new("a plain pickle", "arrays of NumPy as joblib writes them, between the opcodes")
        .hint("load it with joblib and save it with torch.save, or as safetensors")
        .unsupported()
}

#[cfg(test)]
mod tests;
