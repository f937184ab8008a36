//! Results go to stdout, words about them to stderr.

use crate::watch;
use std::{
    io::{self, Write},
    path::Path,
    sync::Mutex,
};
use unladen::{Error, Result};

/// Why stdout takes nothing any more.
static FAILED: Mutex<Option<io::Error>> = Mutex::new(None);

/// A line of the result.
pub(crate) fn result(line: &str) {
    result_pieces(&[line, "\n"]);
}

/// A piece of a line of the result.
pub(crate) fn result_piece(text: &str) {
    result_pieces(&[text]);
}

/// A line about the result. It goes nowhere if nobody listens, which is no reason to stop the work.
pub(crate) fn words(line: &str) {
    // Names of files come in here as they are: none may steer the terminal.
    let mut shown = String::new();
    for it in line.chars() {
        if it.is_control() && it != '\n' { shown.extend(it.escape_default()) } else { shown.push(it) }
    }
    let _ = write(&mut io::stderr().lock(), &[&shown, "\n"]);
}

/// How the result ended, if it did before its last line. A reader that went away, as in `unladen inspect FILE | head`,
/// had what it wanted; a full disk behind a redirection, say, is an error.
pub(crate) fn early_end() -> Option<Result<()>> {
    let failed = FAILED.lock().ok()?.take()?;
    Some(match failed.kind() {
        io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(Error::io(Path::new("stdout"), "write the result", failed)),
    })
}

/// After a failure the work is stopped, not the program: folders and files that it made for a while still go.
fn result_pieces(pieces: &[&str]) {
    let Ok(mut failed) = FAILED.lock() else { return };
    if failed.is_none() {
        *failed = write(&mut io::stdout().lock(), pieces).err();
    }
    if failed.is_some() {
        watch::progress().cancel();
    }
}

fn write(to: &mut impl Write, pieces: &[&str]) -> io::Result<()> {
    pieces.iter().try_for_each(|it| to.write_all(it.as_bytes()))?;
    to.flush()
}
