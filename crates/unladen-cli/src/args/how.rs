//! How to load: the words that every command takes which loads.

use super::{device, strategy};
use crate::human;
use clap::Args as ClapArgs;
use unladen::{Casts, Checkpoint, Device, DeviceMap, Intent, IoPath, LoadPlan, PlanOptions, Strategy};

/// Where tensors go and how their bytes come there, whatever the strategy: what `compare` takes too.
#[derive(ClapArgs, Clone)]
pub(crate) struct WayArgs {
    /// Where the weights go: host, or a GPU: cuda:0, cuda:1 and so on; `unladen devices` lists them.
    #[arg(long, default_value = "host", value_parser = device)]
    pub(crate) device: Device,
    /// Tensors that go elsewhere, by name or module: `trf_blocks.0-23=cuda:0,*=cuda:1`, the first rule that fits decides.
    #[arg(long, value_name = "RULES", value_parser = device_map)]
    pub(crate) device_map: Option<DeviceMap>,
    /// Give each tensor on a GPU memory of its own, that can be freed singly. The driver then rounds each up by itself, to
    /// 2 MiB mostly, where otherwise one range holds all: `unladen plan` says what it takes.
    #[arg(long)]
    pub(crate) free_singly: bool,
    /// What may be allocated on each device, weights included; by default, what is free.
    #[arg(long, value_name = "BYTES", default_value = "none", value_parser = human::parse_bytes)]
    pub(crate) device_budget: u64,
    /// Cast on the way: bf16, f16, f32 or f64, or rules such as `*.norm*=keep,*.weight=bf16`, the first that matches.
    #[arg(long, value_name = "RULES", default_value = "keep", value_parser = casts)]
    pub(crate) dtype: Casts,
    /// How bytes come from the file: buffered, drop-behind, direct or mixed; by default, by what the page cache holds.
    #[arg(long, value_name = "PATH", value_parser = io_path)]
    pub(crate) io: Option<IoPath>,
    /// Leave the file in the page cache, because other processes load it too.
    #[arg(long, conflicts_with = "io")]
    pub(crate) share_cache: bool,
    /// Threads that read, 256 at most; by default, as many as there are processors, up to 8, and 8 for a disk.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

impl WayArgs {
    /// The rest is as by default.
    pub(crate) fn options(&self) -> PlanOptions {
        PlanOptions {
            device: self.device,
            device_map: self.device_map.clone().unwrap_or_default(),
            frees_singly: self.free_singly,
            device_budget_bytes: self.device_budget,
            n_threads: self.threads,
            casts: self.dtype.clone(),
            io: self.io,
            share_cache: self.share_cache,
            ..PlanOptions::default()
        }
    }

    /// The same words again, for a command that is started by another.
    pub(crate) fn words(&self) -> Vec<String> {
        // Each field by its name: a new one is not forgotten here.
        let WayArgs { device, device_map, free_singly, device_budget, dtype, io, share_cache, threads } =
            self;
        let device = [format!("--device={device}")].into_iter();
        let device_map = device_map.iter().map(|it| format!("--device-map={it}"));
        let free_singly = free_singly.then(|| "--free-singly".to_owned());
        let device_budget = [format!("--device-budget={}", human::unparse_bytes(*device_budget))];
        let dtype = [format!("--dtype={dtype}")];
        let io = io.map(|it| format!("--io={}", it.name()));
        let share_cache = share_cache.then(|| "--share-cache".to_owned());
        let threads = threads.map(|it| format!("--threads={it}"));
        let words = device.chain(device_map).chain(free_singly).chain(device_budget).chain(dtype);
        words.chain(io).chain(share_cache).chain(threads).collect()
    }

    /// A warning for each rule of the casts and of the device map that decides about nothing.
    pub(crate) fn unused(&self, checkpoint: &Checkpoint) -> Vec<String> {
        let names = || checkpoint.tensors.iter().map(|it| it.name.as_str());
        let device_map = self.device_map.as_ref().map(|it| it.unused(names())).unwrap_or_default();
        let rules = self.dtype.unused(names()).into_iter().chain(device_map);
        rules.map(|it| format!("warning: `{it}` decides about no tensor")).collect()
    }

    /// A warning if the plan has no tensor that can be freed singly, and one was asked for.
    pub(crate) fn frees_none_singly(&self, plan: &LoadPlan) -> Option<&'static str> {
        let is_idle = self.free_singly && !plan.is_for_gpus();
        is_idle.then_some("warning: --free-singly does nothing here: it is for tensors on GPUs")
    }
}

/// How to load: what every command that loads takes.
#[derive(ClapArgs)]
pub(crate) struct HowArgs {
    /// The way of loading: auto (the fastest that fits), naive, sequential, meta, mmap, mmap-copy, per-tensor or stream.
    #[arg(long, default_value = "auto", value_parser = choice)]
    pub(crate) strategy: Choice,
    /// What will happen to the weights: private (they may be written to) or read-only (the file's own pages will do).
    /// By default private, but read-only for `gpt2`, which only reads. It is for `auto`: a named strategy does what it does.
    #[arg(long, value_parser = intent)]
    pub(crate) intent: Option<Intent>,
    /// What the load may hold in host memory besides the weights: 64MiB, 512M, 1.5GiB or none.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = human::parse_bytes)]
    pub(crate) host_budget: u64,
    #[command(flatten)]
    pub(crate) way: WayArgs,
}

/// A strategy, or the choice of one.
#[derive(Clone, Copy)]
pub(crate) enum Choice {
    Auto,
    Named(Strategy),
}

impl HowArgs {
    /// `intent`: the one that the command has unless the user names another.
    pub(crate) fn options(&self, intent: Intent) -> PlanOptions {
        PlanOptions {
            strategy: match self.strategy {
                Choice::Auto => None,
                Choice::Named(strategy) => Some(strategy),
            },
            intent: self.intent.unwrap_or(intent),
            host_budget_bytes: self.host_budget,
            ..self.way.options()
        }
    }
}

fn choice(text: &str) -> Result<Choice, String> {
    match text {
        "auto" => Ok(Choice::Auto),
        _ => strategy(text).map(Choice::Named).map_err(|known| format!("{known}, and auto")),
    }
}

fn intent(text: &str) -> Result<Intent, String> {
    text.parse().map_err(|_| "known are private and read-only".to_owned())
}

fn io_path(text: &str) -> Result<IoPath, String> {
    text.parse().map_err(|error: unladen::Error| error.to_string())
}

fn casts(text: &str) -> Result<Casts, String> {
    Casts::parse(text).map_err(|error| format!("{error}; {}", error.hint()))
}

fn device_map(text: &str) -> Result<DeviceMap, String> {
    text.parse().map_err(|error: unladen::Error| format!("{error}; {}", error.hint()))
}
