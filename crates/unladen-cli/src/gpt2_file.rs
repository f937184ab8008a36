//! GPT-2 as a file: is this checkpoint one, what does it say, write a new one.

use crate::watch;
use std::{collections::HashMap, fs, io::Read, path::Path};
use unladen::{
    DType, Device, Error, Format, OpenCheckpoint, PlanOptions, Result, StateDict, Strategy,
    checkpoint::Warning,
    cuda::Context,
    destination::Bytes,
    error::Fault,
    memory::{Ledger, Space},
    save::{self, Entry, Output},
    tensor::{Backing, Tensor},
};
use unladen_gpt2::{
    Config, Gpt2, Naming,
    gpu::{self, GpuModel, GpuTensor, Kernels},
    init::{self, Planned},
    text,
};

/// Tokens of the forward pass that proves a load.
pub(crate) const PROBE: [u32; 3] = [1, 2, 3];

/// How far logits may lie apart, as max |difference| / max |reference|.
pub(crate) const MAX_DISTANCE: f32 = 1e-4;

/// Which GPT-2 a checkpoint is, and where its forward pass will run.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    config: Config,
    naming: Naming,
    pub(crate) device: Device,
}

/// Which GPT-2 this will be once it is loaded with these options; `None`: something else. `heads` is the user's word, else
/// `config.json` beside it is asked. Nothing is loaded for it.
///
/// Fails if it is one that cannot be run: a tensor is missing or has another shape, or a type that is not computed with
/// where it goes, the tensors go to several devices, or `config.json` says that the model is computed otherwise, or makes
/// no sense.
pub(crate) fn recognise(
    checkpoint: &OpenCheckpoint,
    heads: Option<usize>,
    options: &PlanOptions,
) -> Result<Option<Kind>> {
    let in_file = |error: Error| error.in_file(&checkpoint.path);
    let device = device_of(checkpoint, options).map_err(in_file);
    let dtype = |it: &Tensor| options.casts.dtype_of(&it.name, it.layout.dtype());
    let dtypes: Vec<DType> = checkpoint.tensors.iter().map(dtype).collect::<Result<_>>().map_err(in_file)?;
    let of = |heads| {
        let tensors = checkpoint.tensors.iter().zip(&dtypes);
        let tensors = tensors.map(|(it, dtype)| (it.name.as_str(), *dtype, it.layout.shape()));
        let recognised = match device {
            Ok(Device::Host) => unladen_gpt2::recognise(tensors, heads),
            // A GPU multiplies 16-bit floats too.
            _ => gpu::recognise(tensors, heads),
        };
        recognised.map_err(in_file)
    };
    let heads = match heads {
        Some(heads) => Some(heads),
        // Only Hugging Face's models come with a config.json: beside others, one is somebody else's. One head suits
        // every width.
        None => match of(Some(1))? {
            Some((_, Naming::HuggingFace { .. })) => heads_beside(checkpoint)?,
            Some((_, Naming::Notebook)) => None,
            None => return Ok(None),
        },
    };
    match of(heads)? {
        Some((config, naming)) => Ok(Some(Kind { config, naming, device: device? })),
        None => Ok(None),
    }
}

/// The one device that all tensors go to.
///
/// Fails with `Mismatch` if they go to several.
fn device_of(checkpoint: &OpenCheckpoint, options: &PlanOptions) -> Result<Device> {
    let with_data = checkpoint.tensors.iter().filter(|it| it.backing != Backing::Meta);
    let mut places = with_data.map(|it| (it.name.as_str(), options.device_of(&it.name)));
    let Some((first, device)) = places.next() else { return Ok(options.device) };
    match places.find(|(_, it)| *it != device) {
        None => Ok(device),
        Some((stray, elsewhere)) => {
            let expected = format!("all of the model on one device, as `{first}` on {device}");
            Err(Fault::new(expected, elsewhere.to_string()).tensor(stray).hint(ONE_DEVICE).mismatch())
        }
    }
}

/// What to do with a model that is spread over devices.
const ONE_DEVICE: &str =
    "the forward pass runs on one device: leave --device-map out, and name it with --device";

/// Which GPT-2 this is, for those who can do without: the error says why there is no forward pass on the probe.
pub(crate) fn recognise_or_skip(
    checkpoint: &OpenCheckpoint,
    heads: Option<usize>,
    options: &PlanOptions,
) -> Result<Kind, String> {
    let kind = recognise(checkpoint, heads, options).map_err(|error| error.to_string())?;
    let kind = kind.ok_or("this is no GPT-2")?;
    let config = &kind.config;
    if config.context_length < PROBE.len() || PROBE.iter().any(|&it| it as usize >= config.vocab_size) {
        return Err(format!("this GPT-2 is too small for tokens {PROBE:?}"));
    }
    Ok(kind)
}

fn heads_beside(checkpoint: &OpenCheckpoint) -> Result<Option<usize>> {
    let folder =
        if checkpoint.path.is_dir() { Some(checkpoint.path.as_path()) } else { checkpoint.path.parent() };
    let Some(path) = folder.map(|it| it.join("config.json")).filter(|it| it.is_file()) else {
        return Ok(None);
    };
    let read = || {
        let mut text = String::new();
        fs::File::open(&path)?.take(MAX_CONFIG_BYTES).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|source| Error::io(&path, "read it", source))?;
    let is_tied = unladen_gpt2::ties_head_in_config_json(&text).map_err(|error| error.in_file(&path))?;
    if !is_tied && !checkpoint.tensors.iter().any(|it| it.name == HEAD) {
        let fault = Fault::new("a head of its own, as config.json says", "no such tensor").tensor(HEAD);
        let hint = "save the model with its head (GPT2LMHeadModel), or set tie_word_embeddings";
        return Err(fault.hint(hint).mismatch().in_file(&checkpoint.path));
    }
    unladen_gpt2::n_heads_from_config_json(&text).map_err(|error| error.in_file(&path))
}

/// Hugging Face's name of an untied head; it never has the prefix of the others.
const HEAD: &str = "lm_head.weight";

/// No `config.json` is larger; one that is ends where no JSON does.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Gives a tensor of this name its values.
type InitialValues = dyn Fn(&str, &mut [u8]) + Sync;

/// The random values that strategies with a model give it before they load over them. `None`: zeros will do.
pub(crate) fn initial_values(
    checkpoint: &OpenCheckpoint,
    strategy: Strategy,
    heads: Option<usize>,
    options: &PlanOptions,
) -> Option<Box<InitialValues>> {
    if !matches!(strategy, Strategy::Naive | Strategy::Sequential) {
        return None;
    }
    // They are made on the host, of `float32`, wherever the model goes then.
    let on_host = PlanOptions { casts: options.casts.clone(), ..PlanOptions::default() };
    let Kind { config, naming, .. } = recognise_or_skip(checkpoint, heads, &on_host).ok()?;
    let tensors = (naming == Naming::Notebook).then(|| init::tensors(&config).ok())??;
    let tensors: HashMap<_, _> = tensors.into_iter().map(|it| (it.name.clone(), it)).collect();
    Some(Box::new(move |name, bytes| match tensors.get(name) {
        Some(tensor) => tensor.fill_bytes(0, 0, bytes),
        None => bytes.fill(0),
    }))
}

/// The logits of every token, (tokens, vocabulary) row by row, computed where the weights are.
///
/// Fails if they are on several devices.
///
/// `kernels`: those of the GPU that the weights are on, where somebody has them ready.
pub(crate) fn forward(
    state: &StateDict<'_>,
    kind: &Kind,
    tokens: &[u32],
    kernels: Option<Kernels>,
) -> Result<Vec<f32>> {
    match state.iter().any(|(_, view)| view.bytes.device() != Device::Host) {
        true => forward_on_gpu(state, kind, tokens, kernels),
        false => Gpt2::new(state, kind.config, kind.naming)?.forward(tokens),
    }
}

/// The kernels for a GPU, which the driver compiles: a good while, the first time. `None` for the host.
pub(crate) fn kernels_for(device: Device) -> Result<Option<Kernels>> {
    match device {
        Device::Cuda(ordinal) => Kernels::load(&Context::open(ordinal)?).map(Some),
        _ => Ok(None),
    }
}

fn forward_on_gpu(
    state: &StateDict<'_>,
    kind: &Kind,
    tokens: &[u32],
    kernels: Option<Kernels>,
) -> Result<Vec<f32>> {
    let mut tensors: Vec<GpuTensor<'_>> = Vec::with_capacity(state.len());
    let mut context: Option<&Context> = None;
    for (name, view) in state.iter() {
        let Bytes::OnGpu { memory, start_byte, .. } = view.bytes else {
            let fault = Fault::new("all of the model on one device", "a part on the host").tensor(name);
            return Err(fault.hint(ONE_DEVICE).mismatch());
        };
        context = context.or(Some(memory.context()));
        tensors.push(GpuTensor { name, dtype: view.dtype, shape: view.shape, memory, start_byte });
    }
    let Some(context) = context else { return Ok(Vec::new()) };
    let kernels = kernels.map_or_else(|| Kernels::load(context), Ok)?;
    let ledger = Ledger::new();
    let reserve = |len_bytes| ledger.reserve(Space::Device(Device::Cuda(context.ordinal())), len_bytes);
    GpuModel::new(&kernels, &tensors, kind.config, kind.naming, tokens.len(), reserve)?.forward(tokens)
}

/// Passes the prompt and its greedy continuation to `show`, piece by piece; returns how many tokens were added.
/// Stops with `Cancelled` between two tokens; `path` is the model's.
pub(crate) fn generate(
    state: &StateDict<'_>,
    kind: &Kind,
    path: &Path,
    prompt: &str,
    n_new: usize,
    mut show: impl FnMut(&str),
) -> Result<usize> {
    let mut tokens = text::encode(prompt)?;
    let n_prompt = tokens.len();
    let model = Gpt2::new(state, kind.config, kind.naming)?;
    let mut n_shown_bytes = 0;
    for token in model.generate(&tokens.clone(), n_new, Some(text::END_OF_TEXT))? {
        watch::progress().check(path)?;
        tokens.push(token);
        let text = text::decode(&tokens)?;
        // A character may take several tokens: what is not whole yet waits.
        let whole = text.trim_end_matches('\u{fffd}');
        show(whole.get(n_shown_bytes..).unwrap_or_default());
        n_shown_bytes = n_shown_bytes.max(whole.len());
    }
    show(text::decode(&tokens)?.get(n_shown_bytes..).unwrap_or_default());
    Ok(tokens.len() - n_prompt)
}

/// max |difference| / max |reference|; infinite if the lengths differ or a number is none.
pub(crate) fn distance(reference: &[f32], other: &[f32]) -> f32 {
    if reference.len() != other.len() || reference.iter().chain(other).any(|it| !it.is_finite()) {
        return f32::INFINITY;
    }
    let largest = reference.iter().fold(0f32, |max, it| max.max(it.abs()));
    let difference = reference.iter().zip(other).fold(0f32, |max, (one, other)| max.max((one - other).abs()));
    if difference == 0.0 { 0.0 } else { difference / largest }
}

/// Bytes of a named size, as it is saved.
pub(crate) fn len_bytes(size: &str) -> u64 {
    planned(size).map_or(0, |tensors| tensors.iter().map(Planned::len_bytes).sum())
}

/// Saves a randomly initialised GPT-2, making its values on the way.
pub(crate) fn save(
    size: &str,
    seed: u64,
    path: &Path,
    format: Format,
    overwrite: bool,
) -> Result<Vec<Warning>> {
    let tensors = planned(size)?;
    let entries: Vec<_> = tensors
        .iter()
        .enumerate()
        .map(|(data, tensor)| Entry {
            name: tensor.name.clone(),
            dtype: Planned::DTYPE,
            shape: tensor.shape.clone(),
            data,
        })
        .collect();
    let mut elements = vec![0u8; 4 << 20];
    let elem_bytes = Planned::DTYPE.size_bytes();
    let mut read = |data: usize, sink: &mut save::Sink<'_>| {
        let tensor: &Planned = &tensors[data];
        let mut start_byte = 0;
        while start_byte < tensor.len_bytes() {
            let n_bytes = (tensor.len_bytes() - start_byte).min(elements.len() as u64);
            let piece = &mut elements[..n_bytes as usize];
            tensor.fill_bytes(seed, start_byte / elem_bytes, piece);
            sink(piece)?;
            start_byte += n_bytes;
        }
        Ok(())
    };
    let output = Output { path, format, overwrite, inputs: &[] };
    save::write(&output, &entries, &mut read, watch::progress())
}

fn planned(size: &str) -> Result<Vec<Planned>> {
    let config = Config::named(size).ok_or_else(|| {
        let known: Vec<_> = Config::names().collect();
        Fault::new(format!("a size of GPT-2 ({})", known.join(", ")), size).mismatch()
    })?;
    init::tensors(&config)
}
