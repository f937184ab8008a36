//! How the files of a checkpoint are best read from beginning to end. Asks the system what it holds of them; reads nothing.

use super::{FileSet, FileSource};
use crate::io_path::IoPath;

/// What reading everything may add to the page cache: less than the smallest budget, and not more for a larger one, lest
/// what a plan needs depend on what it is allowed.
const MAX_ADDED_BYTES: u64 = 512 << 10;

/// How each file is best read, by position: what is in the page cache from there, the rest past it. Records that are packed
/// in a file follow it.
pub fn io_paths(files: &FileSet) -> Vec<IoPath> {
    let mut allowed_bytes = MAX_ADDED_BYTES;
    if total_bytes(files) <= allowed_bytes {
        return vec![IoPath::Buffered; files.len()];
    }
    let mut paths: Vec<IoPath> = Vec::with_capacity(files.len());
    for index in 0..files.len() {
        let path = match paths.get(files.position_of_file(index)) {
            Some(of_file) => of_file.of_packed(),
            // A file that cannot be opened any more is an error of the run, which says so better.
            None => files.file(index).map_or(IoPath::Buffered, |file| choose(&file, &mut allowed_bytes)),
        };
        paths.push(path);
    }
    paths
}

/// Length of all files; what is packed in them does not count again.
fn total_bytes(files: &FileSet) -> u64 {
    let stamps = (0..files.len()).filter_map(|it| files.stamp(it));
    stamps.filter(|it| it.packed.is_none()).map(|it| it.len_bytes).sum()
}

fn choose(file: &FileSource, allowed_bytes: &mut u64) -> IoPath {
    let len_bytes = file.stamp().len_bytes;
    // Where nobody can tell, as on a network file system, the page cache is as good as anything.
    let Some(cached_bytes) = file.cached_bytes() else { return IoPath::Buffered };
    let missing_bytes = len_bytes.saturating_sub(cached_bytes);
    if missing_bytes <= *allowed_bytes {
        *allowed_bytes -= missing_bytes;
        return IoPath::Buffered;
    }
    match file.can_read_direct() {
        false => IoPath::DropBehind,
        true if cached_bytes < len_bytes / 2 => IoPath::Direct,
        true => IoPath::Mixed,
    }
}
