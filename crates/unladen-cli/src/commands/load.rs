//! `unladen load`: one load, measured. `compare` runs it in a fresh process per strategy.

use crate::{args::LoadArgs, gpt2_file, human, out, row::Row, watch};
use std::{collections::HashMap, fs, path::Path, path::PathBuf, time::Instant};
use unladen::{
    Error, Loaded, OpenCheckpoint, PlanOptions, Result, RunOptions, Strategy, memory,
    memory::{Method, Peaks},
    verify,
};

pub(crate) fn run(args: &LoadArgs) -> Result<()> {
    let path = &args.file;
    // Asked before the headers are read, which would change the answer, so of every file that may belong to it.
    let cached_before: HashMap<_, _> =
        candidates(path).into_iter().map(|it| (it.clone(), cached_bytes(&it))).collect();
    let method = if args.strategy.maps_files() { Method::Sampled } else { Method::HighWater };
    let (result, measured) = memory::measure(method, || load(path, args));
    let (checkpoint, loaded, load_s, predicted) = result?;
    // A mapping that is handed out is read when it is touched: by the forward pass, if there is one.
    let touched = if loaded.state.is_mapped() { Method::Sampled } else { Method::HighWater };
    let (forward_s, forward) = match &args.logits_to {
        Some(to) => {
            let (forward_s, forward) =
                memory::measure(touched, || forward(&checkpoint, &loaded, args.heads, to));
            (forward_s?, Some(forward))
        }
        None => (None, None),
    };
    let later_bytes = forward.filter(|_| loaded.state.is_mapped()).map_or(0, |it| it.peak_file_bytes);
    let files = || checkpoint.files.iter().map(|it| &it.path);
    let mut row = Row {
        strategy: args.strategy.to_string(),
        load_s,
        tensors: loaded.state.len(),
        bytes: checkpoint.len_bytes(),
        host_peak_anon_bytes: measured.peak_anon_bytes,
        host_peak_rss_bytes: measured.peak_rss_bytes,
        device_peak_bytes: loaded.peaks.device_bytes,
        mapped_peak_bytes: if args.strategy.maps_files() {
            measured.peak_file_bytes + later_bytes
        } else {
            0
        },
        predicted_host_peak_anon_bytes: 0,
        predicted_host_peak_rss_bytes: 0,
        predicted_device_peak_bytes: 0,
        predicted_mapped_peak_bytes: 0,
        measured_by: measured.method.name().to_owned(),
        notebook_rss_bytes: measured.polled_rss_bytes,
        cgroup_peak_bytes: memory::cgroup_peak_bytes(),
        page_cache_before_bytes: files().map(|file| cached_before.get(file).copied().flatten()).sum(),
        page_cache_after_bytes: files().map(|file| cached_bytes(file)).sum(),
        digest: None,
        forward_s,
    };
    row.set_predicted(predicted);
    if args.digest {
        row.digest =
            Some(watch::with_bar("hashing", || verify::digest_of(&loaded.state, path, watch::progress()))?);
    }
    if args.json {
        out::result(&serde_json::to_string(&row).expect("strings and numbers"));
    } else {
        print(&row, args.strategy);
    }
    checkpoint.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    Ok(())
}

/// From the path to the weights, on the clock.
fn load(path: &Path, args: &LoadArgs) -> Result<(OpenCheckpoint, Loaded<'static>, f64, Peaks)> {
    let began = Instant::now();
    let checkpoint = unladen::open(path)?;
    let plan = checkpoint.plan(PlanOptions { device: args.device, ..PlanOptions::new(args.strategy) })?;
    let initial_values = gpt2_file::initial_values(&checkpoint, args.strategy, args.heads);
    let options = RunOptions {
        progress: Some(watch::progress()),
        initial_values: initial_values.as_deref(),
        ..RunOptions::default()
    };
    let loaded = watch::with_bar(args.strategy.name(), || checkpoint.run(&plan, options))?;
    drop(initial_values);
    Ok((checkpoint, loaded, began.elapsed().as_secs_f64(), plan.predicted()))
}

/// The proof: seconds of the forward pass, its last logits in a file. `None` (said why) if it cannot be run.
fn forward(
    checkpoint: &OpenCheckpoint,
    loaded: &Loaded<'_>,
    heads: Option<usize>,
    to: &Path,
) -> Result<Option<f64>> {
    let kind = match gpt2_file::recognise_or_skip(checkpoint, heads) {
        Ok(kind) => kind,
        Err(reason) => {
            out::words(&format!("forward pass skipped: {reason}"));
            return Ok(None);
        }
    };
    let began = Instant::now();
    let logits = gpt2_file::forward(&loaded.state, &kind, &gpt2_file::PROBE)?;
    let forward_s = began.elapsed().as_secs_f64();
    let bytes: Vec<u8> = logits.iter().flat_map(|it| it.to_le_bytes()).collect();
    fs::write(to, bytes).map_err(|source| Error::io(to, "write the logits", source))?;
    Ok(Some(forward_s))
}

/// What the page cache holds of a file, if the system tells.
fn cached_bytes(file: &Path) -> Option<u64> {
    let open = fs::File::open(file).ok()?;
    memory::cached_bytes(&open, open.metadata().ok()?.len())
}

/// The file itself, or every file of a folder: a checkpoint consists of some of them. A pipe is none, and would hang.
fn candidates(path: &Path) -> Vec<PathBuf> {
    let paths = match fs::read_dir(path) {
        Ok(entries) => entries.filter_map(|it| Some(it.ok()?.path())).collect(),
        Err(_) => vec![path.to_owned()],
    };
    paths.into_iter().filter(|it| it.is_file()).collect()
}

/// The files of a checkpoint, which are not all that its folder holds. None if it does not open.
pub(crate) fn files_of(path: &Path) -> Vec<PathBuf> {
    let stamps = unladen::open(path).map(|it| it.files().stamps()).unwrap_or_default();
    stamps.into_iter().map(|it| it.path).collect()
}

fn print(row: &Row, strategy: Strategy) {
    let speed = match strategy.is_private() {
        true => format!("{:.2} GB/s", row.bytes as f64 / row.load_s / 1e9),
        false => "mapped: bytes are read when they are touched".to_owned(),
    };
    out::result(&format!(
        "{} tensors, {}, in {} s, {speed}",
        row.tensors,
        human::bytes(row.bytes),
        human::seconds(row.load_s)
    ));
    let line = |what: &str, measured: u64, predicted: u64, how: &str| {
        out::result(&format!(
            "{what:<12} {:>9}   predicted {:>9}   {how}",
            human::bytes(measured),
            human::bytes(predicted)
        ));
    };
    line("device peak", row.device_peak_bytes, row.predicted_device_peak_bytes, "by the ledger");
    line("host peak", row.host_peak_anon_bytes, row.predicted_host_peak_anon_bytes, &row.measured_by);
    if let Some(digest) = &row.digest {
        out::result(&format!("digest       {digest}"));
    }
}
