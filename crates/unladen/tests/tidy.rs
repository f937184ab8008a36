//! Keeps the rooms in order: source -> format -> plan -> engine -> destination.

use std::{fs, path::Path};

/// A room, and the rooms it may name. `lib` and `load` sit on top and may name all.
const MAY_USE: &[(&str, &[&str])] = &[
    // The nouns.
    ("error", &[]),
    ("device", &["error"]),
    ("dtype", &["error"]),
    ("cast", &["dtype", "error"]),
    ("io_path", &["error"]),
    ("progress", &["error"]),
    ("memory", &["device", "error", "io_path", "progress"]),
    ("cuda", &["device", "dtype", "error", "memory"]),
    ("stamp", &["error"]),
    ("tensor", &["dtype", "error"]),
    ("checkpoint", &["cast", "dtype", "error", "stamp", "tensor"]),
    // The way of the bytes.
    ("source", &["error", "io_path", "memory", "stamp"]),
    ("format", &["checkpoint", "dtype", "error", "source", "stamp", "tensor"]),
    ("plan", &["cast", "checkpoint", "device", "dtype", "error", "io_path", "memory", "stamp", "tensor"]),
    ("destination", &["cuda", "device", "dtype", "error", "memory", "tensor"]),
    (
        "engine",
        &[
            "cast",
            "cuda",
            "destination",
            "device",
            "dtype",
            "error",
            "io_path",
            "memory",
            "plan",
            "progress",
            "source",
            "tensor",
        ],
    ),
    // What works on any checkpoint: `contents` walks its tensors' bytes in order.
    (
        "contents",
        &[
            "checkpoint",
            "dtype",
            "error",
            "io_path",
            "memory",
            "plan",
            "progress",
            "source",
            "stamp",
            "tensor",
        ],
    ),
    (
        "save",
        &[
            "checkpoint",
            "contents",
            "dtype",
            "error",
            "format",
            "io_path",
            "memory",
            "progress",
            "source",
            "stamp",
            "tensor",
        ],
    ),
    (
        "verify",
        &[
            "checkpoint",
            "contents",
            "destination",
            "dtype",
            "error",
            "format",
            "io_path",
            "memory",
            "progress",
            "save",
            "source",
            "stamp",
            "tensor",
        ],
    ),
];

/// What sits on top.
const TOP: &[&str] = &["lib", "load"];

#[test]
fn rooms_only_look_downstream() {
    let mut strays = Vec::new();
    visit(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut |path, text| {
        let room = room_of(path);
        if TOP.contains(&room) {
            return;
        }
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == room) else {
            strays.push(format!("{}: `{room}` is no known room", path.display()));
            return;
        };
        let code = code_of(text);
        let rooms = MAY_USE.iter().map(|(name, _)| name).chain(TOP);
        for name in rooms.filter(|name| **name != room && !allowed.contains(name)) {
            if names_room(&code, name) {
                strays.push(format!("{}: `{room}` uses `{name}`", path.display()));
            }
        }
    });
    assert!(strays.is_empty(), "rooms out of order:\n{}", strays.join("\n"));
}

#[test]
fn the_table_has_no_room_that_looks_upstream_in_a_circle() {
    // Rooms that use nothing but settled rooms are settled; whoever is left at the end uses itself in a roundabout way.
    let mut settled: Vec<&str> = Vec::new();
    while let Some((name, _)) = MAY_USE
        .iter()
        .find(|(name, allowed)| !settled.contains(name) && allowed.iter().all(|it| settled.contains(it)))
    {
        settled.push(name);
    }
    let stuck: Vec<&str> =
        MAY_USE.iter().map(|(name, _)| *name).filter(|name| !settled.contains(name)).collect();
    assert!(stuck.is_empty(), "these rooms use each other, or rooms that the table lacks: {stuck:?}");
}

#[test]
fn a_stray_is_seen_however_it_is_written() {
    for text in [
        "crate::plan::Step",
        "use crate::{error::Error, plan::{Step, Peaks}};",
        "use crate::{\n    plan,\n};",
    ] {
        assert!(names_room(&code_of(text), "plan"), "{text}");
    }
    for text in [
        "// see crate::plan",
        "/// [`Plan`](crate::plan::Plan)",
        "use crate::planet;",
        "use crate::{error::plan_error};",
    ] {
        assert!(!names_room(&code_of(text), "plan"), "{text}");
    }
}

/// The text without its comments: links in the docs may point anywhere.
fn code_of(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// True for `crate::name` and for `name` inside a `use crate::{..}` group.
fn names_room(code: &str, name: &str) -> bool {
    let is_word = |it: char| it.is_alphanumeric() || it == '_';
    let direct = code.split("crate::").skip(1).any(|rest| rest.split(|it| !is_word(it)).next() == Some(name));
    let grouped = code.split("crate::{").skip(1).any(|rest| {
        let group = rest.split(';').next().unwrap_or("");
        group.split(|it| !is_word(it)).any(|it| it == name)
    });
    direct || grouped
}

fn room_of(path: &Path) -> &str {
    let inside = path.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs")
}

fn visit(dir: &Path, on_file: &mut dyn FnMut(&Path, &str)) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            visit(&path, on_file);
        } else if path.extension().is_some_and(|it| it == "rs") {
            on_file(&path, &fs::read_to_string(&path).unwrap());
        }
    }
}
