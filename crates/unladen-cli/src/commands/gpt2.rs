//! `unladen gpt2`: save one, run one, let one write.

use crate::{
    args::{ForwardArgs, GenerateArgs, HowArgs, OpenArgs, SaveArgs},
    gpt2_file::{self, Kind},
    human, out, pinning, watch,
};
use std::{path::Path, thread, time::Instant};
use unladen::{
    Device, Error, Intent, Loaded, OpenCheckpoint, OpenOptions, PlanOptions, Result, RunOptions,
    checkpoint::Root, engine::Staging, error::Fault, save as saving,
};

pub(crate) fn save(args: &SaveArgs) -> Result<()> {
    let format = saving::format_for_path(&args.output, args.to)?;
    watch::with_bar("saving", || gpt2_file::save(&args.size, args.seed, &args.output, format, args.force))?;
    let len_bytes = gpt2_file::len_bytes(&args.size);
    out::words(&format!(
        "{}: gpt2-{}, {}, {}",
        args.output.display(),
        args.size,
        format.name(),
        human::bytes(len_bytes)
    ));
    Ok(())
}

pub(crate) fn forward(args: &ForwardArgs) -> Result<()> {
    let model = Model::open(&args.file, &args.open, &args.how, args.heads)?;
    // A GPU's driver compiles the kernels while the weights come.
    let (loaded, kernels) = thread::scope(|scope| {
        let kernels = scope.spawn(|| gpt2_file::kernels_for(model.kind.device));
        let loaded = model.load();
        (loaded, kernels.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let (loaded, kernels) = (loaded?, kernels?);
    let began = Instant::now();
    let logits = watch::with_bar("computing", || {
        gpt2_file::forward(&loaded.state, &model.kind, &args.tokens, kernels)
    })?;
    let forward_s = began.elapsed().as_secs_f64();
    let vocab_size = logits.len() / args.tokens.len();
    if args.json {
        let line = serde_json::json!({
            "shape": [args.tokens.len(), vocab_size], "forward_s": forward_s, "logits": logits
        });
        out::result(&line.to_string());
        return Ok(());
    }
    out::words(&format!("{} tokens in {} s", args.tokens.len(), human::seconds(forward_s)));
    for (token, row) in args.tokens.iter().zip(logits.chunks(vocab_size)) {
        let mut best: Vec<_> = row.iter().copied().enumerate().collect();
        // The vocabulary is long: only what is shown is sorted. The first of equal logits is the better.
        let order =
            |one: &(usize, f32), other: &(usize, f32)| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0));
        if best.len() > N_SHOWN {
            best.select_nth_unstable_by(N_SHOWN, order);
            best.truncate(N_SHOWN);
        }
        best.sort_unstable_by(order);
        let best = best.iter().map(|(id, logit)| format!("{id} ({logit:.4})"));
        out::result(&format!("after {token:>5}: {}", best.collect::<Vec<_>>().join(", ")));
    }
    Ok(())
}

/// Of the logits after a token, those that are shown.
const N_SHOWN: usize = 5;

pub(crate) fn generate(args: &GenerateArgs) -> Result<()> {
    let model = Model::open(&args.file, &args.open, &args.how, args.heads)?;
    if model.kind.device != Device::Host {
        let message = "text is generated on the host only, so far".to_owned();
        return Err(Error::Device { device: model.kind.device.to_string(), message });
    }
    let loaded = model.load()?;
    let began = Instant::now();
    let (state, kind) = (&loaded.state, &model.kind);
    let n_tokens =
        gpt2_file::generate(state, kind, &args.file, &args.prompt, args.tokens, out::result_piece)?;
    let generate_s = began.elapsed().as_secs_f64();
    out::result("");
    out::words(&format!("{n_tokens} tokens in {} s", human::seconds(generate_s)));
    Ok(())
}

/// A GPT-2 that is known to run once it is loaded. Its headers were read, no more.
struct Model {
    checkpoint: OpenCheckpoint,
    options: PlanOptions,
    kind: Kind,
}

impl Model {
    fn open(path: &Path, open: &OpenArgs, how: &HowArgs, heads: Option<usize>) -> Result<Model> {
        // A model is a state dict: beside other things, it is the one that is meant unless the user names another.
        let root = open.root.clone().or(Some(Root::Auto));
        let checkpoint = unladen::open_with(path, &OpenOptions { root, ..open.options() })?;
        checkpoint.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
        let options = how.options(Intent::ReadOnly);
        let kind = gpt2_file::recognise(&checkpoint, heads, &options)?.ok_or_else(|| {
            let found = format!("{} tensors of other names", checkpoint.tensors.len());
            Fault::new("the tensors of a GPT-2, in the notebook's names or Hugging Face's", found)
                .hint("`unladen load` and `unladen compare` take any checkpoint")
                .mismatch()
                .in_file(path)
        })?;
        how.way.unused(&checkpoint).iter().for_each(|it| out::words(it));
        Ok(Model { checkpoint, options, kind })
    }

    fn load(&self) -> Result<Loaded<'static>> {
        let began = Instant::now();
        let plan = self.checkpoint.plan(&self.options)?;
        let options = RunOptions { progress: Some(watch::progress()), ..RunOptions::default() };
        let loaded = watch::with_bar("loading", || self.checkpoint.run(&plan, options))?;
        let strategy = plan.strategy();
        let load_s = began.elapsed().as_secs_f64();
        out::words(&format!("loaded with `{strategy}` in {} s", human::seconds(load_s)));
        if let Some(why) = loaded.gpus.staging.as_ref().and_then(Staging::why_pageable) {
            out::words(&pinning::warning_of_load(why));
        }
        Ok(loaded)
    }
}
