//! Results go to stdout, words about them to stderr. A reader that goes away ends the program quietly.

use std::io::{self, ErrorKind, Write};

/// A line of the result.
pub(crate) fn result(line: &str) {
    write(&mut io::stdout().lock(), &[line, "\n"]);
}

/// A piece of a line of the result.
pub(crate) fn result_piece(text: &str) {
    write(&mut io::stdout().lock(), &[text]);
}

/// A line about the result.
pub(crate) fn words(line: &str) {
    write(&mut io::stderr().lock(), &[line, "\n"]);
}

fn write(to: &mut impl Write, pieces: &[&str]) {
    let written = pieces.iter().try_for_each(|it| to.write_all(it.as_bytes())).and_then(|()| to.flush());
    match written {
        Ok(()) => {}
        // `unladen inspect FILE | head`: nobody is left to tell anything.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        // A full disk behind a redirection, say: the result is lost, so this is no success.
        Err(_) => std::process::exit(1),
    }
}
