//! The command-line tool: reads the words, runs one command, says what went wrong.

mod args;
mod commands;
mod gpt2_file;
mod human;
mod limits;
mod out;
mod pinning;
mod row;
mod watch;

use args::{Args, Command, Gpt2Command};
use clap::Parser;
use std::process::ExitCode;
use unladen::{Error, error::Limit};

fn main() -> ExitCode {
    let args = Args::parse();
    let done = |()| ExitCode::SUCCESS;
    let result = match &args.command {
        Command::Compare(args) => commands::compare::run(args).map(done),
        Command::Inspect(args) => commands::inspect::run(args).map(done),
        Command::Plan(args) => commands::plan::run(args).map(done),
        Command::Load(args) => commands::load::run(args).map(done),
        Command::Convert(args) => commands::convert::run(args).map(done),
        Command::Devices(args) => commands::devices::run(args).map(done),
        Command::GpuFaults(args) => commands::gpu_faults::run(args).map(done),
        Command::Verify(args) => commands::verify::run(args),
        Command::Gpt2(Gpt2Command::Save(args)) => commands::gpt2::save(args).map(done),
        Command::Gpt2(Gpt2Command::Forward(args)) => commands::gpt2::forward(args).map(done),
        Command::Gpt2(Gpt2Command::Generate(args)) => commands::gpt2::generate(args).map(done),
    };
    let result = match (out::early_end(), result) {
        // The write that failed stopped the work.
        (Some(end), Ok(_) | Err(Error::Cancelled { .. })) => end.map(done),
        (_, result) => result,
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            out::words(&format!("error: {error}"));
            out::words(&format!("hint: {}", hint(&error)));
            ExitCode::from(match (&error, &args.command) {
                // The shell's convention for a program that was interrupted.
                (Error::Cancelled { .. }, _) => 130,
                (error, Command::Verify(_)) => commands::verify::exit_code(error),
                _ => 1,
            })
        }
    }
}

/// What to try next, with the number of bytes where it is a larger budget.
fn hint(error: &Error) -> String {
    match error {
        Error::OverBudget { limit: Limit::HostBudget, what, needed_bytes, .. }
            if what.starts_with("reading ") =>
        {
            format!("{}: --host-budget {needed_bytes}", error.hint())
        }
        _ => error.hint().to_owned(),
    }
}
