//! `--limit`: what a file may claim, as the user says.

use super::*;

/// A weight map over two files of one tensor each.
fn sharded() -> TempDir {
    let folder = TempDir::new().unwrap();
    let mut files = serde_json::Map::new();
    for name in ["a", "b"] {
        let file = format!("{name}.safetensors");
        zeros(&folder.path().join(&file), &[(name, &[3])]);
        files.insert(name.to_owned(), json!(file));
    }
    let index = json!({ "metadata": {}, "weight_map": files });
    fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    folder
}

#[test]
fn what_exceeds_a_limit_names_it_and_opens_once_it_is_raised() {
    let sharded = sharded();
    let sharded = sharded.path();
    let [zip, legacy, safetensors] =
        ["state_dict.pt", "state_dict_legacy.pt", "unsorted.safetensors"].map(sample);
    for (limit, too_little, enough, path) in [
        ("pickle_bytes", "10", "1MiB", &*zip),
        ("pickle_bytes", "100", "none", &*legacy),
        ("n_objects", "1", "1000", &*zip),
        ("n_records", "2", "none", &*zip),
        ("header_bytes", "10", "0.1 MiB", &*safetensors),
        ("weight_map_bytes", "20", "1k", sharded),
        ("n_files", "1", "2", sharded),
        ("n_tensors", "1", "2", sharded),
        ("n_tensors", "1", "100", &*zip),
        ("depth", "0", "5", &*zip),
    ] {
        let error = fails(1, &format!("load --limit {limit}={too_little}"), &[path]);
        assert!(error.contains("at most ") && error.contains(&format!("`--limit {limit}=")), "{error}");
        // The last word counts.
        let words =
            ["load", "--limit", &format!("{limit}={too_little}"), "--limit", &format!("{limit}={enough}")];
        let output = unladen().args(words).arg(path).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    }
}

#[test]
fn every_command_that_opens_a_checkpoint_keeps_the_limits() {
    let folder = TempDir::new().unwrap();
    let (file, copy) = (sample("state_dict.pt"), folder.path().join("copy.pth"));
    let commands = ["inspect", "inspect --tree", "plan", "load", "compare", "verify", "gpt2 forward"];
    for command in commands {
        // Of `verify`, 1 is an answer, and this is none.
        let code = if command == "verify" { 2 } else { 1 };
        let error = fails(code, &format!("{command} --limit n_records=2"), &[&file]);
        assert!(error.contains("`--limit n_records="), "{command}: {error}");
    }
    fails(1, "convert --limit n_records=2", &[&file, &copy]);
    fails(2, "verify --limit n_records=2", &[&file, &file]);
    ok("verify --limit n_records=100 --limit depth=5", &[&file]);
    // The loads are in processes of their own.
    let words = "--limit n_tensors=7 --limit depth=9 --strategies stream,per-tensor";
    assert_eq!(compared(words, folder.path(), &file).0.len(), 2);
}

#[test]
fn a_file_with_more_than_the_default_allows_opens_if_the_user_says_so() {
    let deep = sample("../hostile/p27_deep_list_1e5.pt");
    assert!(fails(1, "inspect", &[&deep]).contains("`--limit depth="));
    assert_eq!(ok_json("inspect --json --limit depth=200000", &[&deep])["tensors"], json!([]));
    // However much is allowed, a length must be true.
    let lie = sample("../hostile/s03_length_u64_max.safetensors");
    assert!(fails(1, "inspect --limit header_bytes=none", &[&lie]).contains("truncated"));
}

#[test]
fn unknown_limits_list_those_that_there_are() {
    for wrong in ["n_tensor=5", "n_tensors", "n_tensors=many", "header_bytes=5 apples"] {
        let output =
            unladen().args(["load", "--limit", wrong]).arg(sample("state_dict.pt")).output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words}");
        let is_name_known = wrong.contains("tensors=") || wrong.contains("header");
        assert!(is_name_known || words.contains("pickle_bytes, n_objects, n_records"), "{words}");
    }
}
