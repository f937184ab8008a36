//! `unladen verify`: is a checkpoint whole, is it what a manifest says, is it the same as another?

mod report;

use crate::{args::VerifyArgs, human, out, watch};
use report::{CheckReport, CompareReport};
use std::{path::Path, process::ExitCode, time::Instant};
use unladen::{
    OpenCheckpoint, OpenOptions, Result,
    checkpoint::Root,
    verify::{self, Check, Manifest},
};

/// What the program says of something that is not as it should be.
const WRONG: u8 = 1;

pub(crate) fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let is_right = match &args.other {
        Some(other) => compare(args, other)?,
        None => check(args)?,
    };
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::from(WRONG) })
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
    let report = CheckReport::new(&checkpoint, &checked, began.elapsed());
    if args.json {
        out::result(&report.json())
    } else {
        report.print()
    }
    let is_right = checked.findings.is_empty();
    if !is_right {
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
    // The other one may hold the state dict alone.
    let root = options.root.clone().filter(|it| *it == Root::Auto);
    let other = open(other, &OpenOptions { root, ..options })?;
    let began = Instant::now();
    let sides = [(&*one, one.files()), (&*other, other.files())];
    let comparison =
        watch::with_bar("comparing", || verify::compare(sides, args.host_budget, watch::progress()))?;
    let report = CompareReport::new([&one, &other], &comparison, began.elapsed());
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

/// `6.29 GiB in 2.1 s (3.2 GB/s)`.
fn speed(read_bytes: u64, seconds: f64) -> String {
    let per_second = read_bytes as f64 / seconds.max(1e-9) / 1e9;
    format!("{} in {} s ({per_second:.1} GB/s)", human::bytes(read_bytes), human::seconds(seconds))
}
