//! The front door: open a checkpoint, plan a load, run it.

mod blame;
mod gpus;
mod machine;

use crate::{
    checkpoint::Checkpoint,
    destination::{StateDict, TensorBuffer},
    engine::{self, InitialValues, Io, Run, UsedGpus},
    error::{Fault, Result},
    format::{self, OpenOptions},
    memory::{Held, Ledger, Peaks},
    plan::{LoadPlan, Machine, PlanOptions, Strategy},
    progress::Progress,
    source::FileSet,
    tensor::{Backing, Layout, TensorId},
};
use gpus::Gpus;
use std::{
    collections::{HashMap, HashSet},
    ops::Deref,
    path::Path,
};

/// A checkpoint whose headers were read and whose files are open.
#[derive(Debug)]
pub struct OpenCheckpoint {
    checkpoint: Checkpoint,
    files: FileSet,
    /// Those that a plan or a load was for.
    gpus: Gpus,
}

/// Reads the headers of a checkpoint: a `.pth` or safetensors file, the weight map of several, or a folder, see
/// [`format::open`].
///
/// The format is recognised by content. No tensor data is read, whatever the checkpoint's size.
pub fn open(path: impl AsRef<Path>) -> Result<OpenCheckpoint> {
    open_with(path, &OpenOptions::default())
}

/// As [`open`], as the caller decides.
pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<OpenCheckpoint> {
    let (checkpoint, files) = format::open(path.as_ref(), options)?;
    Ok(OpenCheckpoint::new(checkpoint, files))
}

/// What a run may be given; the default needs nothing.
#[derive(Default)]
pub struct RunOptions<'r> {
    /// Bytes done, and the wish to stop, shared with whoever watches.
    pub progress: Option<&'r Progress>,
    /// The values of the model that `naive` and `sequential` make first; zeros without.
    pub initial_values: Option<InitialValues<'r>>,
    /// Called with bytes done and total some twenty times a second, from a thread of its own, and once at the end.
    pub on_progress: Option<&'r mut (dyn FnMut(u64, u64) + Send)>,
    /// Called after each step with its position and what is held.
    pub after_step: Option<&'r mut dyn FnMut(usize, Held)>,
}

/// What a load gives back.
#[derive(Debug)]
pub struct Loaded<'a> {
    /// The weights.
    pub state: StateDict<'a>,
    /// The most that was held at once, by the ledger.
    pub peaks: Peaks,
    /// What was seen of the GPUs, if there were any.
    pub gpus: UsedGpus,
}

impl OpenCheckpoint {
    /// A checkpoint that was opened before, with its files by position.
    pub fn new(checkpoint: Checkpoint, files: FileSet) -> OpenCheckpoint {
        OpenCheckpoint { checkpoint, files, gpus: Gpus::default() }
    }

    /// The open files, by position.
    pub fn files(&self) -> &FileSet {
        &self.files
    }

    /// What a plan for this checkpoint must know of this machine: asks the system, and the driver of the GPUs that the
    /// options name; reads nothing of the files. A GPU that is not there has as much free memory as any could.
    pub fn machine(&self, options: &PlanOptions) -> Machine {
        machine::machine(&self.files, options, machine::may_place(options), &self.gpus)
    }

    /// Decides what a load of every tensor on this machine will do; reads nothing.
    ///
    /// Fails with [`Error::OverBudget`](crate::Error::OverBudget) if no way fits the budgets, or the memory that the
    /// machine (or this process's control group) has left: it names the smallest budget that works. With
    /// [`Error::Device`](crate::Error::Device) if there is no such GPU.
    pub fn plan(&self, options: &PlanOptions) -> Result<LoadPlan> {
        self.gpus.open_all(&options.devices())?;
        LoadPlan::new(&self.checkpoint, options, &self.machine(options))
    }

    /// Runs a plan that was made for this checkpoint. On any failure everything that was taken is given back.
    pub fn run(&self, plan: &LoadPlan, options: RunOptions<'_>) -> Result<Loaded<'static>> {
        self.run_with(plan, options, &mut |tensor| {
            let expected = "a plan that reserves its memory";
            Err(Fault::new(expected, "one that wants the caller's")
                .tensor(&self.tensor(tensor).name)
                .mismatch())
        })
    }

    /// Loads every tensor with one strategy and what this machine suggests for the rest.
    ///
    /// ```no_run
    /// let checkpoint = unladen::open("gpt2.pth")?;
    /// let loaded = checkpoint.load(unladen::Strategy::Stream)?;
    /// for (name, tensor) in loaded.state.iter() {
    ///     println!("{name} {} {:?}", tensor.dtype, tensor.shape);
    /// }
    /// # Ok::<(), unladen::Error>(())
    /// ```
    pub fn load(&self, strategy: Strategy) -> Result<Loaded<'static>> {
        self.run(&self.plan(&PlanOptions::new(strategy))?, RunOptions::default())
    }

    /// Fills memory that exists already, the tensors of a live model: no page of it is new, which is what takes most time
    /// in a load. `buffer_for` is asked once per tensor with data, with its name and the row-major layout that its bytes
    /// will have, casts included.
    ///
    /// Fails with [`Error::Mismatch`](crate::Error::Mismatch) if there is no buffer for a tensor, or one of another type,
    /// shape or length; nothing is read then. If it fails later, or is cancelled, the buffers hold anything.
    pub fn load_into<'a>(
        &self,
        mut buffer_for: impl FnMut(&str, &Layout) -> Option<TensorBuffer<'a>>,
        plan_options: &PlanOptions,
        options: RunOptions<'_>,
    ) -> Result<Loaded<'a>> {
        let machine = machine::machine(&self.files, plan_options, false, &self.gpus);
        let plan = LoadPlan::into_caller_memory(&self.checkpoint, plan_options, &machine)?;
        let layouts: HashMap<TensorId, &Layout> = plan.layouts().collect();
        self.run_with(&plan, options, &mut |id| {
            let name = &self.tensor(id).name;
            let missing = |expected: &str| Fault::new(expected, "none").tensor(name).mismatch();
            let layout = layouts.get(&id).ok_or_else(|| missing("a plan that hands over what it fills"))?;
            let buffer = buffer_for(name, layout);
            let bytes =
                buffer.ok_or_else(|| missing("memory for each tensor")).and_then(|it| it.checked(layout));
            bytes.map_err(|error| error.in_tensor(name).in_file(&self.path))
        })
    }

    /// As [`OpenCheckpoint::load_into`], with all buffers by name.
    ///
    /// Fails with [`Error::Mismatch`](crate::Error::Mismatch) if the names are not those of the checkpoint's tensors with
    /// data.
    pub fn load_into_buffers<'a>(
        &self,
        mut buffers: HashMap<&str, TensorBuffer<'a>>,
        plan_options: &PlanOptions,
        options: RunOptions<'_>,
    ) -> Result<Loaded<'a>> {
        let with_data = self.tensors.iter().filter(|it| it.backing != Backing::Meta);
        let known: HashSet<&str> = with_data.map(|it| it.name.as_str()).collect();
        if let Some(name) = buffers.keys().find(|it| !known.contains(*it)) {
            let fault = Fault::new("names of the checkpoint's tensors", "memory for another").tensor(*name);
            return Err(fault.mismatch().in_file(&self.path));
        }
        self.load_into(|name, _| buffers.remove(name), plan_options, options)
    }

    fn run_with<'a>(
        &self,
        plan: &LoadPlan,
        options: RunOptions<'_>,
        adopt: &mut dyn FnMut(TensorId) -> Result<&'a mut [u8]>,
    ) -> Result<Loaded<'a>> {
        let ledger = Ledger::new();
        let unwatched = Progress::default();
        let progress = options.progress.unwrap_or(&unwatched);
        let mut nobody = |_, _| {};
        let run = Run {
            io: Io { path: &self.path, files: &self.files, progress },
            names: &|id| self.tensor(id).name.as_str(),
            ledger: ledger.clone(),
            open_gpu: &|ordinal| self.gpus.open(ordinal),
            initial_values: options.initial_values,
            adopt,
            after_step: options.after_step.unwrap_or(&mut nobody),
        };
        let run = match options.on_progress {
            Some(callback) => progress.report(callback, || engine::run(plan, run)),
            None => engine::run(plan, run),
        };
        let (state, gpus) = run.map_err(|error| blame::in_tensor(error, &self.checkpoint))?;
        Ok(Loaded { state, peaks: ledger.get().1, gpus })
    }
}

impl Deref for OpenCheckpoint {
    type Target = Checkpoint;

    fn deref(&self) -> &Checkpoint {
        &self.checkpoint
    }
}
