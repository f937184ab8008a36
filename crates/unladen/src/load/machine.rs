//! Asks the system what a plan must know: free memory, processors, and how each file is best read.

use crate::{
    io_path::IoPath,
    memory::{available_bytes, placing_wins},
    plan::{Machine, PlanOptions},
    source::{FileSet, FileSource},
};
use std::thread::available_parallelism;

/// Less than this is in memory before it is known how it comes there best.
const WORTH_PROBING_BYTES: u64 = 32 << 20;

/// What a load may add to the page cache: less than the smallest budget, and not more for a larger one, lest what a
/// plan needs depend on what it is allowed.
const MAX_ADDED_BYTES: u64 = 512 << 10;

/// What this machine is like for a load of these files.
pub(super) fn machine(files: &FileSet, options: &PlanOptions) -> Machine {
    let total_bytes: u64 = files.stamps().iter().map(|it| it.len_bytes).sum();
    Machine {
        free_host_bytes: available_bytes().unwrap_or(u64::MAX),
        n_cores: available_parallelism().map_or(2, |it| it.get()),
        io: io_paths(files, options, total_bytes),
        places_pages: total_bytes > WORTH_PROBING_BYTES && placing_wins(),
    }
}

/// How each file is best read: what is in the page cache from there, the rest past it.
fn io_paths(files: &FileSet, options: &PlanOptions, total_bytes: u64) -> Vec<IoPath> {
    if let Some(path) = options.io {
        return vec![path; files.len()];
    }
    let mut allowed_bytes = MAX_ADDED_BYTES;
    if options.share_cache || total_bytes <= allowed_bytes {
        return vec![IoPath::Buffered; files.len()];
    }
    let choose = |index| {
        // A file that cannot be opened any more is an error of the run, which says so better.
        let Ok(file) = files.get(index) else { return IoPath::Buffered };
        choose(&file, &mut allowed_bytes)
    };
    (0..files.len()).map(choose).collect()
}

fn choose(file: &FileSource, allowed_bytes: &mut u64) -> IoPath {
    let len_bytes = file.stamp().len_bytes;
    // Where the system does not tell, it is most often because the file belongs to somebody else who uses it too.
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
