//! `unladen convert`: the same tensors in another format, streaming.

use crate::{args::ConvertArgs, human, out, watch};
use unladen::{
    Result,
    save::{self, Output},
};

pub(crate) fn run(args: &ConvertArgs) -> Result<()> {
    let format = save::format_for_path(&args.output, args.to)?;
    let checkpoint = unladen::open_with(&args.input, &args.open.options())?;
    checkpoint.warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    let output = Output { path: &args.output, format, overwrite: args.force, inputs: &checkpoint.files };
    let warnings = watch::with_bar("saving", || {
        save::convert(&checkpoint, checkpoint.files(), &output, args.host_budget, watch::progress())
    })?;
    warnings.iter().for_each(|it| out::words(&format!("warning: {it}")));
    out::words(&format!(
        "{}: {}, {} tensors, {}",
        args.output.display(),
        format.name(),
        checkpoint.tensors.len(),
        human::bytes(checkpoint.len_bytes())
    ));
    Ok(())
}
