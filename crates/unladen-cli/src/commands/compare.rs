//! `unladen compare`: every way of loading, each in a fresh process, side by side.

mod digests;
mod report;
mod workbench;

use crate::{args::CompareArgs, gpt2_file, human, out, pinning, row::Row, watch};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use unladen::{
    Device, Error, Format, OpenCheckpoint, PlanOptions, Result, Strategy, cuda::Context, error::Fault, memory,
};
use workbench::Workbench;

/// Why there is no row.
struct Failure {
    words: String,
    /// What to try next; empty: nobody said.
    hint: String,
    /// The process did not end by itself: killed for memory, say.
    is_crash: bool,
}

/// What became of one strategy.
struct Outcome {
    strategy: Strategy,
    result: Result<Row, Failure>,
    /// The last position's, if this is a GPT-2.
    logits: Option<Vec<f32>>,
}

pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    // Before gigabytes are saved for a GPU that is not there. Let go of again: the loads are other processes.
    for device in args.way.options().devices() {
        if let Device::Cuda(ordinal) = device {
            Context::open(ordinal)?;
        }
    }
    let mut bench = Workbench::new(args.dir.clone())?;
    let path = match &args.file {
        Some(file) => file.clone(),
        None => bench.gpt2(&args.gpt2)?,
    };
    let checkpoint = unladen::open_with(&path, &args.open.options())?;
    checkpoint.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    let strategies =
        if args.strategies.is_empty() { Strategy::all().collect() } else { args.strategies.clone() };
    let wants_folder = strategies.contains(&Strategy::PerTensor);
    let folder = if wants_folder { folder_of(&checkpoint, args, &mut bench) } else { Ok(path.clone()) };
    introduce(&checkpoint, args);
    let of_file = digests::of_file(&checkpoint, args)?;

    let mut outcomes = Vec::new();
    for strategy in strategies {
        watch::progress().check(&path)?;
        outcomes.push(match (strategy, &folder) {
            (Strategy::PerTensor, Ok(folder)) => one(strategy, folder, args, &bench)?,
            (Strategy::PerTensor, Err(error)) => {
                let reason = format!("the checkpoint could not be saved as one file per tensor: {error}");
                let failure = Failure { words: reason, hint: error.hint().to_owned(), is_crash: false };
                Outcome { strategy, result: Err(failure), logits: None }
            }
            _ => one(strategy, &path, args, &bench)?,
        });
    }
    // Whoever stops us stops the last load, too, which is no failure of its own.
    watch::progress().check(&path)?;
    report::print(&outcomes, of_file.as_deref(), &checkpoint, args);
    let why_pageable = outcomes.iter().find_map(|it| it.result.as_ref().ok()?.why_pageable.as_deref());
    if let Some(why) = why_pageable {
        out::words(&pinning::warning_of_load(why));
    }
    agree(&outcomes, of_file.as_deref(), &path)
}

/// Says what is compared and how, before it takes its time.
fn introduce(checkpoint: &OpenCheckpoint, args: &CompareArgs) {
    let cache = if args.cold {
        "cold: dropped from the page cache before each load"
    } else {
        "warm: in the page cache"
    };
    out::words(&format!(
        "{}: {} tensors, {}, {cache}",
        checkpoint.path.display(),
        checkpoint.tensors.len(),
        human::bytes(checkpoint.len_bytes())
    ));
    args.way.unused(checkpoint).iter().for_each(|it| out::words(it));
    if let Err(reason) = gpt2_file::recognise_or_skip(checkpoint, args.heads, &options(args)) {
        out::words(&format!(
            "{reason}: zeroed tensors of its shapes stand for the model, and the forward pass is skipped"
        ));
    }
}

/// What each load is told, but for its strategy.
fn options(args: &CompareArgs) -> PlanOptions {
    PlanOptions { host_budget_bytes: args.host_budget, ..args.way.options() }
}

/// The checkpoint as one file per tensor: itself, or saved again.
fn folder_of(checkpoint: &OpenCheckpoint, args: &CompareArgs, bench: &mut Workbench) -> Result<PathBuf> {
    match checkpoint.format {
        Format::Folder if args.open.root.is_none() => Ok(checkpoint.path.clone()),
        _ => bench.folder_of(checkpoint),
    }
}

/// One strategy in a process of its own.
fn one(strategy: Strategy, file: &Path, args: &CompareArgs, bench: &Workbench) -> Result<Outcome> {
    watch::with_bar(if args.cold { "evicting" } else { "warming" }, || prepare_cache(file, args))?;
    let logits_file = bench.scratch(&format!("{strategy}.logits"));
    let mut words = args.way.words();
    words.push(format!("--host-budget={}", human::unparse_bytes(args.host_budget)));
    // What was saved again has been restricted, and checked, already.
    let is_copy = args.file.as_deref() != Some(file);
    words.extend(if is_copy { args.open.words_of_copy() } else { args.open.words() });
    words.extend(args.heads.iter().map(|heads| format!("--heads={heads}")));
    let result = load(strategy, strategy.name(), &words, Some(&logits_file), file)?;
    let logits = fs::read(&logits_file).ok().map(|bytes| {
        bytes.chunks_exact(4).map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]])).collect()
    });
    Ok(Outcome { strategy, result, logits })
}

/// Runs `unladen load` in a process of its own, with a bar that says `what`.
fn load(
    strategy: Strategy,
    what: &'static str,
    words: &[String],
    logits_to: Option<&Path>,
    file: &Path,
) -> Result<Result<Row, Failure>> {
    let program =
        std::env::current_exe().map_err(|source| Error::io(Path::new("unladen"), "find itself", source))?;
    let mut command = Command::new(&program);
    command.args(["load", "--json", "--digest", "--strategy", strategy.name()]).args(words);
    if let Some(logits_to) = logits_to {
        command.arg("--logits-to").arg(logits_to);
    }
    command.arg("--").arg(file).stdin(Stdio::null());
    let output = watch::with_bar(what, || command.output());
    let output = output.map_err(|source| Error::io(&program, "start a load", source))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(match serde_json::from_str(text.trim()) {
        Ok(row) if output.status.success() => Ok(row),
        _ => {
            let words = String::from_utf8_lossy(&output.stderr);
            let said = |what: &str| words.lines().find_map(|line| line.strip_prefix(what)).map(str::to_owned);
            let is_crash = output.status.code() != Some(1);
            let error = said("error: ").unwrap_or_else(|| output.status.to_string());
            Err(Failure { words: error, hint: said("hint: ").unwrap_or_default(), is_crash })
        }
    })
}

fn prepare_cache(path: &Path, args: &CompareArgs) -> Result<()> {
    let cold = args.cold;
    let (mut len_bytes, mut cached_bytes) = (0, Some(0));
    for file in super::load::files_of(path, &args.open.options_of_copy()) {
        let open = fs::File::open(&file).map_err(|source| Error::io(&file, "open the file", source))?;
        let file_bytes =
            open.metadata().map_err(|source| Error::io(&file, "look at the file", source))?.len();
        let prepared = if cold {
            memory::evict(&open, &file)
        } else {
            memory::warm(&open, &file, file_bytes, watch::progress())
        };
        prepared?;
        len_bytes += file_bytes;
        cached_bytes = cached_bytes.and_then(|sum| Some(sum + memory::cached_bytes(&open, file_bytes)?));
    }
    let is_so = |cached: u64| if cold { cached <= len_bytes / 100 } else { cached >= len_bytes / 100 * 99 };
    match cached_bytes {
        Some(cached) if is_so(cached) => {}
        Some(cached) => out::words(&format!(
            "note: the page cache holds {} of {} of {}, so this load is neither cold nor warm",
            human::bytes(cached),
            human::bytes(len_bytes),
            path.display()
        )),
        None => out::words("note: the system does not tell what the page cache holds"),
    }
    Ok(())
}

/// Every load gave the tensors of the file, and every forward pass the same logits.
fn agree(outcomes: &[Outcome], of_file: Option<&str>, path: &Path) -> Result<()> {
    let mut loaded = outcomes.iter().filter_map(|it| Some((it, it.result.as_ref().ok()?)));
    let Some((first, _)) = loaded.next() else {
        let failed = outcomes.iter().find_map(|it| it.result.as_ref().err());
        let (words, hint) = failed.map(|it| (it.words.clone(), it.hint.clone())).unwrap_or_default();
        let fault = Fault::new("at least one strategy that loads", words).hint(hint);
        return Err(fault.mismatch().in_file(path));
    };
    if let Some(crashed) = outcomes.iter().find(|it| it.result.as_ref().is_err_and(|it| it.is_crash)) {
        let expected = format!("`{}` to end by itself", crashed.strategy);
        let found = crashed.result.as_ref().err().map(|it| it.words.clone()).unwrap_or_default();
        let hint =
            "killed for memory? look at the predicted peaks with `unladen load --json`, and at `dmesg`";
        return Err(Fault::new(expected, found).hint(hint).unsupported().in_file(path));
    }
    let found =
        outcomes.iter().filter_map(|it| Some((it.strategy, it.result.as_ref().ok()?.digest.as_deref())));
    digests::check(of_file, found).map_err(|error| error.in_file(path))?;
    for (outcome, row) in loaded {
        let distance = match (&first.logits, &outcome.logits) {
            (Some(one), Some(other)) => gpt2_file::distance(one, other),
            (None, None) => 0.0,
            _ => f32::INFINITY,
        };
        if distance > gpt2_file::MAX_DISTANCE {
            let expected = format!("the logits of `{}`", first.strategy);
            let found = format!("those of `{}`, {distance} away", row.strategy);
            let hint = "the bytes are the same, so what computes with them failed: try again, and with --device host";
            return Err(Fault::new(expected, found).hint(hint).mismatch().in_file(path));
        }
    }
    Ok(())
}
