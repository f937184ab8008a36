//! `unladen compare`.

use super::*;

#[test]
fn compare_loads_a_gpt2_in_every_way_and_runs_it() {
    let folder = TempDir::new().unwrap();
    let (rows, words) = compared("", folder.path(), &gpt2("hf.safetensors"));
    assert_eq!(rows.iter().map(|it| it["strategy"].as_str().unwrap()).collect::<Vec<_>>(), STRATEGIES);
    for row in &rows {
        assert_eq!(row["digest"], rows[0]["digest"]);
        assert!(row["forward_s"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["device_peak_bytes"], row["predicted_device_peak_bytes"], "{row}");
    }
    assert!(words.contains('`'), "no advice: {words}");
    let kept = names_in(folder.path());
    assert!(kept.len() == 1 && kept[0].starts_with("hf-params-"), "scratch files are left over: {kept:?}");
}

#[test]
fn compare_touches_no_folder_of_the_users_and_takes_none_of_another_checkpoint() {
    let folder = TempDir::new().unwrap();
    let precious = folder.path().join("hf-params");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("precious.pt"), "mine").unwrap();
    // Two checkpoints of one name, with the same shapes and different values.
    for seed in ["1", "2"] {
        let other = folder.path().join(seed);
        fs::create_dir(&other).unwrap();
        let file = other.join("hf.pth");
        ok(
            "gpt2",
            &[
                Path::new("save"),
                Path::new("--size"),
                Path::new("tiny"),
                Path::new("--seed"),
                Path::new(seed),
                &file,
            ],
        );
        let (rows, _) = compared("--strategies stream,per-tensor", folder.path(), &file);
        assert_eq!(rows[0]["digest"], rows[1]["digest"]);
    }
    assert_eq!(names_in(&precious), ["precious.pt"]);
}

#[test]
fn compare_takes_what_is_no_gpt2() {
    let folder = TempDir::new().unwrap();
    let (rows, words) = compared("", folder.path(), &sample("nested.pt"));
    assert_eq!(rows.len(), STRATEGIES.len());
    assert!(rows.iter().all(|it| it["digest"].is_string() && it["digest"] == rows[0]["digest"]), "{rows:?}");
    assert!(rows.iter().all(|it| it.get("forward_s").is_none()), "{rows:?}");
    assert!(words.contains("no GPT-2"), "{words}");
}

#[test]
fn compare_without_json_prints_a_row_for_each_strategy_asked_for() {
    let folder = TempDir::new().unwrap();
    let (table, _) = ok("compare --strategies mmap,stream --dir", &[folder.path(), &sample("state_dict.pt")]);
    let has_row = |name: &str| table.lines().any(|it| it.split_whitespace().next() == Some(name));
    assert!(has_row("mmap") && has_row("stream") && !has_row("naive"), "{table}");
}
