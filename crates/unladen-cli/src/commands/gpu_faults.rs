//! `unladen gpu-faults`: loads to a GPU that fail half-way, one after the other in one process. After each the GPU's memory
//! must be free again, and the next load must bring the same bytes.

use crate::{args::GpuFaultsArgs, human, out, watch};
use serde::Serialize;
use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use unladen::{
    Device, Error, LoadPlan, OpenCheckpoint, PlanOptions, Progress, Result, RunOptions, Strategy,
    cuda::{Context, Memory},
    error::Fault,
    memory::{Held, Reservation},
    plan::GRANULE_BYTES,
    verify,
};

/// How often a load is tried that may be over before it is cancelled.
const N_ATTEMPTS: usize = 5;

/// What was done, and what became of it.
#[derive(Serialize)]
struct Step {
    step: &'static str,
    /// As it has to be.
    is_kept: bool,
    found: String,
    seconds: f64,
    /// Of the GPU, before all steps and after this one.
    free_bytes_at_first: u64,
    free_bytes_after: u64,
}

/// One checkpoint and one GPU.
struct Bench<'a> {
    path: &'a Path,
    checkpoint: OpenCheckpoint,
    context: Context,
    options: PlanOptions,
    /// After a load that went well: whatever the driver keeps from the first use on is taken by then.
    free_bytes_at_first: u64,
    digest: String,
    is_json: bool,
    n_broken: usize,
}

pub(crate) fn run(args: &GpuFaultsArgs) -> Result<()> {
    let Device::Cuda(ordinal) = args.device else {
        let fault = Fault::new("a GPU, such as cuda:0", args.device.to_string());
        return Err(fault.hint("name one with --device; `unladen devices` lists them").mismatch());
    };
    let path = &args.file;
    let context = Context::open(ordinal)?;
    let checkpoint = unladen::open_with(path, &args.open.options())?;
    checkpoint.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    let options = PlanOptions {
        device: args.device,
        host_budget_bytes: args.host_budget,
        ..PlanOptions::new(Strategy::Stream)
    };
    let began = Instant::now();
    let digest = digest(path, &checkpoint, &options)?;
    let free_bytes_at_first = context.free_bytes()?;
    let is_json = args.json;
    let mut bench =
        Bench { path, checkpoint, context, options, free_bytes_at_first, digest, is_json, n_broken: 0 };
    let found = format!("digest {}", bench.digest);
    bench.report("a load, to compare with", began, Ok(found))?;
    bench.attempt("out of memory at the first allocation", |it| it.without_memory(false))?;
    bench.attempt("a load after it", Bench::load_again)?;
    bench.attempt("out of memory in the middle", |it| it.without_memory(true))?;
    bench.attempt("a load after that", Bench::load_again)?;
    bench.attempt("cancelled in the middle", Bench::cancelled)?;
    bench.attempt("a load at the end", Bench::load_again)?;
    match bench.n_broken {
        0 => Ok(()),
        broken => {
            let found = format!("{broken} that did not");
            let fault = Fault::new("steps that leave the GPU as they found it", found).hint(
                "end what else takes the GPU's memory meanwhile (`nvidia-smi` shows it), and try again; without it, please report this",
            );
            Err(fault.mismatch().in_file(path))
        }
    }
}

/// Loads, hashes what lies on the GPU, and gives it back.
fn digest(path: &Path, checkpoint: &OpenCheckpoint, options: &PlanOptions) -> Result<String> {
    let plan = checkpoint.plan(options)?;
    let loaded =
        checkpoint.run(&plan, RunOptions { progress: Some(watch::progress()), ..RunOptions::default() })?;
    verify::digest_of(&loaded.state, path, watch::progress())
}

/// By how much free memory may have shrunk: a granule. A driver that runs out may give up what it kept for itself, so there may be more than before.
fn is_back(before_bytes: u64, after_bytes: u64) -> bool {
    before_bytes.saturating_sub(after_bytes) <= GRANULE_BYTES
}

impl Bench<'_> {
    fn attempt(
        &mut self,
        step: &'static str,
        work: impl FnOnce(&Self) -> Result<Result<String, String>>,
    ) -> Result<()> {
        watch::progress().check(self.path)?;
        let began = Instant::now();
        let found = work(self)?;
        self.report(step, began, found)
    }

    /// `found`: what was expected, or what was not.
    fn report(&mut self, step: &'static str, began: Instant, found: Result<String, String>) -> Result<()> {
        let free_bytes_after = self.context.free_bytes()?;
        let free_bytes_at_first = self.free_bytes_at_first;
        let is_back = is_back(free_bytes_at_first, free_bytes_after);
        let is_kept = found.is_ok() && is_back;
        self.n_broken += usize::from(!is_kept);
        let found = found.unwrap_or_else(|it| it);
        let seconds = began.elapsed().as_secs_f64();
        let step = Step { step, is_kept, found, seconds, free_bytes_at_first, free_bytes_after };
        if self.is_json {
            out::result(&serde_json::to_string(&step).expect("strings and numbers"));
        } else {
            let verdict = if is_kept { "PASS" } else { "FAIL" };
            let free =
                format!("{} of {} free", human::bytes(free_bytes_after), human::bytes(free_bytes_at_first));
            out::result(&format!("{verdict}: {}: {}; {free}", step.step, step.found));
        }
        Ok(())
    }

    fn load_again(&self) -> Result<Result<String, String>> {
        let found = digest(self.path, &self.checkpoint, &self.options)?;
        Ok(if found == self.digest {
            Ok("the same digest".to_owned())
        } else {
            Err(format!("another digest, {found}"))
        })
    }

    /// A load that was planned while there was memory, and runs when there is only enough for half of the weights.
    /// `frees_singly`: each tensor takes its own, so that the first half has it.
    fn without_memory(&self, frees_singly: bool) -> Result<Result<String, String>> {
        let plan = self.checkpoint.plan(&PlanOptions { frees_singly, ..self.options.clone() })?;
        let filling = self.fill(plan.weights_bytes() / 2)?;
        let free_bytes_before = self.context.free_bytes()?;
        let mut held_bytes = 0;
        let mut look = |_, held: Held| held_bytes = held.device_bytes.total_bytes().max(held_bytes);
        let options = RunOptions { after_step: Some(&mut look), ..RunOptions::default() };
        let result = self.checkpoint.run(&plan, options).map(|_| ());
        let free_bytes_after = self.context.free_bytes()?;
        drop(filling);
        let words = match result {
            Ok(()) => return Ok(Err("the load went well without the memory".to_owned())),
            Err(Error::Device { message, .. }) => message,
            Err(error) => return Ok(Err(format!("another error: {error}"))),
        };
        let words = format!("{} held, then {words}", human::bytes(held_bytes));
        let is_back = is_back(free_bytes_before, free_bytes_after);
        let is_in_the_middle = !frees_singly || held_bytes > 0;
        Ok(if words.contains("OUT_OF_MEMORY") && is_back && is_in_the_middle {
            Ok(words)
        } else {
            let free = format!("{free_bytes_after} of {free_bytes_before} bytes free afterwards");
            Err(format!("{words}; {free}"))
        })
    }

    /// Takes the GPU's memory, but for so much.
    fn fill(&self, left_bytes: u64) -> Result<Vec<Memory>> {
        let mut filling = Vec::new();
        let mut piece_bytes = self.context.free_bytes()?;
        while piece_bytes >= GRANULE_BYTES {
            let takeable_bytes = self.context.free_bytes()?.saturating_sub(left_bytes);
            piece_bytes = piece_bytes.min(takeable_bytes);
            // In one piece there may be less than there is.
            match Memory::new(&self.context, Reservation::uncounted(piece_bytes)) {
                Ok(memory) => filling.push(memory),
                Err(_) => piece_bytes /= 2,
            }
        }
        Ok(filling)
    }

    fn cancelled(&self) -> Result<Result<String, String>> {
        let plan = self.checkpoint.plan(&self.options)?;
        for _ in 0..N_ATTEMPTS {
            let progress = Progress::default();
            match self.run_and_cancel(&plan, &progress) {
                Err(Error::Cancelled { .. }) => {
                    let (done_bytes, total_bytes) = progress.get();
                    let [done, total] = [done_bytes, total_bytes].map(human::bytes);
                    return Ok(Ok(format!("stopped after {done} of {total}")));
                }
                Err(error) => return Ok(Err(format!("another error: {error}"))),
                // It was over before it could be cancelled.
                Ok(()) => {}
            }
        }
        Ok(Err(format!("{N_ATTEMPTS} loads were over before they could be cancelled; take a larger file")))
    }

    fn run_and_cancel(&self, plan: &LoadPlan, progress: &Progress) -> Result<()> {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Acquire) {
                    let (done_bytes, total_bytes) = progress.get();
                    if done_bytes > 0 && done_bytes >= total_bytes / 2 {
                        return progress.cancel();
                    }
                    thread::sleep(LOOK_EVERY);
                }
            });
            let options = RunOptions { progress: Some(progress), ..RunOptions::default() };
            let result = self.checkpoint.run(plan, options).map(|_| ());
            is_over.store(true, Ordering::Release);
            result
        })
    }
}

/// How often the one that cancels looks how far the load is.
const LOOK_EVERY: Duration = Duration::from_micros(100);
