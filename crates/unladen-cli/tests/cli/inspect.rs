//! `inspect`: the table, what shares bytes, and the tree below one path.

use super::*;

#[test]
fn the_table_has_a_line_for_each_tensor_and_says_which_share_bytes() {
    let (table, _) = ok("inspect", &[&sample("tied.pt")]);
    let expected = " tensor          dtype    shape   stride  size
 wte.weight      float32  [5, 3]          60 B
 h.0.bias        float32  [3]             12 B
 lm_head.weight  float32  [5, 3]          60 B
 wte.T           float32  [3, 5]  [1, 3]  60 B
shared: `lm_head.weight` = `wte.weight`
shared: `wte.T` shares bytes with `wte.weight`
";
    assert_eq!(table, expected);
    let (plain, _) = ok("inspect", &[&sample("state_dict.pt")]);
    assert!(!plain.contains("shared") && !plain.contains("stride"), "{plain}");
    let (hashed, _) = ok("inspect --hash sha256", &[&sample("tied.pt")]);
    assert!(hashed.lines().next().unwrap().ends_with("size  sha256"), "{hashed}");
    assert!(hashed.lines().skip(1).take(4).all(|it| it.len() > 64 && !it.ends_with(' ')), "{hashed}");
}

#[test]
fn a_name_is_as_wide_as_a_terminal_shows_it() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("in.safetensors");
    zeros(&file, &[("重み", &[2]), ("abcdef", &[2])]);
    let (table, _) = ok("inspect", &[&file]);
    let expected =
        [" tensor  dtype    shape  size", " 重み    float32  [2]     8 B", " abcdef  float32  [2]     8 B"];
    let mut lines: Vec<&str> = table.lines().collect();
    lines[1..].sort_by_key(|it| it.is_ascii());
    assert_eq!(lines, expected);
}

#[test]
fn json_says_where_each_tensor_stands() {
    let listing = ok_json("inspect --json", &[&sample("tied.pt")]);
    let [wte, bias, lm_head, turned] = &listing["tensors"].as_array().unwrap()[..] else {
        panic!("{listing}")
    };
    assert_eq!(
        (&wte["storage"], &wte["offset_bytes"], wte.get("same_bytes_as")),
        (&lm_head["storage"], &json!(0), None)
    );
    assert_eq!((&lm_head["same_bytes_as"], &turned["storage"]), (&json!("wte.weight"), &wte["storage"]));
    assert_eq!(turned.get("same_bytes_as"), None);
    assert_ne!(bias["storage"], wte["storage"]);
    let layouts = ok_json("inspect --json", &[&sample("layouts.pt")]);
    let offsets: Vec<u64> = layouts["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["offset_bytes"].as_u64().unwrap())
        .collect();
    assert!(offsets.iter().any(|it| *it > 0 && it % 4 == 0), "{offsets:?}");
}

#[test]
fn a_tensor_without_data_has_no_size() {
    let (table, _) = ok("inspect", &[&sample("meta.pt")]);
    assert_eq!(table.lines().nth(1).unwrap(), " m       float32  [3, 4]  meta");
    let listing = ok_json("inspect --json", &[&sample("meta.pt")]);
    let [meta, plain] = &listing["tensors"].as_array().unwrap()[..] else { panic!("{listing}") };
    assert_eq!((&meta["has_data"], meta.get("storage")), (&json!(false), None));
    assert_eq!((plain.get("has_data"), &plain["storage"]), (None, &json!(0)));
}

#[test]
fn a_file_without_tensors_says_so() {
    for name in ["only_numbers.pt", "no_tensors.safetensors"] {
        let (table, words) = ok("inspect", &[&sample(name)]);
        assert_eq!(table, "", "{name}");
        assert!(words.contains("holds no tensors; `unladen inspect --tree` shows"), "{name}: {words}");
    }
    assert!(!ok("inspect", &[&sample("state_dict.pt")]).1.contains("no tensors"));
}

#[test]
fn a_tree_may_be_what_stands_at_one_path() {
    let file = sample("lightning.ckpt");
    let at = |path: &str| ok(&format!("inspect --tree --root {path}"), &[&file]).0;
    assert_eq!(at("epoch"), "2\n");
    assert_eq!(at("hyper_parameters"), "{\n  'lr': 0.001\n  'layers': [4, 3]\n}\n");
    assert_eq!(at("hyper_parameters.layers.1"), "3\n");
    assert_eq!(at("optimizer_states.0.param_groups.0.betas"), "(0.9, 0.999)\n");
    assert_eq!(at("state_dict.0.bias"), "tensor float32 [3] `state_dict.0.bias`\n");
    // A path is the start of keys up to a dot, as it is for the names of tensors.
    let layer = at("state_dict.0");
    assert_eq!(layer.lines().count(), 4, "{layer}");
    assert!(layer.contains("'0.weight': tensor") && !layer.contains("'1.weight'"), "{layer}");
    assert!(at("auto").starts_with("{\n  '0.weight'"), "{}", at("auto"));
    let json = ok_json("inspect --json --tree=full --root hyper_parameters", &[&file]);
    assert_eq!(json, json!({ "lr": 0.001, "layers": [4, 3] }));
    // A module's parts stand at its own path, as in its state dict.
    let module = sample("module_full.pt");
    assert!(ok("inspect --tree --root 0.weight", &[&module]).0.starts_with("tensor float32 [3, 4]"));
    let metadata = sample("metadata.safetensors");
    let all = ok_json("inspect --json --tree", &[&metadata])["__metadata__"].clone();
    assert_eq!(ok_json("inspect --json --tree --root __metadata__", &[&metadata]), all);
    let (key, value) = all.as_object().unwrap().iter().next().unwrap();
    assert_eq!(&ok_json(&format!("inspect --json --tree --root __metadata__.{key}"), &[&metadata]), value);
}

#[test]
fn a_path_that_leads_nowhere_in_a_tree_names_what_is_there() {
    let file = sample("lightning.ckpt");
    let error = |path: &str| fails(1, &format!("inspect --tree --root {path}"), &[&file]);
    assert!(error("nope").contains("`epoch`, `global_step`") && error("nope").contains("at the top"));
    let deep = error("hyper_parameters.layer.1");
    assert!(deep.contains("found `lr`, `layers` below `hyper_parameters`"), "{deep}");
    assert!(error("epoch.x").contains("nothing below `epoch`"), "{}", error("epoch.x"));
    let error =
        fails(1, "inspect --tree --json --root __metadata__.nope", &[&sample("metadata.safetensors")]);
    assert!(error.contains("below `__metadata__`"), "{error}");
    fails(2, "inspect --tree --hash sha256", &[&file]);
}

#[test]
fn the_tree_of_a_tar_archive_has_tensors() {
    let (text, _) = ok("inspect --tree", &[&sample("tar.pt")]);
    assert!(text.contains("\n  'w': tensor float32 [3, 4] `w`\n  'n': tensor int64 [6] `n`\n"), "{text}");
    assert!(text.contains("'tied': tensor float32 [3, 4] `tied`") && !text.contains("storage"), "{text}");
    let json = ok_json("inspect --tree --json", &[&sample("tar.pt")]);
    assert_eq!(json["n"], json!({ "$tensor": "int64", "shape": [6], "names": ["n"] }));
}
