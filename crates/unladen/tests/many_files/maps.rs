//! Weight maps and numbered files.

use super::{load, load_opened, refused, refused_with, warnings, write::*};
use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::Path,
};
use tempfile::TempDir;
use unladen::{DType, Format, Limits, OpenOptions, PlanOptions, RunOptions, Strategy, open, open_with};

const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";
const MAP: &str = "model.safetensors.index.json";

/// Two shards: `a` and `b` in one, `c` in the other.
fn shards() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tensor = |first: u8| counting(first, 24);
    safetensors(&dir.path().join(ONE), "BF16", &[("b", &[3, 4], tensor(9)), ("a", &[12], tensor(70))]);
    safetensors(&dir.path().join(TWO), "BF16", &[("c", &[2, 6], tensor(130))]);
    dir
}

/// Writes a weight map and returns the folder.
fn mapped(map: &str) -> TempDir {
    let dir = shards();
    fs::write(dir.path().join(MAP), map).unwrap();
    dir
}

fn good_map() -> String {
    format!(r#"{{"metadata":{{"total_size":72.0}},"weight_map":{{"a":"{ONE}","b":"{ONE}","c":"{TWO}"}}}}"#)
}

#[test]
fn a_folder_and_its_weight_map_load_all_shards_by_every_strategy() {
    let dir = mapped(&good_map());
    let loaded = load(dir.path());
    assert_eq!(loaded.len(), 3);
    assert_eq!(loaded["c"], (DType::BF16, vec![2, 6], counting(130, 24)));
    assert_eq!(loaded["a"], (DType::BF16, vec![12], counting(70, 24)));
    assert_eq!(load(&dir.path().join(MAP)), loaded);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!((checkpoint.format, checkpoint.files().len()), (Format::Sharded, 2));
    assert_eq!((&*checkpoint.path, checkpoint.warnings.len()), (dir.path(), 0));
    // The names alone say the same.
    fs::remove_file(dir.path().join(MAP)).unwrap();
    assert_eq!(load(dir.path()), loaded);
    assert_eq!(open(dir.path()).unwrap().format, Format::Sharded);
}

#[test]
fn tensors_that_the_map_does_not_list_are_left_out_and_named() {
    let dir = mapped(&format!(r#"{{"weight_map":{{"b":"{ONE}","c":"{TWO}"}}}}"#));
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(load_opened(&checkpoint).len(), 2);
    let warnings = warnings(&checkpoint);
    assert!(warnings.contains("`a`") && warnings.contains(ONE), "{warnings}");
}

#[test]
fn files_that_the_map_does_not_name_are_a_warning_and_no_error() {
    let dir = mapped(&good_map());
    for name in ["consolidated.safetensors", "model.fp16-00001-of-00002.safetensors", "training_args.bin"] {
        fs::write(dir.path().join(name), "anything").unwrap();
    }
    for path in [dir.path().to_owned(), dir.path().join(MAP)] {
        let checkpoint = open(&path).unwrap();
        assert_eq!(load_opened(&checkpoint).len(), 3);
        let warnings = warnings(&checkpoint);
        assert!(warnings.contains("1 file beside") && warnings.contains("consolidated"), "{warnings}");
        assert!(!warnings.contains("fp16") && !warnings.contains("training"), "{warnings}");
    }
}

#[test]
fn a_map_without_tensors_says_so() {
    let checkpoint = open(mapped(r#"{"weight_map":{}}"#).path()).unwrap();
    assert!(checkpoint.tensors.is_empty());
    let warnings = warnings(&checkpoint);
    assert!(warnings.contains("lists no tensors") && warnings.contains("2 files"), "{warnings}");
}

#[test]
fn maps_that_lie_are_refused_and_say_where() {
    let map = |entries: &str| format!(r#"{{"weight_map":{{{entries}}}}}"#);
    for (text, what) in [
        (map(&format!(r#""a":"{ONE}","d":"{TWO}""#)), "tensor `d`"),
        (map(&format!(r#""a":"{TWO}""#)), "tensor `a`"),
        (map(r#""a":"model-00003-of-00002.safetensors""#), "model-00003"),
        (map(&format!(r#""a":"../{ONE}""#)), "own folder"),
        (map(r#""a":"/etc/passwd""#), "own folder"),
        (map(r#""a":"..""#), "own folder"),
        (map(r#""a":"""#), "own folder"),
        (map(r#""a":"x\u0000""#), "own folder"),
        (map(r#""a":"folder""#), "a folder"),
        (map(r#""a":"pipe""#), "a pipe"),
        (map(r#""a":"link""#), "a link to"),
        (map(&format!(r#""a":"{MAP}""#)), "a weight map"),
        (map(&format!(r#""a":"{ONE}","a":"{ONE}""#)), "stands twice"),
        (map(&format!(r#""a":"{ONE}","\u0061":"{ONE}""#)), "stands twice"),
        (map(r#""a":1"#), "JSON"),
        (map(r#""a":null"#), "JSON"),
        (r#"{"weight_map":{},"weight_map":{}}"#.into(), "stands twice"),
        (r#"{"metadata":{},"metadata":{},"weight_map":{}}"#.into(), "stands twice"),
        (r#"{"weight_map":[]}"#.into(), "JSON"),
        (r#"{"metadata":{}}"#.into(), "weight_map"),
        (r#"{"weight_map":{}} {}"#.into(), "JSON"),
        (format!("{}1{}", r#"{"metadata":"#.repeat(200), "}".repeat(200)), "JSON"),
        ("{".into(), "JSON"),
    ] {
        let dir = mapped(&text);
        fs::create_dir(dir.path().join("folder")).unwrap();
        symlink("/etc/hostname", dir.path().join("link")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        for path in [dir.path().to_owned(), dir.path().join(MAP)] {
            let error = refused(&path);
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}

#[test]
fn limits_hold_for_the_map_and_for_all_shards_together() {
    let dir = mapped(&good_map());
    let limits = |change: fn(&mut Limits)| {
        let mut options = OpenOptions::default();
        change(&mut options.limits);
        options
    };
    assert!(refused_with(dir.path(), &limits(|it| it.weight_map_bytes = 50)).contains("at most 50 bytes"));
    assert!(refused_with(dir.path(), &limits(|it| it.n_files = 1)).contains("at most 1 files"));
    assert!(refused_with(dir.path(), &limits(|it| it.n_tensors = 2)).contains("at most 2 tensors"));
    assert!(open_with(dir.path(), &limits(|it| it.n_tensors = 3)).is_ok());
    let numbered = shards();
    let error = refused_with(numbered.path(), &limits(|it| it.n_tensors = 2));
    assert!(error.contains("at most 2 tensors"), "{error}");
    // A hundred megabytes, of which none is read.
    File::options().write(true).open(dir.path().join(MAP)).unwrap().set_len(100 << 20).unwrap();
    assert!(refused(dir.path()).contains("an index of at most"));
}

#[test]
fn snapshots_of_a_cache_open_through_their_links() {
    let dir = mapped(&good_map());
    let snapshot = dir.path().join("models--a--b/snapshots/0123");
    let blobs = dir.path().join("models--a--b/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    for (index, name) in [ONE, TWO, MAP].iter().enumerate() {
        fs::rename(dir.path().join(name), blobs.join(index.to_string())).unwrap();
        symlink(format!("../../blobs/{index}"), snapshot.join(name)).unwrap();
    }
    assert_eq!(load(&snapshot).len(), 3);
    // The same links in a folder that is no snapshot need the caller's word.
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    for (index, name) in [ONE, TWO, MAP].iter().enumerate() {
        symlink(blobs.join(index.to_string()), elsewhere.join(name)).unwrap();
    }
    assert!(refused(&elsewhere).contains("a link to"));
    let options = OpenOptions { follow_links: true, ..OpenOptions::default() };
    assert_eq!(load_opened(&open_with(&elsewhere, &options).unwrap()).len(), 3);
}

#[test]
fn numbered_files_that_are_not_one_model_are_refused() {
    let dir = shards();
    safetensors(&dir.path().join(TWO), "U8", &[("a", &[1], vec![1])]);
    let error = refused(dir.path());
    assert!(error.contains("tensor `a`") && error.contains(ONE) && error.contains(TWO), "{error}");
    fs::remove_file(dir.path().join(ONE)).unwrap();
    assert!(refused(dir.path()).contains("without number 1"));
}

#[test]
fn a_shard_that_is_damaged_is_named() {
    let dir = mapped(&good_map());
    let path = dir.path().join(TWO);
    fs::write(&path, &fs::read(&path).unwrap()[..80]).unwrap();
    assert!(refused(dir.path()).starts_with(&path.display().to_string()));
}

/// Two hundred files, more than stay open.
fn many_shards(dir: &Path, n_files: usize, n_bytes: u64) {
    let mut entries = Vec::new();
    for number in 1..=n_files {
        let name = format!("m-{number:05}-of-{n_files:05}.safetensors");
        let [one, two] = ["w", "b"].map(|it| format!("layer.{number}.{it}"));
        let bytes = |first: usize| counting(first as u8, n_bytes);
        let tensors = [(&*one, &[n_bytes][..], bytes(number)), (&*two, &[n_bytes][..], bytes(2 * number))];
        safetensors(&dir.join(&name), "U8", &tensors);
        entries.extend([one, two].map(|it| format!(r#""{it}":"{name}""#)));
    }
    fs::write(dir.join("m.safetensors.index.json"), format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(",")))
        .unwrap();
}

#[test]
fn two_hundred_small_files_load_within_four_mebibytes() {
    let dir = tempfile::tempdir().unwrap();
    many_shards(dir.path(), 200, 70_000);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!((checkpoint.files().len(), checkpoint.tensors.len()), (200, 400));
    let plan = checkpoint
        .plan(&PlanOptions { host_budget_bytes: 4 << 20, ..PlanOptions::new(Strategy::Stream) })
        .unwrap();
    assert!(plan.overhead_bytes() <= 4 << 20);
    let loaded = checkpoint.run(&plan, RunOptions::default()).unwrap();
    assert_eq!(loaded.peaks, plan.predicted());
    for number in [1, 2, 150, 200] {
        let view = loaded.state.get(&format!("layer.{number}.b")).unwrap();
        assert!(view.host_bytes().unwrap() == counting((2 * number) as u8, 70_000));
    }
}
