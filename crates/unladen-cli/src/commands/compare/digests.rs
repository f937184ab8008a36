//! What the file itself holds, told without the way that the loads come: a GPU's errors are the same in all of them.

use super::load;
use crate::{args::CompareArgs, out, watch};
use unladen::{
    OpenCheckpoint, Result, Strategy,
    contents::{self, ReadPlan},
    error::{Error, Fault},
    plan::DEFAULT_HOST_BUDGET_BYTES,
    verify,
};

/// The digest of the checkpoint's tensors as `unladen verify` reads them: no plan, no engine and no GPU has a part in it.
/// With casts, that of a load to the host, which takes neither the GPU nor its driver; `None`, said why, where that fails.
pub(super) fn of_file(checkpoint: &OpenCheckpoint, args: &CompareArgs) -> Result<Option<String>> {
    if !args.way.dtype.is_nothing() {
        return of_cast(checkpoint, args);
    }
    let read_plan = |budget_bytes| ReadPlan::new(checkpoint, checkpoint.files(), budget_bytes, usize::MAX);
    // What takes more is read all the same: no row measures this process.
    let plan = read_plan(DEFAULT_HOST_BUDGET_BYTES).or_else(|_| read_plan(u64::MAX))?;
    let files = contents::files_of(checkpoint.files());
    let hash = || verify::hash_tensors(checkpoint, &files, &plan, watch::progress());
    let hashes = watch::with_bar("hashing the file", hash)?;
    let tensors = hashes.iter().map(|(id, hash)| {
        let tensor = checkpoint.tensor(*id);
        (tensor.name.as_str(), tensor.layout.dtype(), tensor.layout.shape(), hash.as_str())
    });
    Ok(Some(verify::digest(tensors)))
}

fn of_cast(checkpoint: &OpenCheckpoint, args: &CompareArgs) -> Result<Option<String>> {
    let mut words = args.open.words();
    words.extend([format!("--dtype={}", args.way.dtype), "--host-budget=none".to_owned()]);
    let loaded = load(Strategy::Stream, "casting on the host", &words, None, &checkpoint.path)?;
    watch::progress().check(&checkpoint.path)?;
    Ok(match loaded {
        Ok(row) => row.digest,
        Err(failure) => {
            let reason = failure.words;
            out::words(&format!(
                "note: loads are compared with each other, not with the file, which could not be cast on the host: {reason}"
            ));
            None
        }
    })
}

/// Fails with `Mismatch` if a load has not the digest of the file or, where that is not known, of the first load.
pub(super) fn check<'d>(
    of_file: Option<&str>,
    loads: impl IntoIterator<Item = (Strategy, Option<&'d str>)>,
) -> Result<()> {
    let mut first: Option<(Strategy, &str)> = None;
    for (strategy, digest) in loads {
        let found = format!("that of `{strategy}`, {}", digest.unwrap_or("none"));
        let expected = match (of_file, first) {
            (Some(of_file), _) => Some((format!("the digest of the file's own tensors, {of_file}"), of_file)),
            (None, Some((one, of_one))) => Some((format!("the digest of `{one}`, {of_one}"), of_one)),
            (None, None) => None,
        };
        match expected {
            Some((words, expected)) if digest != Some(expected) => return Err(differ(words, found)),
            _ => {}
        }
        first = first.or(digest.map(|it| (strategy, it)));
    }
    Ok(())
}

fn differ(expected: String, found: String) -> Error {
    let hint = "what arrived is not what the file holds: try again, look for errors of memory (`dmesg`; of a GPU, \
                `nvidia-smi -q -d ECC`), and remove what --dir keeps; if it happens again, please report it";
    Fault::new(expected, found).hint(hint).mismatch()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_that_agree_with_each_other_and_not_with_the_file_are_an_error() {
        let loads = |digest| [(Strategy::Meta, Some("a")), (Strategy::Stream, digest)];
        assert!(check(Some("a"), loads(Some("a"))).is_ok());
        assert!(check(None, loads(Some("a"))).is_ok());
        for (of_file, digest, words) in [
            (Some("b"), Some("a"), "file's own tensors, b, found that of `meta`, a"),
            (Some("a"), Some("b"), "file's own tensors, a, found that of `stream`, b"),
            (Some("a"), None, "file's own tensors, a, found that of `stream`, none"),
            (None, Some("b"), "digest of `meta`, a, found that of `stream`, b"),
            (None, None, "digest of `meta`, a, found that of `stream`, none"),
        ] {
            let error = check(of_file, loads(digest)).unwrap_err();
            assert_eq!(error.kind(), "Mismatch");
            assert!(error.to_string().contains(words) && error.hint().contains("try again"), "{error}");
        }
    }
}
