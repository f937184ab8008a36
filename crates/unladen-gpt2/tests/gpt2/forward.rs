//! Logits and greedy tokens agree with PyTorch's, wherever and however the weights lie.

use crate::common::{
    Tensor, deviation, expected, expected_logits, find, fixture, load, numbers, owned, place,
};
use std::fs::File;
use unladen::{
    DType, StateDict,
    destination::{Arena, Placed},
    memory::{Mapping, Reservation},
    tensor::Layout,
};
use unladen_gpt2::{Config, Gpt2, Naming, init, n_heads_from_config_json};

const N_HEADS: Option<usize> = Some(4);

fn ids() -> Vec<u32> {
    numbers(&expected()["ids"])
}

fn logits(state: &StateDict<'_>) -> Vec<f32> {
    Gpt2::of(state, N_HEADS).unwrap().unwrap().forward(&ids()).unwrap()
}

fn assert_agrees(state: &StateDict<'_>, model: &str) {
    let gpt2 = Gpt2::of(state, N_HEADS).unwrap().unwrap();
    let expected_logits = expected_logits(model);
    let found = gpt2.forward(&ids()).unwrap();
    assert!(deviation(&found, &expected_logits) < 1e-4, "{model}: {}", deviation(&found, &expected_logits));
    let last = gpt2.forward_last(&ids()).unwrap();
    let expected_last = &expected_logits[expected_logits.len() - gpt2.config().vocab_size..];
    assert!(deviation(&last, expected_last) < 1e-4, "{model}");
    let greedy: Vec<u32> = gpt2.generate(&ids()[..4], 12, None).unwrap().collect();
    assert_eq!(greedy, numbers::<u32>(&expected()[model]["greedy"]), "{model}");
}

#[test]
fn the_notebooks_model_gives_pytorchs_logits_with_and_without_its_masks() {
    let mut tensors = load("notebook.safetensors");
    assert_agrees(&owned(&tensors), "notebook");
    tensors.retain(|it| !it.name.ends_with(".mask"));
    assert_agrees(&owned(&tensors), "notebook");
}

#[test]
fn masks_of_the_state_dict_are_the_ones_that_count() {
    let mut tensors = load("notebook.safetensors");
    let mask = |name: &str, hides: fn(i32, i32) -> bool| {
        let elements = (0..256).map(|at| f32::from(hides(at / 16, at % 16)));
        Tensor::f32(name, &[16, 16], elements)
    };
    let [first, second] = ["trf_blocks.0.att.mask", "trf_blocks.1.att.mask"];
    *find(&mut tensors, first) = mask(first, |query, key| key > query + 1);
    *find(&mut tensors, second) = mask(second, |query, key| key > query || key + 3 <= query);
    assert_agrees(&owned(&tensors), "other_masks");

    let mask = find(&mut tensors, second);
    *mask = mask.stored_transposed();
    assert_agrees(&owned(&tensors), "other_masks");

    // As booleans, column by column.
    mask_to_bool(find(&mut tensors, second));
    assert_agrees(&owned(&tensors), "other_masks");
}

fn mask_to_bool(mask: &mut Tensor) {
    mask.bytes = mask.elements().into_iter().map(|it| u8::from(it != 0.0)).collect();
    mask.dtype = DType::Bool;
}

#[test]
fn hugging_faces_model_gives_pytorchs_logits_in_each_of_its_spellings() {
    let config = std::fs::read_to_string(fixture("hf-config.json")).unwrap();
    assert_eq!(n_heads_from_config_json(&config).unwrap(), N_HEADS);
    for name in ["hf.safetensors", "hf-headless.safetensors"] {
        let mut tensors = load(name);
        let state = owned(&tensors);
        let gpt2 = Gpt2::of(&state, N_HEADS).unwrap().unwrap();
        assert_eq!((gpt2.config().n_layers, gpt2.config().context_length), (2, 16));
        assert_agrees(&state, "hf");

        // Older files have the head, which is tied, and the buffers of the causal mask.
        let prefix = if name == "hf.safetensors" { "transformer." } else { "" };
        let tied = find(&mut tensors, &format!("{prefix}wte.weight")).elements();
        tensors.push(Tensor::f32("lm_head.weight", &[97, 64], tied));
        tensors.push(Tensor::f32(&format!("{prefix}h.0.attn.bias"), &[1, 1, 16, 16], [0.5; 256]));
        tensors.push(Tensor::f32(&format!("{prefix}h.1.attn.masked_bias"), &[], [-1e4]));
        assert_agrees(&owned(&tensors), "hf");
    }
}

#[test]
fn a_head_of_its_own_is_used() {
    let mut tensors = load("hf.safetensors");
    let tied = find(&mut tensors, "transformer.wte.weight").elements();
    tensors.push(Tensor::f32("lm_head.weight", &[97, 64], tied.iter().map(|it| -it)));
    let negated: Vec<f32> = expected_logits("hf").iter().map(|it| -it).collect();
    assert!(deviation(&logits(&owned(&tensors)), &negated) < 1e-4);
}

#[test]
fn matrices_may_be_stored_column_by_column() {
    for (name, model) in [("notebook.safetensors", "notebook"), ("hf.safetensors", "hf")] {
        let tensors: Vec<Tensor> = load(name)
            .into_iter()
            .map(|it| if it.shape.len() == 2 { it.stored_transposed() } else { it })
            .collect();
        assert_agrees(&owned(&tensors), model);
    }
}

#[test]
fn weights_may_be_mapped_or_the_callers() {
    let path = fixture("notebook.safetensors");
    let file = std::fs::read(&path).unwrap();
    let (header_bytes, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
    let mapping =
        Mapping::new(&File::open(&path).unwrap(), Reservation::uncounted(file.len() as u64), &path).unwrap();
    let placed = metadata.tensors().into_iter().map(|(name, info)| {
        let shape: Vec<u64> = info.shape.iter().map(|&it| it as u64).collect();
        let start_byte = (8 + header_bytes + info.data_offsets.0) as u64;
        (name, Placed { arena: 0, start_byte, layout: Layout::contiguous(DType::F32, &shape).unwrap() })
    });
    let state = StateDict::new(vec![Arena::Mapped(mapping)], placed).unwrap();
    assert_agrees(&state, "notebook");

    let (placed, bytes) = place(&load("hf.safetensors"));
    let mut memory = vec![0; bytes.len() + 4];
    let start = memory.as_ptr().align_offset(4);
    memory[start..start + bytes.len()].copy_from_slice(&bytes);
    let caller = Arena::Caller(&mut memory[start..start + bytes.len()]);
    assert_agrees(&StateDict::new(vec![caller], placed).unwrap(), "hf");
}

#[test]
fn the_number_of_threads_does_not_change_the_logits() {
    for name in ["notebook.safetensors", "hf.safetensors"] {
        let state = owned(&load(name));
        let of = |n_threads| {
            let gpt2 = Gpt2::of(&state, N_HEADS).unwrap().unwrap().with_threads(n_threads);
            gpt2.forward(&ids()).unwrap()
        };
        let one = of(1);
        for n_threads in [0, 2, 3, 7, 200] {
            assert!(deviation(&of(n_threads), &one) < 1e-5, "{n_threads} threads");
        }
    }
}

#[test]
fn kept_keys_and_values_generate_what_whole_passes_do() {
    let config = Config { vocab_size: 301, context_length: 40, ..Config::named("tiny").unwrap() };
    let tensors: Vec<Tensor> = init::tensors(&config)
        .unwrap()
        .iter()
        .map(|it| {
            let mut elements = vec![0.0; it.n_elems() as usize];
            it.fill(11, 0, &mut elements);
            Tensor::f32(&it.name, &it.shape, elements)
        })
        .collect();
    let state = owned(&tensors);
    let gpt2 = Gpt2::new(&state, config, Naming::Notebook).unwrap();
    let mut ids = vec![300, 5, 77];
    let kept: Vec<u32> = gpt2.generate(&ids, 37, None).unwrap().collect();
    for &id in &kept {
        let logits = gpt2.forward_last(&ids).unwrap();
        let whole = gpt2.forward(&ids).unwrap();
        assert!(deviation(&logits, &whole[whole.len() - 301..]) < 1e-5);
        let likeliest = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        assert_eq!(id, likeliest as u32, "after {ids:?}");
        ids.push(id);
    }
    assert_eq!(ids.len(), 40);
    let end = kept[4];
    let first = kept.iter().position(|&it| it == end).unwrap();
    let stopped: Vec<u32> = gpt2.generate(&ids[..3], 37, Some(end)).unwrap().collect();
    assert_eq!(stopped, kept[..first]);
}

#[test]
fn ids_that_the_model_cannot_take_are_named() {
    let state = owned(&load("notebook.safetensors"));
    let gpt2 = Gpt2::of(&state, N_HEADS).unwrap().unwrap();
    let message = |ids: &[u32]| {
        let error = gpt2.forward(ids).unwrap_err();
        assert_eq!(
            (error.kind(), gpt2.forward_last(ids).unwrap_err().to_string()),
            ("Mismatch", error.to_string())
        );
        error.to_string()
    };
    assert_eq!(message(&[]), "expected at least one token, found none");
    assert_eq!(
        message(&[1, 97]),
        "expected token ids below 97, the model's vocabulary, found 97 at position 1"
    );
    assert_eq!(message(&[1; 17]), "expected at most 16 tokens, the model's context, found 17");
    assert!(gpt2.forward(&[1; 16]).is_ok());
    assert!(gpt2.generate(&[1; 10], 7, None).is_err());
    assert!(gpt2.generate(&[1; 10], usize::MAX, None).is_err());
    assert_eq!(gpt2.generate(&[1; 10], 0, None).unwrap().count(), 0);
}

#[test]
fn logits_are_the_same_however_many_tokens_are_computed_together() {
    for (file, is_turned) in [("notebook", false), ("notebook", true), ("hf", false), ("hf", true)] {
        let mut tensors = load(&format!("{file}.safetensors"));
        for tensor in tensors.iter_mut().filter(|it| is_turned && it.shape.len() == 2) {
            *tensor = tensor.stored_transposed();
        }
        let state = owned(&tensors);
        let gpt2 = Gpt2::of(&state, N_HEADS).unwrap().unwrap();
        let ids: Vec<u32> = ids().into_iter().cycle().take(gpt2.config().context_length.min(20)).collect();
        let all = gpt2.forward(&ids).unwrap();
        for n_tokens in 1..10 {
            let few = gpt2.forward(&ids[..n_tokens]).unwrap();
            let deviation = deviation(&few, &all[..few.len()]);
            assert!(deviation < 1e-5, "{file}, {n_tokens} tokens: {deviation}");
        }
    }
}
