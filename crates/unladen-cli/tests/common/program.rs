//! The program, started as a script starts it, and a checkpoint for it.
// Not every test that shares this needs all of it.
#![allow(dead_code)]

use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tempfile::TempDir;

/// `unladen WORDS`, to be run.
pub(crate) fn unladen(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unladen"));
    command.args(words).stdin(Stdio::null());
    command
}

/// Exit code, result and words.
pub(crate) fn run(command: &mut Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
    (output.status.code().unwrap(), out, err)
}

/// The one JSON value that a command prints, which has to succeed.
pub(crate) fn json(command: &mut Command) -> Value {
    let (code, out, err) = run(command);
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).unwrap()
}

/// The JSON lines that a command prints, which has to succeed.
pub(crate) fn json_lines(command: &mut Command) -> Vec<Value> {
    let (code, out, err) = run(command);
    assert_eq!(code, 0, "{err}");
    out.lines().map(|it| serde_json::from_str(it).unwrap()).collect()
}

/// A GPT-2 of 33 MiB in a file of this name, and the folder that it lies in.
pub(crate) fn tiny(name: &str) -> (PathBuf, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    let (code, _, err) = run(&mut unladen(&["gpt2", "save", text(&path), "--size", "tiny"]));
    assert_eq!(code, 0, "{err}");
    (path, folder)
}

/// A path as a word of the command line.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
