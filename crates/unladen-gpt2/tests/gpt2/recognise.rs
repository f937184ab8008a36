//! What is no GPT-2 is told from what is nearly one, and every difference is named.

use crate::common::{Tensor, find, load, owned};
use unladen::{DType, Error, StateDict};
use unladen_gpt2::{Config, Gpt2, Naming, recognise, tensors_of};

fn recognised(tensors: &[Tensor], n_heads: Option<usize>) -> unladen::Result<Option<(Config, Naming)>> {
    recognise(tensors.iter().map(|it| (&*it.name, it.dtype, &it.shape[..])), n_heads)
}

/// The message for a change of a fixture, after a look at its kind and at the same message from a state dict.
fn mismatch(name: &str, change: impl FnOnce(&mut Vec<Tensor>)) -> String {
    let mut tensors = load(name);
    change(&mut tensors);
    let error = recognised(&tensors, Some(4)).unwrap_err();
    let state = owned(&tensors);
    let of_state = Gpt2::of(&state, Some(4)).map(|_| ()).unwrap_err();
    assert_eq!(of_state.to_string(), error.to_string());
    assert!(matches!(error, Error::Mismatch(_)) && !error.hint().is_empty(), "{error}");
    error.to_string()
}

#[test]
fn sizes_and_spelling_are_read_from_names_and_shapes() {
    let config = Config { vocab_size: 97, context_length: 16, ..Config::named("tiny").unwrap() };
    for (name, naming) in [
        ("notebook.safetensors", Naming::Notebook),
        ("hf.safetensors", Naming::HuggingFace { prefixed: true }),
        ("hf-headless.safetensors", Naming::HuggingFace { prefixed: false }),
    ] {
        assert_eq!(recognised(&load(name), None).unwrap(), Some((config, naming)));
        let two_heads = recognised(&load(name), Some(2)).unwrap();
        assert_eq!(two_heads, Some((Config { n_heads: 2, ..config }, naming)));
    }
}

#[test]
fn what_is_no_gpt2_is_none() {
    let of = |names: &[&str]| {
        let tensors: Vec<_> = names.iter().map(|it| Tensor::f32(it, &[2, 2], [0.0; 4])).collect();
        recognised(&tensors, None).unwrap()
    };
    assert_eq!(of(&[]), None);
    assert_eq!(
        of(&["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]),
        None
    );
    assert_eq!(of(&["conv1.weight", "bn1.weight", "fc.bias"]), None);
    assert_eq!(of(&["wte.weight", "wpe.weight"]), None);
    assert_eq!(of(&["h.0.attn.c_attn.weight", "encoder.weight", "decoder.weight"]), None);
    assert!(Gpt2::of(&StateDict::default(), None).unwrap().is_none());
}

#[test]
fn every_missing_tensor_is_named() {
    for name in ["notebook.safetensors", "hf.safetensors", "hf-headless.safetensors"] {
        for gone in load(name).iter().map(|it| &it.name).filter(|it| !it.ends_with(".mask")) {
            let message = mismatch(name, |tensors| tensors.retain(|it| it.name != *gone));
            assert!(
                message.contains(&format!("`{gone}`")) && message.ends_with("found no such tensor"),
                "{message}"
            );
        }
    }
}

#[test]
fn a_missing_block_is_named() {
    let message = mismatch("hf.safetensors", |tensors| {
        tensors.iter_mut().for_each(|it| it.name = it.name.replace(".h.1.", ".h.1000000000000000."));
    });
    assert_eq!(message, "tensor `transformer.h.1.ln_1.weight`: expected float32 [64], found no such tensor");
}

#[test]
fn every_wrong_shape_and_dtype_is_named_with_both_sides() {
    for name in ["notebook.safetensors", "hf-headless.safetensors"] {
        for (at, tensor) in load(name).iter().enumerate() {
            let message = mismatch(name, |tensors| tensors[at].dtype = DType::I32);
            let wrong = format!("`{}`: expected float32 {:?}, found int32", tensor.name, tensor.shape);
            assert!(message.contains(&wrong), "{message}");

            // Embeddings say what the sizes are: a change of theirs shows somewhere else.
            if tensor.name.contains("emb.") || ["wte.weight", "wpe.weight"].contains(&&*tensor.name) {
                continue;
            }
            let message = mismatch(name, |tensors| {
                let n_elems = tensors[at].shape.iter().product::<u64>();
                (tensors[at].shape, tensors[at].stride) = (vec![1, n_elems], vec![n_elems, 1]);
            });
            assert!(message.contains(&format!("`{}`: expected float32", tensor.name)), "{message}");
            assert!(message.contains("found float32 [1, "), "{message}");
        }
    }
}

#[test]
fn embeddings_of_another_width_do_not_fit_the_blocks() {
    let message = mismatch("notebook.safetensors", |tensors| {
        *find(tensors, "tok_emb.weight") = Tensor::f32("tok_emb.weight", &[97, 32], [0.0; 97 * 32]);
    });
    assert_eq!(message, "tensor `pos_emb.weight`: expected float32 [16, 32], found float32 [16, 64]");
    let message = mismatch("hf.safetensors", |tensors| {
        *find(tensors, "transformer.wte.weight") = Tensor::f32("transformer.wte.weight", &[64], [0.0; 64]);
    });
    assert_eq!(message, "tensor `transformer.wte.weight`: expected a shape of two sizes, found [64]");
}

#[test]
fn a_tensor_too_many_is_named() {
    for (name, extra) in [
        ("notebook.safetensors", "trf_blocks.0.att.W_query.lora"),
        ("notebook.safetensors", "lm_head.weight"),
        ("hf.safetensors", "transformer.h.0.crossattention.q_attn.weight"),
        ("hf.safetensors", "wte.weight"),
    ] {
        let message = mismatch(name, |tensors| tensors.push(Tensor::f32(extra, &[1], [0.0])));
        assert_eq!(
            message,
            format!("tensor `{extra}`: expected only the tensors of a GPT-2 with 2 blocks, found one more")
        );
    }
}

#[test]
fn heads_are_asked_for_when_no_named_size_has_the_width() {
    let narrow = |name: &str| -> Vec<Tensor> {
        let halve = |it: &u64| if [64, 192, 256].contains(it) { it / 2 } else { *it };
        load(name)
            .into_iter()
            .map(|it| {
                let shape: Vec<u64> = it.shape.iter().map(halve).collect();
                Tensor::f32(&it.name, &shape, (0..shape.iter().product()).map(|_| 0.0))
            })
            .collect()
    };
    let tensors = narrow("hf.safetensors");
    let error = recognised(&tensors, None).unwrap_err();
    assert!(error.kind() == "Mismatch" && error.hint().contains("n_head"), "{error}: {}", error.hint());
    assert!(error.to_string().contains("emb_dim 32"), "{error}");
    assert!(recognised(&tensors, Some(8)).unwrap().is_some());
    for n_heads in [0, 5, 64, usize::MAX] {
        let error = recognised(&tensors, Some(n_heads)).unwrap_err();
        assert!(error.to_string().contains(&n_heads.to_string()), "{error}");
    }
}

#[test]
fn a_vector_with_gaps_is_refused_by_name() {
    let mut tensors = load("notebook.safetensors");
    let norm = find(&mut tensors, "final_norm.scale");
    norm.stride = vec![2];
    norm.bytes.resize(2 * 64 * 4, 0);
    let state = owned(&tensors);
    let error = Gpt2::of(&state, Some(4)).map(|_| ()).unwrap_err();
    assert!(error.kind() == "Mismatch" && error.to_string().contains("`final_norm.scale`"), "{error}");
}

#[test]
fn a_config_that_is_not_the_state_dicts_is_refused() {
    let state = owned(&load("notebook.safetensors"));
    let (config, naming) = recognise(tensors_of(&state), None).unwrap().unwrap();
    assert!(Gpt2::new(&state, config, naming).is_ok());
    for wrong in [
        Config { n_layers: 3, ..config },
        Config { n_layers: 1, ..config },
        Config { vocab_size: 96, ..config },
        Config { context_length: usize::MAX, ..config },
        Config { emb_dim: 0, ..config },
        Config { n_heads: 0, ..config },
    ] {
        assert_eq!(Gpt2::new(&state, wrong, naming).map(|_| ()).unwrap_err().kind(), "Mismatch", "{wrong:?}");
    }
    let wrong = Naming::HuggingFace { prefixed: true };
    assert_eq!(Gpt2::new(&state, config, wrong).map(|_| ()).unwrap_err().kind(), "Mismatch");
}
