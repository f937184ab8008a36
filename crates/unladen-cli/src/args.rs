//! The words of the command line.

mod how;

pub(crate) use how::{Choice, HowArgs, WayArgs};

use crate::{
    human,
    limits::{self, Limit},
};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use unladen::{Device, Format, Limits, OpenOptions, Strategy, checkpoint::Root};

/// Loads neural-network weights with no extra weight.
#[derive(Parser)]
#[command(name = "unladen", version, max_term_width = 110)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Load a checkpoint in every way, each in a fresh process, and show what each costs.
    #[command(after_help = strategies())]
    Compare(CompareArgs),
    /// List a checkpoint's tensors. Reads headers only, unless a hash is asked for.
    Inspect(InspectArgs),
    /// Say what a load would do and take, here or on a machine elsewhere. Reads headers only.
    #[command(after_help = strategies())]
    Plan(PlanArgs),
    /// Load a checkpoint once and say what it took.
    #[command(after_help = strategies())]
    Load(LoadArgs),
    /// Save a checkpoint in another format, streaming.
    Convert(ConvertArgs),
    /// List the devices that weights can go to: the host and each GPU, and what is free there.
    Devices(DevicesArgs),
    /// Read everything and say whether it is whole, as a manifest says, or the same as in another checkpoint.
    #[command(after_help = VERIFY_EXITS)]
    Verify(VerifyArgs),
    /// Let loads to a GPU fail, and see whether its memory comes back: what `scripts/gpu-check` runs on a real one.
    #[command(hide = true)]
    GpuFaults(GpuFaultsArgs),
    /// GPT-2: the proof that the weights work.
    #[command(subcommand)]
    Gpt2(Gpt2Command),
}

#[derive(Subcommand)]
pub(crate) enum Gpt2Command {
    /// Save a randomly initialised GPT-2.
    Save(SaveArgs),
    /// Load a GPT-2 and print the logits of some tokens.
    Forward(ForwardArgs),
    /// Load a GPT-2 and continue a text, greedily.
    Generate(GenerateArgs),
}

/// What is opened and how trustingly: what every command that opens a checkpoint takes.
#[derive(ClapArgs, Clone)]
pub(crate) struct OpenArgs {
    /// Open only what is named below this path, such as `model` or `a.b`, by the names from there on. auto: the state dict,
    /// where other things stand beside it (`unladen inspect` says which).
    #[arg(long, value_name = "PATH")]
    pub(crate) root: Option<Root>,
    /// Refuse a file that names what PyTorch's weights_only would refuse, or that goes on behind its end. Without it both
    /// are warnings: nothing that a file names is run in either case.
    #[arg(long)]
    pub(crate) strict: bool,
    /// Let the files that a weight map names be links to anywhere, not only within their folder or Hugging Face's cache.
    #[arg(long)]
    pub(crate) follow_links: bool,
    // Its help lists the names.
    #[arg(long = "limit", value_name = "NAME=VALUE", value_parser = limits::parse, help = limits::help())]
    pub(crate) limits: Vec<Limit>,
}

impl OpenArgs {
    pub(crate) fn options(&self) -> OpenOptions {
        let mut limits = Limits::default();
        self.limits.iter().for_each(|it| it.apply(&mut limits));
        OpenOptions { limits, root: self.root.clone(), strict: self.strict, follow_links: self.follow_links }
    }

    /// As [`OpenArgs::options`], for another copy of a checkpoint that was opened already: all of it, and without questions.
    pub(crate) fn options_of_copy(&self) -> OpenOptions {
        OpenOptions { root: None, strict: false, ..self.options() }
    }

    /// The same words again, for a command that is started by another.
    pub(crate) fn words(&self) -> Vec<String> {
        let root = self.root.iter().map(|it| format!("--root={it}"));
        let strict = self.strict.then(|| "--strict".to_owned());
        let follow_links = self.follow_links.then(|| "--follow-links".to_owned());
        root.chain(strict).chain(follow_links).chain(self.words_of_copy()).collect()
    }

    /// As [`OpenArgs::words`], for another copy of a checkpoint that was opened already.
    pub(crate) fn words_of_copy(&self) -> Vec<String> {
        self.limits.iter().map(Limit::word).collect()
    }
}

#[derive(ClapArgs)]
pub(crate) struct PlanArgs {
    /// A checkpoint: a file, a weight map, or a folder.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    #[command(flatten)]
    pub(crate) how: HowArgs,
    /// Free host memory of the machine that is meant, if it is not this one.
    #[arg(long, value_name = "BYTES", value_parser = human::parse_bytes)]
    pub(crate) free_host: Option<u64>,
    /// Free memory of its GPUs, of each, as their driver would say it: what it rounds up is counted, by granules of 2 MiB.
    /// By default what is free on those here, and of one that is not here, enough.
    #[arg(long, value_name = "BYTES", value_parser = human::parse_bytes)]
    pub(crate) free_device: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct CompareArgs {
    /// The checkpoint; without one, a randomly initialised GPT-2 is saved once and used.
    #[arg(conflicts_with = "gpt2")]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// The size of that GPT-2: tiny, small, medium, large or xl.
    #[arg(long, value_name = "SIZE", default_value = "small", value_parser = gpt2_size)]
    pub(crate) gpt2: String,
    /// Only these strategies, separated by commas.
    #[arg(long, value_delimiter = ',', value_parser = strategy)]
    pub(crate) strategies: Vec<Strategy>,
    /// Drop the file from the page cache before each load; without it, the file is read into the cache first.
    #[arg(long)]
    pub(crate) cold: bool,
    /// What each load may hold in host memory besides the weights; by default, whatever it takes, to see it.
    #[arg(long, value_name = "BYTES", default_value = "none", value_parser = human::parse_bytes)]
    pub(crate) host_budget: u64,
    #[command(flatten)]
    pub(crate) way: WayArgs,
    /// Folder for what is saved here: the GPT-2, and a checkpoint's tensors as single files. It stays there.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Attention heads, for a GPT-2 of an unusual width (else its config.json is asked).
    #[arg(long)]
    pub(crate) heads: Option<usize>,
    /// One JSON line per strategy.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct InspectArgs {
    /// A checkpoint: a file, a weight map, or a folder.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// Read everything, and print a hash of each tensor's contiguous little-endian bytes.
    #[arg(long)]
    pub(crate) hash: Option<Hash>,
    /// Print what stands beside the tensors instead: epochs, hyper-parameters, optimizer settings; with =full, all of it.
    /// With --root, what stands at that path alone, such as `hyper_parameters` or `optimizer.param_groups.0.lr`.
    #[arg(long, value_name = "full", num_args = 0..=1, require_equals = true, default_missing_value = "cut",
        conflicts_with = "hash")]
    pub(crate) tree: Option<Tree>,
    /// What reading everything may hold in host memory: 64MiB, 512M, 1.5GiB or none.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = human::parse_bytes)]
    pub(crate) host_budget: u64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How much of a tree is printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tree {
    /// Long and deep things are cut and counted.
    Cut,
    /// Everything.
    Full,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Hash {
    Sha256,
}

#[derive(ClapArgs)]
pub(crate) struct LoadArgs {
    /// A checkpoint: a file, a weight map, or a folder.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    #[command(flatten)]
    pub(crate) how: HowArgs,
    /// Fill the same memory a second time and say what that took: the price of refilling a model that is there.
    #[arg(long, conflicts_with_all = ["touch", "logits_to", "strategy", "intent"])]
    pub(crate) refill: bool,
    /// Read every byte of the weights, on the clock: a mapping that is never touched costs nothing.
    #[arg(long)]
    pub(crate) touch: bool,
    /// Compute one hash over all that was loaded, outside the clock.
    #[arg(long)]
    pub(crate) digest: bool,
    /// Print one JSON line.
    #[arg(long)]
    pub(crate) json: bool,
    /// If this is a GPT-2, write the logits of tokens 1, 2, 3 to a file: how `compare` proves the weights.
    #[arg(long, hide = true)]
    pub(crate) logits_to: Option<PathBuf>,
    /// Attention heads, for a GPT-2 of an unusual width.
    #[arg(long, hide = true)]
    pub(crate) heads: Option<usize>,
}

#[derive(ClapArgs)]
pub(crate) struct ConvertArgs {
    /// The checkpoint.
    #[arg(value_name = "IN")]
    pub(crate) input: PathBuf,
    /// What to write: NAME.pth, NAME.safetensors, or a folder with one file per tensor.
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// The format, where OUT does not say it.
    #[arg(long, value_parser = format)]
    pub(crate) to: Option<Format>,
    /// What the conversion may hold in host memory: 64MiB, 512M, 1.5GiB or none.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = human::parse_bytes)]
    pub(crate) host_budget: u64,
    /// Replace OUT if it is there.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(ClapArgs)]
pub(crate) struct DevicesArgs {
    /// Measure instead what the bus to a GPU brings at most: copies from pinned memory, which loads can be compared with.
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub(crate) measure_bus: Option<Device>,
    /// What is copied in each of the measurement's five rounds.
    #[arg(long, value_name = "BYTES", default_value = "4GiB", requires = "measure_bus", value_parser = human::parse_bytes)]
    pub(crate) bytes: u64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct GpuFaultsArgs {
    /// A checkpoint: a file, a weight map, or a folder.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// The GPU. Its memory will be filled up for a while, all of it.
    #[arg(long, default_value = "cuda:0", value_parser = device)]
    pub(crate) device: Device,
    /// What each load may hold in host memory.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = human::parse_bytes)]
    pub(crate) host_budget: u64,
    /// One JSON line per step.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct VerifyArgs {
    /// A checkpoint: a file, a weight map, or a folder. Its records are compared with their checksums, and the indices of
    /// sparse and nested tensors with their bounds.
    pub(crate) file: PathBuf,
    /// Another checkpoint, of any format: do both hold the same tensors? A sparse, nested or quantised tensor or a subclass
    /// is not the same as plain tensors with the names of its parts, which is what other formats hold of it. With it
    /// nothing else is checked.
    #[arg(conflicts_with_all = ["manifest", "write_manifest"])]
    pub(crate) other: Option<PathBuf>,
    // A path is for both; `--root`'s own help is the same for all commands.
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// Compare every tensor with a manifest: name, type, shape and bytes, and what is made of several of them.
    #[arg(long, value_name = "JSON")]
    pub(crate) manifest: Option<PathBuf>,
    /// Write a manifest: it holds for every copy of these tensors, in any format.
    #[arg(long, value_name = "JSON", conflicts_with = "manifest")]
    pub(crate) write_manifest: Option<PathBuf>,
    /// Replace the manifest that is to be written, if it is there.
    #[arg(long, requires = "write_manifest")]
    pub(crate) force: bool,
    /// What reading everything may hold in host memory: 64MiB, 512M, 1.5GiB or none.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = human::parse_bytes)]
    pub(crate) host_budget: u64,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct SaveArgs {
    /// What to write: NAME.pth, NAME.safetensors, or a folder with one file per tensor.
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// tiny, small (124M), medium (355M), large (774M) or xl (1558M).
    #[arg(long, default_value = "small", value_parser = gpt2_size)]
    pub(crate) size: String,
    /// The same seed gives the same weights.
    #[arg(long, default_value_t = 123)]
    pub(crate) seed: u64,
    /// The format, where OUT does not say it.
    #[arg(long, value_parser = format)]
    pub(crate) to: Option<Format>,
    /// Replace OUT if it is there.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(ClapArgs)]
pub(crate) struct ForwardArgs {
    /// The checkpoint.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
    pub(crate) tokens: Vec<u32>,
    #[command(flatten)]
    pub(crate) how: HowArgs,
    /// Attention heads, for a GPT-2 of an unusual width (else config.json is asked).
    #[arg(long)]
    pub(crate) heads: Option<usize>,
    /// Print all logits as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(ClapArgs)]
pub(crate) struct GenerateArgs {
    /// The checkpoint.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    /// The text to continue.
    #[arg(long, default_value = "Every effort moves you")]
    pub(crate) prompt: String,
    /// How many tokens to add.
    #[arg(long, default_value_t = 30)]
    pub(crate) tokens: usize,
    #[command(flatten)]
    pub(crate) how: HowArgs,
    /// Attention heads, for a GPT-2 of an unusual width (else config.json is asked).
    #[arg(long)]
    pub(crate) heads: Option<usize>,
}

/// How `verify` exits, and what only it does with a root.
const VERIFY_EXITS: &str = "\
With OTHER, --root goes for both; where OTHER has nothing below it, all of OTHER is compared, with a note.

Exit code: 0 if all is right, or both hold the same tensors; 1 if something is damaged or differs, a file that cannot
be read for what it holds included; 2 if that cannot be told: a file is missing or none that is known, the budget is
too small, or the words are wrong.";

/// The ways of loading, a line each.
fn strategies() -> String {
    let lines = Strategy::all().map(|it| format!("  {:<10}  {}", it.name(), it.describe()));
    format!("Strategies:\n{}", lines.collect::<Vec<_>>().join("\n"))
}

fn strategy(text: &str) -> Result<Strategy, String> {
    let known: Vec<_> = Strategy::all().map(Strategy::name).collect();
    text.parse().map_err(|_| format!("known are {}", known.join(", ")))
}

fn device(text: &str) -> Result<Device, String> {
    text.parse().map_err(|error: unladen::Error| format!("{error}; {}", error.hint()))
}

fn format(text: &str) -> Result<Format, String> {
    Format::writable()
        .find(|it| it.name() == text)
        .ok_or_else(|| "known are pth, safetensors, folder".to_owned())
}

fn gpt2_size(text: &str) -> Result<String, String> {
    match unladen_gpt2::Config::named(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("known are tiny, small, medium, large, xl".to_owned()),
    }
}
