//! The command-line tool: reads the words, runs one command, says what went wrong.

mod args;
mod commands;
mod gpt2_file;
mod human;
mod out;
mod row;
mod watch;

use args::{Args, Command, Gpt2Command};
use clap::Parser;
use std::process::ExitCode;
use unladen::Error;

fn main() -> ExitCode {
    let args = Args::parse();
    watch::cancel_on_interrupt();
    let result = match &args.command {
        Command::Compare(args) => commands::compare::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Plan(args) => commands::plan::run(args),
        Command::Load(args) => commands::load::run(args),
        Command::Convert(args) => commands::convert::run(args),
        Command::Gpt2(Gpt2Command::Save(args)) => commands::gpt2::save(args),
        Command::Gpt2(Gpt2Command::Forward(args)) => commands::gpt2::forward(args),
        Command::Gpt2(Gpt2Command::Generate(args)) => commands::gpt2::generate(args),
    };
    let result = match (out::early_end(), result) {
        // The write that failed stopped the work.
        (Some(end), Ok(()) | Err(Error::Cancelled { .. })) => end,
        (_, result) => result,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            out::words(&format!("error: {error}"));
            out::words(&format!("hint: {}", error.hint()));
            // The shell's convention for a program that was interrupted.
            ExitCode::from(if matches!(error, Error::Cancelled { .. }) { 130 } else { 1 })
        }
    }
}
