//! `unladen verify`: is a checkpoint whole, is it what a manifest says, is it the same as another?

mod report;

use crate::{args::VerifyArgs, human, out, watch};
use report::{CheckReport, CompareReport};
use std::{path::Path, process::ExitCode, time::Instant};
use unladen::{
    Error, OpenCheckpoint, OpenOptions, Result,
    checkpoint::Root,
    verify::{self, Check, Kind, Manifest},
};

/// What the program says of something that is not as it should be.
const WRONG: u8 = 1;
/// And where that cannot be told.
const UNKNOWN: u8 = 2;

pub(crate) fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let is_right = match &args.other {
        Some(other) => compare(args, other)?,
        None => check(args)?,
    };
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(WRONG) })
}

/// What an error says: a file that contradicts itself is wrong, whatever it was to be compared with. Everything else (no
/// such file, a budget that is too small) leaves the question open.
pub(crate) fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Corrupt(_) => WRONG,
        _ => UNKNOWN,
    }
}

fn open(path: &Path, options: &OpenOptions) -> Result<OpenCheckpoint> {
    let checkpoint = unladen::open_with(path, options)?;
    checkpoint.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    Ok(checkpoint)
}

fn check(args: &VerifyArgs) -> Result<bool> {
    let manifest = args.manifest.as_deref().map(Manifest::read).transpose()?;
    let options = args.open.options();
    let checkpoint = open(&args.file, &options)?;
    if let Some(path) = &args.write_manifest {
        Manifest::check_output(path, args.force, &checkpoint.files)?;
    }
    let check = Check {
        host_budget_bytes: args.host_budget,
        limits: options.limits,
        hashes: args.write_manifest.is_some(),
        manifest: manifest.as_ref(),
    };
    let began = Instant::now();
    let checked = watch::with_bar("verifying", || {
        verify::check(&checkpoint, checkpoint.files(), &check, watch::progress())
    })?;
    let knows_composites = manifest.as_ref().map(|it| it.composites().is_some());
    let report = CheckReport::new(&checkpoint, &checked, knows_composites, began.elapsed());
    if args.json {
        out::result(&report.json())
    } else {
        report.print()
    }
    let is_right = checked.findings.is_empty();
    if knows_composites == Some(false) && !checkpoint.composites.is_empty() {
        out::words(&format!(
            "note: the manifest is of version 1, which says of no tensor what it is made of: the kinds, sizes, scales and \
             zero points of {} sparse, nested or quantised tensors and subclasses were not compared",
            checkpoint.composites.len()
        ));
    }
    if !is_right && checked.findings.iter().all(|it| it.kind == Kind::Parts) {
        out::words(
            "hint: the bytes are as they were written, whoever wrote them: do not give these indices to a program that \
             trusts them",
        );
    } else if !is_right {
        out::words("hint: fetch the file again, and compare its hash with the publisher's");
    } else if manifest.is_none() && checked.n_compared == 0 && args.write_manifest.is_none() {
        out::words(
            "note: everything can be read, but there is nothing to compare it with: no record has a checksum. \
             A manifest would be: --write-manifest where the file is known to be good, --manifest here",
        );
    }
    if let (Some(path), Some(manifest)) = (&args.write_manifest, &checked.manifest) {
        if is_right {
            manifest.write(path, args.force, &checkpoint.files)?;
            out::words(&format!("{}: {} tensors", path.display(), manifest.tensors().len()));
        } else {
            out::words(&format!("note: {} was not written", path.display()));
        }
    }
    Ok(is_right)
}

fn compare(args: &VerifyArgs, other: &Path) -> Result<bool> {
    let options = args.open.options();
    let one = open(&args.file, &options)?;
    let (other, is_other_whole) = open_other(other, &options)?;
    let began = Instant::now();
    let sides = [(&*one, one.files()), (&*other, other.files())];
    let comparison =
        watch::with_bar("comparing", || verify::compare(sides, args.host_budget, watch::progress()))?;
    let root = options.root.as_ref().map(ToString::to_string);
    let roots = [root.as_deref(), root.as_deref().filter(|_| !is_other_whole)];
    let report = CompareReport::new([&one, &other], roots, &comparison, began.elapsed());
    if args.json {
        out::result(&report.json())
    } else {
        report.print()
    }
    if comparison.ties_differ {
        out::words("note: some tensors share their bytes in one of the two only, which is no difference");
    }
    Ok(comparison.is_same())
}

/// Opens the checkpoint that another is compared with, below the same root. True if it has nothing there and was opened
/// whole, as it may hold that part alone.
fn open_other(path: &Path, options: &OpenOptions) -> Result<(OpenCheckpoint, bool)> {
    let below = unladen::open_with(path, options);
    let (other, is_whole) = match (below, &options.root) {
        (Err(Error::Mismatch(_)), Some(Root::At(root))) => {
            let other = unladen::open_with(path, &OpenOptions { root: None, ..options.clone() })?;
            let [path, root] =
                [path.display().to_string(), root.clone()].map(|it| it.escape_debug().to_string());
            out::words(&format!("note: {path} has nothing below `{root}`: all of it is compared"));
            (other, true)
        }
        (other, _) => (other?, false),
    };
    other.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    Ok((other, is_whole))
}

/// `6.29 GiB in 2.1 s (3.2 GB/s)`.
fn speed(read_bytes: u64, seconds: f64) -> String {
    let per_second = read_bytes as f64 / seconds.max(1e-9) / 1e9;
    format!("{} in {} s ({per_second:.1} GB/s)", human::bytes(read_bytes), human::seconds(seconds))
}
