//! GPT-2: what runs, what loads only, and whose `config.json` is asked.

use super::*;

#[test]
fn gpt2_runs_in_every_naming_and_a_saved_one_comes_from_its_seed() {
    for name in ["notebook.safetensors", "hf.safetensors", "hf-headless.safetensors"] {
        let found = ok_json("gpt2 forward --json --tokens 3,96,0", &[&gpt2(name)]);
        assert_eq!(found["shape"], json!([3, 97]));
        assert_eq!(found["logits"].as_array().unwrap().len(), 3 * 97);
    }
    let folder = TempDir::new().unwrap();
    let [one, same, other] = ["one.pth", "same.safetensors", "other.pth"].map(|it| folder.path().join(it));
    ok("gpt2 save --size tiny --seed 7", &[&one]);
    ok("gpt2 save --size tiny --seed 7", &[&same]);
    ok("gpt2 save --size tiny --seed 8", &[&other]);
    assert_eq!(digest_of(&one), digest_of(&same));
    assert_ne!(digest_of(&one), digest_of(&other));
    assert!(ok("gpt2 generate --tokens 3 --prompt Hello", &[&one]).0.starts_with("Hello"));
}

#[test]
fn a_model_that_is_nearly_a_gpt2_loads_and_does_not_run() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("bigcode.safetensors");
    // Attention with one key and one value for all heads, under GPT-2's names.
    let tensors: &[(&str, &[u64])] = &[
        ("transformer.wte.weight", &[97, 64]),
        ("transformer.wpe.weight", &[16, 64]),
        ("transformer.h.0.ln_1.weight", &[64]),
        ("transformer.h.0.ln_1.bias", &[64]),
        ("transformer.h.0.attn.c_attn.weight", &[96, 64]),
    ];
    zeros(&path, tensors);
    let error = fails(1, "gpt2 forward", &[&path]);
    assert!(error.contains("`transformer.h.0.attn.c_attn.weight`") && error.contains("[96, 64]"), "{error}");
    let (_, words) = ok("load --logits-to", &[&folder.path().join("logits"), &path]);
    assert!(words.contains("forward pass skipped: ") && words.contains("c_attn"), "{words}");
    assert_eq!(names_in(folder.path()), ["bigcode.safetensors"]);
    let (rows, words) = compared("", &folder.path().join("bench"), &path);
    assert!(
        rows.iter().all(|it| it["digest"] == rows[0]["digest"] && it.get("forward_s").is_none()),
        "{rows:?}"
    );
    assert!(
        words.contains("forward pass") && words.contains("c_attn"),
        "unsaid that it was skipped: {words}"
    );
}

#[test]
fn config_json_gives_the_heads_of_hugging_faces_models_and_is_asked_for_no_other() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let [model, notebook, other] = [at("model.safetensors"), at("notebook.safetensors"), at("other.pt")];
    fs::copy(gpt2("hf.safetensors"), &model).unwrap();
    fs::copy(gpt2("notebook.safetensors"), &notebook).unwrap();
    fs::copy(sample("state_dict.pt"), &other).unwrap();
    let logits = |path: &Path| ok_json("gpt2 forward --json", &[path])["logits"].clone();
    let four_heads = logits(&model);
    fs::write(at("config.json"), r#"{"model_type": "gpt2", "n_head": 2}"#).unwrap();
    assert_ne!(logits(&model), four_heads);
    assert_eq!(logits(folder.path()), logits(&model), "a folder is its model");
    let broken =
        [("{ broken", "JSON"), ("{\"n_head\": \"x\"}", "n_head"), ("{\"model_type\": \"llama\"}", "llama")];
    for (text, word) in broken {
        fs::write(at("config.json"), text).unwrap();
        let error = fails(1, "gpt2 forward", &[&model]);
        assert!(error.contains("config.json: ") && error.contains(word), "{error}");
        ok("gpt2 forward --heads 4", &[&model]);
        ok("gpt2 forward", &[&notebook]);
        for path in [&model, &notebook, &other] {
            ok("load --strategy naive", &[path]);
        }
        let (_, words) = compared("--strategies stream", &at("bench"), &model);
        assert!(words.contains("forward pass") && words.contains(word), "{words}");
    }
}
