//! `unladen load`: one load, measured. `compare` runs it in a fresh process per strategy.

use crate::{
    args::{Choice, LoadArgs},
    gpt2_file, human, out, pinning,
    row::{Row, device_rows},
    watch,
};
use std::{
    collections::HashMap,
    fs,
    hint::black_box,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};
use unladen::{
    Device, Error, Intent, LoadPlan, Loaded, OpenCheckpoint, OpenOptions, Result, RunOptions, StateDict,
    TensorBuffer,
    cuda::Context,
    engine::Staging,
    error::Fault,
    memory,
    memory::{Measured, Method},
    tensor::Layout,
    verify,
};

pub(crate) fn run(args: &LoadArgs) -> Result<()> {
    let path = &args.file;
    // Asked before the headers are read, which would change the answer, so of every file that may belong to it.
    let cached_before: HashMap<_, _> =
        candidates(path).into_iter().map(|it| (it.clone(), cached_bytes(&it))).collect();
    if args.refill {
        return refill(path, args, &cached_before);
    }
    // Copies to a GPU come from a mapping only by name.
    let may_map = match args.how.strategy {
        Choice::Named(strategy) => strategy.maps_files(),
        Choice::Auto => args.how.intent == Some(Intent::ReadOnly),
    };
    let method = if may_map { Method::Sampled } else { Method::HighWater };
    let began = Instant::now();
    let (contexts, of_contexts) = memory::measure(Method::HighWater, || open_gpus(args));
    let context_s = began.elapsed().as_secs_f64();
    let (result, measured) = memory::measure(method, || load(path, args));
    let (checkpoint, loaded, mut load_s, plan) = result?;
    if args.touch {
        let began = Instant::now();
        touch(&loaded.state, plan.n_threads());
        load_s += began.elapsed().as_secs_f64();
    }
    // A mapping that is handed out is read when it is touched: by the forward pass, if there is one.
    let touched = if loaded.state.is_mapped() { Method::Sampled } else { Method::HighWater };
    let (forward_s, forward) = match &args.logits_to {
        Some(to) => {
            let (forward_s, forward) = memory::measure(touched, || forward(&checkpoint, &loaded, args, to));
            (forward_s?, Some(forward))
        }
        None => (None, None),
    };
    let later_bytes = forward.filter(|_| loaded.state.is_mapped()).map_or(0, |it| it.peak_file_bytes);
    let budget_bytes = args.how.host_budget;
    let mut row = row_of(&checkpoint, &plan, budget_bytes, load_s, &measured, &cached_before);
    row.device_peak_bytes = loaded.peaks.device_bytes.total_bytes();
    row.devices = device_rows(&plan, &loaded);
    row.driver_peak_bytes =
        row.devices.iter().filter_map(|it| it.driver_peak_bytes).reduce(|sum, it| sum + it);
    row.is_mapped = loaded.state.is_mapped();
    let staging = loaded.gpus.staging.as_ref();
    row.is_pinned = staging.map(|it| it.why_pageable().is_none());
    row.why_pageable = staging.and_then(Staging::why_pageable).map(str::to_owned);
    if !contexts.is_empty() {
        row.context_s = Some(context_s);
        row.context_host_anon_bytes = Some(of_contexts.peak_anon_bytes);
    }
    if plan.strategy().maps_files() {
        row.mapped_peak_bytes = measured.peak_file_bytes + later_bytes;
    }
    row.forward_s = forward_s;
    if args.digest {
        row.digest =
            Some(watch::with_bar("hashing", || verify::digest_of(&loaded.state, path, watch::progress()))?);
    }
    report(&row, args.json);
    args.how.way.unused(&checkpoint).iter().for_each(|it| out::words(it));
    args.how.way.frees_none_singly(&plan).iter().for_each(|it| out::words(it));
    if let Some(why) = &row.why_pageable {
        out::words(&pinning::warning_of_load(why));
    }
    checkpoint.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    Ok(())
}

/// Begins to use the GPUs, which takes a fraction of a second and some memory whatever is loaded then: it is told apart.
/// What of them cannot be used is for the plan to say.
fn open_gpus(args: &LoadArgs) -> Vec<Context> {
    let devices = args.how.options(Intent::Private).devices();
    let opened = devices.into_iter().filter_map(|it| match it {
        Device::Cuda(ordinal) => Context::open(ordinal).ok(),
        _ => None,
    });
    opened.collect()
}

/// From the path to the weights, on the clock.
fn load(path: &Path, args: &LoadArgs) -> Result<(OpenCheckpoint, Loaded<'static>, f64, LoadPlan)> {
    let began = Instant::now();
    let checkpoint = unladen::open_with(path, &args.open.options())?;
    let plan_options = args.how.options(Intent::Private);
    let plan = checkpoint.plan(&plan_options)?;
    let initial_values = gpt2_file::initial_values(&checkpoint, plan.strategy(), args.heads, &plan_options);
    let options = RunOptions {
        progress: Some(watch::progress()),
        initial_values: initial_values.as_deref(),
        ..RunOptions::default()
    };
    let loaded = watch::with_bar(plan.strategy().name(), || checkpoint.run(&plan, options))?;
    drop(initial_values);
    Ok((checkpoint, loaded, began.elapsed().as_secs_f64(), plan))
}

/// Reads every byte of the weights that are on the host.
fn touch(state: &StateDict<'_>, n_threads: usize) {
    let on_host = state.iter().filter_map(|(_, view)| view.host_bytes().ok());
    let pieces: Vec<&[u8]> = on_host.flat_map(|it| it.chunks(TOUCH_BYTES)).collect();
    let next = AtomicUsize::new(0);
    let read = || {
        let mut sum = 0u64;
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let words =
                piece.chunks_exact(8).map(|it| it.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)));
            sum = words.fold(sum, |sum, word| sum ^ word);
        }
        black_box(sum);
    };
    thread::scope(|scope| {
        (1..n_threads).for_each(|_| drop(scope.spawn(read)));
        read();
    });
}

const TOUCH_BYTES: usize = 16 << 20;

/// Fills memory of ours as a program fills that of its model, twice, and reports the second time: no page is new then.
fn refill(path: &Path, args: &LoadArgs, cached_before: &HashMap<PathBuf, Option<u64>>) -> Result<()> {
    let checkpoint = unladen::open_with(path, &args.open.options())?;
    let options = args.how.options(Intent::Private);
    if let Some(device) = options.devices().into_iter().find(|it| *it != Device::Host) {
        let fault = Fault::new("a load to the host, whose memory can be filled again", device.to_string());
        return Err(fault.hint("leave --refill out, or load to the host (--device host)").unsupported());
    }
    let mut memory: HashMap<&str, (&Layout, Vec<u8>)> = HashMap::new();
    let sizes = LoadPlan::into_caller_memory(&checkpoint, &options, &checkpoint.machine(&options))?;
    for (tensor, layout) in sizes.layouts() {
        let bytes = vec![0; layout.len_bytes() as usize];
        memory.insert(&checkpoint.tensor(tensor).name, (layout, bytes));
    }
    let mut fill = |is_measured: bool| {
        let buffers = memory.iter_mut().map(|(name, (layout, bytes))| {
            (*name, TensorBuffer { dtype: layout.dtype(), shape: layout.shape(), bytes: &mut bytes[..] })
        });
        let buffers: HashMap<&str, TensorBuffer<'_>> = buffers.collect();
        let began = Instant::now();
        let run = RunOptions { progress: Some(watch::progress()), ..RunOptions::default() };
        let load = || watch::with_bar("filling", || checkpoint.load_into_buffers(buffers, &options, run));
        let method = Method::HighWater;
        let (loaded, measured) =
            if is_measured { memory::measure(method, load) } else { (load(), Measured::default()) };
        let loaded = loaded?;
        let load_s = began.elapsed().as_secs_f64();
        let digest = args.digest && is_measured;
        let digest = digest.then(|| verify::digest_of(&loaded.state, path, watch::progress())).transpose()?;
        Ok((load_s, measured, loaded.peaks, device_rows(&sizes, &loaded), digest))
    };
    fill(false)?;
    let (load_s, measured, peaks, devices, digest) = fill(true)?;
    let row = row_of(&checkpoint, &sizes, args.how.host_budget, load_s, &measured, cached_before);
    let device_peak_bytes = peaks.device_bytes.total_bytes();
    report(&Row { strategy: "existing".to_owned(), device_peak_bytes, devices, digest, ..row }, args.json);
    Ok(())
}

/// What every load has to say for itself; the rest is nothing.
fn row_of(
    checkpoint: &OpenCheckpoint,
    plan: &LoadPlan,
    host_budget_bytes: u64,
    load_s: f64,
    measured: &Measured,
    cached_before: &HashMap<PathBuf, Option<u64>>,
) -> Row {
    // What is packed in a file is no file to the page cache.
    let files = || checkpoint.files.iter().filter(|it| it.packed.is_none()).map(|it| &it.path);
    let predicted = plan.predicted();
    Row {
        strategy: plan.strategy().to_string(),
        load_s,
        tensors: plan.layouts().count(),
        bytes: plan.brought_bytes(),
        weights_bytes: plan.weights_bytes(),
        weights_on_host_bytes: plan.weights_by_device().host_bytes,
        is_mapped: false,
        host_budget_bytes: Some(host_budget_bytes).filter(|it| *it < u64::MAX),
        io: io_of(plan),
        host_peak_anon_bytes: measured.peak_anon_bytes,
        host_peak_rss_bytes: measured.peak_rss_bytes,
        device_peak_bytes: 0,
        driver_peak_bytes: None,
        devices: Vec::new(),
        is_pinned: None,
        why_pageable: None,
        context_s: None,
        context_host_anon_bytes: None,
        mapped_peak_bytes: 0,
        predicted_host_peak_anon_bytes: predicted.host_anon_bytes,
        predicted_host_peak_rss_bytes: predicted.host_rss_bytes,
        predicted_device_peak_bytes: predicted.device_bytes.total_bytes(),
        predicted_mapped_peak_bytes: predicted.mapped_bytes,
        measured_by: measured.method.name().to_owned(),
        notebook_rss_bytes: measured.polled_rss_bytes,
        cgroup_peak_bytes: memory::cgroup_peak_bytes(),
        page_cache_before_bytes: files().map(|file| cached_before.get(file).copied().flatten()).sum(),
        page_cache_after_bytes: files().map(|file| cached_bytes(file)).sum(),
        digest: None,
        forward_s: None,
    }
}

/// `buffered`, or what there is, joined by a comma.
fn io_of(plan: &LoadPlan) -> String {
    let mut names = plan.inputs();
    names.sort_unstable();
    names.dedup();
    names.join(",")
}

fn report(row: &Row, json: bool) {
    match json {
        true => out::result(&serde_json::to_string(row).expect("strings and numbers")),
        false => print(row),
    }
}

/// The proof: seconds of the forward pass, its last logits in a file. `None` (said why) if it cannot be run.
fn forward(
    checkpoint: &OpenCheckpoint,
    loaded: &Loaded<'_>,
    args: &LoadArgs,
    to: &Path,
) -> Result<Option<f64>> {
    let options = args.how.options(Intent::Private);
    let kind = match gpt2_file::recognise_or_skip(checkpoint, args.heads, &options) {
        Ok(kind) => kind,
        Err(reason) => {
            out::words(&format!("forward pass skipped: {reason}"));
            return Ok(None);
        }
    };
    let began = Instant::now();
    let logits = gpt2_file::forward(&loaded.state, &kind, &gpt2_file::PROBE, None)?;
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
pub(crate) fn files_of(path: &Path, options: &OpenOptions) -> Vec<PathBuf> {
    let stamps = unladen::open_with(path, options).map(|it| it.files().stamps()).unwrap_or_default();
    stamps.into_iter().filter(|it| it.packed.is_none()).map(|it| it.path).collect()
}

fn print(row: &Row) {
    let speed = match row.is_mapped {
        false => format!("{:.2} GB/s", row.bytes as f64 / row.load_s / 1e9),
        true => "mapped: bytes are read when they are touched".to_owned(),
    };
    out::result(&format!(
        "{} tensors, {}, in {} s, {speed}; `{}`, {}",
        row.tensors,
        human::bytes(row.bytes),
        human::seconds(row.load_s),
        row.strategy,
        row.io
    ));
    let line = |what: &str, measured: u64, predicted: u64, how: &str| {
        out::result(&format!(
            "{what:<12} {:>9}   predicted {:>9}   {how}",
            human::bytes(measured),
            human::bytes(predicted)
        ));
    };
    for device in &row.devices {
        let what = match &device.device[..] {
            "host" => "device peak",
            name => name,
        };
        let of_driver = device.driver_peak_bytes.zip(device.predicted_driver_peak_bytes);
        let driver = of_driver.map(|(peak, predicted)| {
            format!(", by the driver {}, predicted {}", human::bytes(peak), human::bytes(predicted))
        });
        let how = format!("by the ledger{}", driver.unwrap_or_default());
        line(what, device.peak_bytes, device.predicted_peak_bytes, &how);
    }
    if let (Some(open_s), Some(bytes)) = (row.context_s, row.context_host_anon_bytes) {
        out::result(&format!(
            "{:<12} {:>9}   on the host for the driver, before the load, in {} s",
            "context",
            human::bytes(bytes),
            human::seconds(open_s)
        ));
    }
    line("host peak", row.host_peak_anon_bytes, row.predicted_host_peak_anon_bytes, &row.measured_by);
    let over = |peak_bytes: u64| peak_bytes.saturating_sub(row.weights_on_host_bytes);
    let budget =
        row.host_budget_bytes.map_or("no budget".to_owned(), |it| format!("budget {}", human::bytes(it)));
    line("besides", over(row.host_peak_anon_bytes), over(row.predicted_host_peak_anon_bytes), &budget);
    if let Some(digest) = &row.digest {
        out::result(&format!("digest       {digest}"));
    }
}
