//! `unladen plan`: what a load would do and take. Reads headers only.

use crate::{args::PlanArgs, human, out};
use comfy_table::{CellAlignment, LineStyle, Table, presets};
use serde::Serialize;
use unladen::{
    Device, Intent, LoadPlan, Machine, OpenCheckpoint, Result,
    cuda::Context,
    device::PerDevice,
    memory::Space,
    plan::{Part, Read, Step, UNKNOWN_GPU_BYTES, Way},
    stamp::FileStamp,
};

pub(crate) fn run(args: &PlanArgs) -> Result<()> {
    let checkpoint = unladen::open_with(&args.file, &args.open.options())?;
    let options = args.how.options(Intent::Private);
    let mut machine = checkpoint.machine(&options);
    machine.free_host_bytes = args.free_host.unwrap_or(machine.free_host_bytes);
    if let Some(free_bytes) = args.free_device {
        // The machine that is meant has GPUs of its own.
        machine.free_device_bytes = PerDevice::of_each_gpu(free_bytes);
    }
    let plan = LoadPlan::new(&checkpoint, &options, &machine)?;
    let report = report(&checkpoint, &plan, options.host_budget_bytes, &machine);
    if args.json {
        out::result(&serde_json::to_string(&report).expect("strings and numbers"));
    } else {
        print(&report);
    }
    args.how.way.unused(&checkpoint).iter().for_each(|it| out::words(it));
    args.how.way.frees_none_singly(&plan).iter().for_each(|it| out::words(it));
    if args.free_device.is_some() && !plan.is_for_gpus() {
        out::words(
            "warning: --free-device does nothing here: it is for loads to GPUs (--device, --device-map)",
        );
    }
    checkpoint.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    Ok(())
}

/// What is printed, sizes in bytes.
#[derive(Serialize)]
struct Report {
    strategy: String,
    device: String,
    threads: usize,
    tensors: usize,
    /// Memory that stays.
    weights_bytes: u64,
    /// The most that the load holds in host memory besides.
    overhead_bytes: u64,
    /// Of which names, shapes, steps and stacks.
    bookkeeping_bytes: u64,
    /// `null`: none.
    host_budget_bytes: Option<u64>,
    predicted_host_peak_anon_bytes: u64,
    predicted_device_peak_bytes: u64,
    devices: Vec<DeviceLine>,
    predicted_mapped_peak_bytes: u64,
    free_host_bytes: Option<u64>,
    read_bytes: u64,
    files: Vec<FileLine>,
    steps: Vec<Line>,
}

#[derive(Serialize)]
struct DeviceLine {
    device: String,
    weights_bytes: u64,
    /// What is asked for.
    predicted_peak_bytes: u64,
    /// What the driver takes for that, in whole granules; `null` for the host.
    predicted_driver_peak_bytes: Option<u64>,
    /// Of the GPU; `null`: nobody asked a driver, nor was told; and for the host.
    free_bytes: Option<u64>,
    /// Why this machine cannot load to the GPU; `null`: it can.
    why_absent: Option<String>,
}

#[derive(Serialize)]
struct FileLine {
    path: String,
    bytes: u64,
    io: &'static str,
}

/// Consecutive steps of one kind.
#[derive(Serialize)]
struct Line {
    step: &'static str,
    count: u64,
    bytes: u64,
    what: String,
}

fn report(checkpoint: &OpenCheckpoint, plan: &LoadPlan, host_budget_bytes: u64, machine: &Machine) -> Report {
    let predicted = plan.predicted();
    let files = checkpoint.files.iter().zip(plan.inputs());
    Report {
        strategy: plan.strategy().to_string(),
        device: plan.devices().iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        threads: plan.n_threads(),
        tensors: plan.layouts().count(),
        weights_bytes: plan.weights_bytes(),
        overhead_bytes: plan.overhead_bytes(),
        bookkeeping_bytes: plan.bookkeeping_bytes(),
        host_budget_bytes: Some(host_budget_bytes).filter(|it| *it < u64::MAX),
        predicted_host_peak_anon_bytes: predicted.host_anon_bytes,
        predicted_device_peak_bytes: predicted.device_bytes.total_bytes(),
        devices: plan.devices().iter().map(|it| device_line(plan, *it, machine)).collect(),
        predicted_mapped_peak_bytes: predicted.mapped_bytes,
        free_host_bytes: Some(machine.free_host_bytes).filter(|it| *it < u64::MAX),
        read_bytes: plan.read_bytes(),
        files: files.map(|(file, io)| FileLine { path: name_of(file), bytes: file.len_bytes, io }).collect(),
        steps: lines(plan),
    }
}

fn device_line(plan: &LoadPlan, device: Device, machine: &Machine) -> DeviceLine {
    let is_gpu = device != Device::Host;
    let why_absent = match device {
        Device::Cuda(ordinal) => Context::open(ordinal).err(),
        _ => None,
    };
    DeviceLine {
        device: device.to_string(),
        weights_bytes: plan.weights_by_device().get(device),
        predicted_peak_bytes: plan.predicted().device_bytes.get(device),
        predicted_driver_peak_bytes: is_gpu.then(|| plan.predicted_driver_bytes().get(device)),
        free_bytes: is_gpu
            .then(|| machine.free_device_bytes.get(device))
            .filter(|it| *it != UNKNOWN_GPU_BYTES),
        why_absent: why_absent.map(|it| it.to_string()),
    }
}

/// The path, and of a packed record its name too.
fn name_of(file: &FileStamp) -> String {
    let path = file.path.display();
    match &file.packed {
        Some(packed) => format!("{path}: {}", packed.name.escape_debug()),
        None => path.to_string(),
    }
}

fn lines(plan: &LoadPlan) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for step in plan.steps() {
        let line = line(step);
        match lines.last_mut().filter(|last| last.step == line.step && last.what == line.what) {
            Some(last) => {
                last.count += 1;
                last.bytes += line.bytes;
            }
            None => lines.push(line),
        }
    }
    lines
}

fn line(step: &Step) -> Line {
    let line = |step, bytes, what: String| Line { step, count: 1, bytes, what };
    match step {
        Step::Reserve { space, len_bytes, owner, .. } => {
            let space = match space {
                Space::Host | Space::Staging | Space::Bookkeeping => "host".to_owned(),
                Space::Device(Device::Host) => "device".to_owned(),
                Space::Device(device) => device.to_string(),
                Space::Mapped => "mapped".to_owned(),
            };
            line("reserve", *len_bytes, format!("{owner} ({space})"))
        }
        Step::Adopt { .. } => line("adopt", 0, "the caller's memory".to_owned()),
        Step::Map { len_bytes, .. } => line("map", *len_bytes, "a file".to_owned()),
        Step::Fill(fills) => {
            line("fill", fills.iter().map(|it| it.target.len_bytes).sum(), "initial values".to_owned())
        }
        Step::Stream { staging, chunk_bytes, fresh, reads } => line(
            "stream",
            reads.iter().map(|it| it.len_bytes).sum(),
            how(staging.len(), *chunk_bytes, fresh.is_some_and(|it| it.is_placed), reads),
        ),
        Step::Upload { staging, rooms, reads, .. } => line(
            "upload",
            reads.iter().map(|it| it.len_bytes).sum(),
            how(staging.len(), rooms.chunk_bytes, false, reads),
        ),
        Step::Populate { ranges, .. } => {
            line("populate", ranges.iter().map(|it| it.end - it.start).sum(), "pages of a mapping".to_owned())
        }
        Step::Copy(copy) => line("copy", copy.target.len_bytes, "from memory to memory".to_owned()),
        Step::Release(_) => line("release", 0, String::new()),
        Step::HandOver { layout, .. } => line("hand over", layout.len_bytes(), "a tensor".to_owned()),
    }
}

/// `2 in place, 819 cast or resolved; chunks of 256 KiB through 2 buffers, pages put in place`.
fn how(n_buffers: usize, chunk_bytes: u64, is_placed: bool, reads: &[Read]) -> String {
    let is_changed = |parts: &[Part]| parts.iter().any(|it| !it.change.is_nothing());
    let count = |is_it: &dyn Fn(&Way) -> bool| reads.iter().filter(|it| is_it(&it.way)).count();
    let kinds = [
        (count(&|it| matches!(it, Way::Plain)), "as they are"),
        (count(&|it| matches!(it, Way::Elements(change) if change.is_nothing())), "by way of a buffer"),
        (count(&|it| matches!(it, Way::Elements(change) if !change.is_nothing())), "changed"),
        (count(&|it| matches!(it, Way::Parts(parts) if !is_changed(parts))), "of several tensors"),
        (count(&|it| matches!(it, Way::Parts(parts) if is_changed(parts))), "of several tensors, changed"),
        (count(&is_widened), "widened on the host"),
        (count(&|it| matches!(it, Way::Gather(_) | Way::Boxes(_)) && !is_widened(it)), "brought into order"),
    ];
    let kinds = kinds.iter().filter(|(n, _)| *n > 0).map(|(n, kind)| format!("{n} {kind}"));
    let mut words = format!("reads: {}", kinds.collect::<Vec<_>>().join(", "));
    if n_buffers > 0 {
        words += &format!("; chunks of {} through {n_buffers} buffers", human::bytes(chunk_bytes));
    }
    if is_placed {
        words += ", pages put in place untouched";
    }
    words
}

/// True if elements stand in the file like in memory, and become wider on the way.
fn is_widened(way: &Way) -> bool {
    let gathers = match way {
        Way::Gather(gathers) => &gathers[..],
        Way::Boxes(gather) => std::slice::from_ref(&**gather),
        Way::Plain | Way::Elements(_) | Way::Parts(_) => return false,
    };
    gathers.iter().all(|it| it.block.axes.is_empty() && it.change.widens())
}

fn print(report: &Report) {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none()))
        .set_header(["step", "times", "bytes", "what"]);
    for line in report.steps.iter().filter(|it| !(it.step == "reserve" && it.bytes == 0)) {
        let bytes = if line.bytes == 0 { String::new() } else { human::bytes(line.bytes) };
        table.add_row([line.step.to_owned(), line.count.to_string(), bytes, line.what.clone()]);
    }
    for column in table.column_iter_mut().skip(1).take(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    out::result(&table.trim_fmt());
    let mut paths: Vec<(&str, usize, u64)> = Vec::new();
    for file in &report.files {
        match paths.iter_mut().find(|(io, ..)| *io == file.io) {
            Some((_, n, bytes)) => (*n, *bytes) = (*n + 1, *bytes + file.bytes),
            None => paths.push((file.io, 1, file.bytes)),
        }
    }
    let paths = paths.iter().map(|(io, n, bytes)| format!("{io} ({n} files, {})", human::bytes(*bytes)));
    let budget = report
        .host_budget_bytes
        .map_or("no budget".to_owned(), |it| format!("a budget of {}", human::bytes(it)));
    let rows = [
        ("strategy", format!("{} to {}, {} threads", report.strategy, report.device, report.threads)),
        ("input", paths.collect::<Vec<_>>().join(", ")),
        ("weights", format!("{} in {} tensors", human::bytes(report.weights_bytes), report.tensors)),
        (
            "overhead",
            format!(
                "{} of {budget}, {} of it names, shapes and stacks",
                human::bytes(report.overhead_bytes),
                human::bytes(report.bookkeeping_bytes)
            ),
        ),
        ("host peak", human::bytes(report.predicted_host_peak_anon_bytes)),
        ("mapped peak", human::bytes(report.predicted_mapped_peak_bytes)),
    ];
    let devices = report.devices.iter().map(|it| {
        let name = if it.device == "host" { "device peak" } else { &it.device };
        (name, words_of(it))
    });
    let absent = report.devices.iter().filter_map(|it| Some(("not here", elsewhere(it)?)));
    let rows = rows.into_iter().chain(devices).chain(absent);
    rows.for_each(|(name, value)| out::result(&format!("{name:<12} {value}")));
}

/// What a device has to have.
fn words_of(line: &DeviceLine) -> String {
    let peak = human::bytes(line.predicted_peak_bytes);
    let Some(driver_bytes) = line.predicted_driver_peak_bytes else { return peak };
    let free = line.free_bytes.map(|it| format!(" of {} free", human::bytes(it)));
    let free = free.unwrap_or_default();
    format!("{peak}, for which the driver takes {}{free}, 2 MiB at a time", human::bytes(driver_bytes))
}

/// Of a GPU that this machine does not have: what the plan is for.
fn elsewhere(line: &DeviceLine) -> Option<String> {
    let why_absent = line.why_absent.as_ref()?;
    let named = match why_absent.starts_with(&line.device) {
        true => String::new(),
        false => format!("{}: ", line.device),
    };
    let meant = match line.free_bytes {
        Some(free_bytes) => format!("one elsewhere with {} free", human::bytes(free_bytes)),
        None => "one elsewhere that has room for it (--free-device says what is free there)".to_owned(),
    };
    Some(format!("{named}{why_absent}; this is a plan for {meant}"))
}
