//! The forward pass on a GPU agrees with the host's, in every type and orientation of weights: over a fake driver that runs
//! the kernels' own source. What it shows is right or wrong, never fast.

use crate::{
    common::{Tensor, deviation, expected, expected_logits, find, load, numbers, owned},
    fake_driver::{Fake, Report, first_middle_last},
};
use unladen::{
    DType, Device, Error, Result, cast,
    cuda::{Context, Memory},
    memory::{Ledger, Space},
};
use unladen_gpt2::{
    Config, Gpt2, Naming,
    gpu::{GpuModel, GpuTensor, Kernels, recognise},
    init,
};

fn ids() -> Vec<u32> {
    numbers(&expected()["ids"])
}

/// The same tensors with floats of another type.
fn cast_to(dtype: DType, tensors: &[Tensor]) -> Vec<Tensor> {
    let cast = |it: &Tensor| {
        let mut bytes = vec![0; it.elements().len() * dtype.size_bytes() as usize];
        cast::cast(DType::F32, dtype, &it.bytes, &mut bytes);
        Tensor { name: it.name.clone(), dtype, shape: it.shape.clone(), stride: it.stride.clone(), bytes }
    };
    tensors.iter().map(cast).collect()
}

fn cast_back(tensors: &[Tensor]) -> Vec<Tensor> {
    let cast = |it: &Tensor| {
        let mut bytes = vec![0; it.shape.iter().product::<u64>() as usize * 4];
        cast::cast(it.dtype, DType::F32, &it.bytes, &mut bytes);
        let (name, shape, stride) = (it.name.clone(), it.shape.clone(), it.stride.clone());
        Tensor { name, dtype: DType::F32, shape, stride, bytes }
    };
    tensors.iter().map(cast).collect()
}

/// Tensors on a GPU, one after the other, each as badly aligned as its type allows.
struct OnGpu {
    kernels: Kernels,
    memory: Memory,
    start_bytes: Vec<u64>,
}

impl OnGpu {
    fn new(tensors: &[Tensor]) -> Result<OnGpu> {
        let context = Context::open(0)?;
        let mut all = Vec::new();
        let mut start_bytes = Vec::new();
        for tensor in tensors {
            let elem_bytes = tensor.dtype.size_bytes() as usize;
            all.resize(all.len().next_multiple_of(elem_bytes), 0xff);
            start_bytes.push(all.len() as u64);
            all.extend_from_slice(&tensor.bytes);
        }
        let ledger = Ledger::new();
        let memory = Memory::new(&context, ledger.reserve(Space::Device(Device::Cuda(0)), all.len() as u64))?;
        memory.write(0, &all)?;
        Ok(OnGpu { kernels: Kernels::load(&context)?, memory, start_bytes })
    }

    fn see<'m>(&'m self, tensors: &'m [Tensor]) -> Vec<GpuTensor<'m>> {
        let see = |(it, &start_byte): (&'m Tensor, &u64)| GpuTensor {
            name: &it.name,
            dtype: it.dtype,
            shape: &it.shape,
            memory: &self.memory,
            start_byte,
        };
        tensors.iter().zip(&self.start_bytes).map(see).collect()
    }
}

/// A model of four heads, or of another number, and what is asked of it.
fn with_model<T>(
    tensors: &[Tensor],
    n_heads: usize,
    max_tokens: usize,
    ask: impl FnOnce(&mut GpuModel<'_>) -> T,
) -> Result<T> {
    let on_gpu = OnGpu::new(tensors)?;
    let listed = tensors.iter().map(|it| (&*it.name, it.dtype, &it.shape[..]));
    let (config, naming) = recognise(listed, Some(n_heads))?.unwrap();
    let ledger = Ledger::new();
    let asked = {
        let reserve = |len_bytes| ledger.reserve(Space::Device(Device::Cuda(0)), len_bytes);
        let seen = on_gpu.see(tensors);
        let mut model = GpuModel::new(&on_gpu.kernels, &seen, config, naming, max_tokens, reserve)?;
        let held_bytes = ledger.get().0.device_bytes.total_bytes();
        assert_eq!(held_bytes, GpuModel::scratch_bytes(&config, max_tokens).unwrap());
        ask(&mut model)
    };
    assert_eq!(ledger.get().0.device_bytes.total_bytes(), 0);
    Ok(asked)
}

fn forward(tensors: &[Tensor], ids: &[u32]) -> Vec<f32> {
    with_model(tensors, 4, ids.len(), |it| it.forward(ids).unwrap()).unwrap()
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    let deviation = deviation(found, expected);
    assert!(deviation < 1e-4, "{what}: {deviation}");
}

/// What the fake driver must have to say in the end: nothing wrong, nothing left.
fn over(test: &str) -> bool {
    Fake::over(&format!("gpu::{test}"), Report::assert_clean).is_some()
}

#[test]
fn fixtures_give_pytorchs_logits_on_a_gpu() {
    if !over("fixtures_give_pytorchs_logits_on_a_gpu") {
        return;
    }
    for (file, model) in [("notebook", "notebook"), ("hf", "hf"), ("hf-headless", "hf")] {
        let mut tensors = load(&format!("{file}.safetensors"));
        assert_close(&forward(&tensors, &ids()), &expected_logits(model), file);
        tensors.retain(|it| !it.name.ends_with(".mask"));
        assert_close(&forward(&tensors, &ids()), &expected_logits(model), file);
    }
}

#[test]
fn sixteen_bit_weights_give_the_hosts_logits_for_the_same_numbers() {
    if !over("sixteen_bit_weights_give_the_hosts_logits_for_the_same_numbers") {
        return;
    }
    for file in ["notebook", "hf"] {
        for dtype in [DType::F16, DType::BF16] {
            let tensors = cast_to(dtype, &load(&format!("{file}.safetensors")));
            let state = owned(&cast_back(&tensors));
            let host = Gpt2::of(&state, Some(4)).unwrap().unwrap().forward(&ids()).unwrap();
            assert_close(&forward(&tensors, &ids()), &host, &format!("{file} {dtype}"));
        }
        // Matrices of 16 bits beside vectors of 32, as mixed precision saves them.
        let mut tensors = load(&format!("{file}.safetensors"));
        for tensor in tensors.iter_mut().filter(|it| it.shape.len() == 2) {
            *tensor = cast_to(DType::BF16, std::slice::from_ref(tensor)).remove(0);
        }
        let state = owned(&cast_back(&tensors));
        let host = Gpt2::of(&state, Some(4)).unwrap().unwrap().forward(&ids()).unwrap();
        assert_close(&forward(&tensors, &ids()), &host, &format!("{file} mixed"));
    }
}

#[test]
fn masks_on_the_gpu_are_the_ones_that_count() {
    if !over("masks_on_the_gpu_are_the_ones_that_count") {
        return;
    }
    let mut tensors = load("notebook.safetensors");
    let names = ["trf_blocks.0.att.mask", "trf_blocks.1.att.mask"];
    let hides: [fn(i32, i32) -> bool; 2] =
        [|query, key| key > query + 1, |query, key| key > query || key + 3 <= query];
    for (name, hides) in names.iter().zip(hides) {
        // A negative zero hides nothing.
        let elements = (0..256).map(|at| if hides(at / 16, at % 16) { 1.0 } else { -0.0 });
        *find(&mut tensors, name) = Tensor::f32(name, &[16, 16], elements);
    }
    assert_close(&forward(&tensors, &ids()), &expected_logits("other_masks"), "float32");

    let mask = find(&mut tensors, names[0]);
    *mask = cast_to(DType::F16, std::slice::from_ref(mask)).remove(0);
    let mask = find(&mut tensors, names[1]);
    mask.bytes = mask.elements().into_iter().map(|it| u8::from(it != 0.0)).collect();
    mask.dtype = DType::Bool;
    assert_close(&forward(&tensors, &ids()), &expected_logits("other_masks"), "float16 and bool");

    // Softmax of nothing is no number, here as there.
    let name = names[0];
    *find(&mut tensors, name) = Tensor::f32(name, &[16, 16], [1.0; 256]);
    assert!(forward(&tensors, &ids()).iter().all(|it| it.is_nan()));
}

/// The notebook's model as Hugging Face would save it.
fn as_hugging_face(notebook: &[Tensor], n_layers: usize) -> Vec<Tensor> {
    let get = |name: &str| notebook.iter().find(|it| it.name == name).unwrap();
    let renamed = |name: &str, from: &str| {
        let from = get(from);
        Tensor::f32(name, &from.shape, from.elements())
    };
    // Matrices of (out, in) side by side become one of (in, out).
    let turned = |name: &str, from: &[String]| {
        let n_in = get(&from[0]).shape[1];
        let rows: Vec<f32> = from.iter().flat_map(|it| get(it).elements()).collect();
        let n_out = rows.len() as u64 / n_in;
        let elements = (0..n_in * n_out).map(|at| rows[(at % n_out * n_in + at / n_out) as usize]);
        Tensor::f32(name, &[n_in, n_out], elements)
    };
    let joined = |name: &str, from: &[String]| {
        let elements: Vec<f32> = from.iter().flat_map(|it| get(it).elements()).collect();
        Tensor::f32(name, &[elements.len() as u64], elements)
    };
    let mut tensors = vec![
        renamed("wte.weight", "tok_emb.weight"),
        renamed("wpe.weight", "pos_emb.weight"),
        renamed("ln_f.weight", "final_norm.scale"),
        renamed("ln_f.bias", "final_norm.shift"),
        renamed("lm_head.weight", "out_head.weight"),
    ];
    for layer in 0..n_layers {
        let from = format!("trf_blocks.{layer}");
        for (ours, theirs) in [("norm1", "ln_1"), ("norm2", "ln_2")] {
            tensors.push(renamed(&format!("h.{layer}.{theirs}.weight"), &format!("{from}.{ours}.scale")));
            tensors.push(renamed(&format!("h.{layer}.{theirs}.bias"), &format!("{from}.{ours}.shift")));
        }
        let linears: [(&str, &[&str]); 4] = [
            ("attn.c_attn", &["att.W_query", "att.W_key", "att.W_value"]),
            ("attn.c_proj", &["att.out_proj"]),
            ("mlp.c_fc", &["ff.layers.0"]),
            ("mlp.c_proj", &["ff.layers.2"]),
        ];
        for (theirs, ours) in linears {
            let named = |part: &str| ours.iter().map(|it| format!("{from}.{it}.{part}")).collect::<Vec<_>>();
            tensors.push(turned(&format!("h.{layer}.{theirs}.weight"), &named("weight")));
            tensors.push(joined(&format!("h.{layer}.{theirs}.bias"), &named("bias")));
        }
    }
    tensors
}

#[test]
fn any_number_of_tokens_and_any_sizes_give_the_hosts_logits() {
    if !over("any_number_of_tokens_and_any_sizes_give_the_hosts_logits") {
        return;
    }
    // Heads wider and narrower than a block of attention, widths that no block of a product divides, more keys than are
    // looked at together; and a model of next to nothing.
    let sizes = [(101, 135, 21, 2, 3), (33, 66, 146, 1, 2), (5, 9, 2, 1, 2)];
    for (vocab_size, context_length, emb_dim, n_layers, n_heads) in sizes {
        let config = Config { vocab_size, context_length, emb_dim, n_layers, n_heads };
        let mut tensors: Vec<Tensor> = Vec::new();
        for planned in init::tensors(&config).unwrap() {
            let mut elements = vec![0.0; planned.n_elems() as usize];
            planned.fill(7, 0, &mut elements);
            // Norms of ones and zeros would hide a norm that is not applied, and low scores the correction by a higher one.
            for (at, it) in elements.iter_mut().enumerate() {
                match &planned.name {
                    name if name.contains("norm") => *it += (at % 5) as f32 / 10.0,
                    name if name.contains("W_query") || name.contains("W_key") => *it *= 4.0,
                    _ => {}
                }
            }
            tensors.push(Tensor::f32(&planned.name, &planned.shape, elements));
        }
        let state = owned(&tensors);
        let host = Gpt2::new(&state, config, Naming::Notebook).unwrap();
        let ids: Vec<u32> = (0..context_length).map(|it| ((it * 31 + 7) % vocab_size) as u32).collect();
        let check = |model: &mut GpuModel<'_>, counts: &[usize]| {
            for &n_tokens in counts {
                let Some(ids) = ids.get(..n_tokens) else { continue };
                let what = format!("{config:?}, {n_tokens} tokens");
                let found = model.forward(ids).unwrap();
                assert_close(&found, &host.forward(ids).unwrap(), &what);
                let last = model.forward_last(ids).unwrap();
                assert_eq!(last, found[found.len() - vocab_size..], "{what}");
            }
        };
        with_model(&tensors, n_heads, context_length, |model| check(model, &[1, 7, 8, 9, 65, 135])).unwrap();
        let turned = as_hugging_face(&tensors, n_layers);
        with_model(&turned, n_heads, 10, |model| check(model, &[1, 9])).unwrap();
    }
}

#[test]
fn a_head_of_its_own_is_used_on_a_gpu() {
    if !over("a_head_of_its_own_is_used_on_a_gpu") {
        return;
    }
    let mut tensors = load("hf.safetensors");
    let tied = find(&mut tensors, "transformer.wte.weight").elements();
    tensors.push(Tensor::f32("lm_head.weight", &[97, 64], tied.iter().map(|it| -it)));
    let negated: Vec<f32> = expected_logits("hf").iter().map(|it| -it).collect();
    assert_close(&forward(&tensors, &ids()), &negated, "negated");
}

#[test]
fn what_the_gpu_cannot_compute_is_named_before_anything_runs() {
    if !over("what_the_gpu_cannot_compute_is_named_before_anything_runs") {
        return;
    }
    let tensors = load("notebook.safetensors");
    let message = |model: &mut GpuModel<'_>, ids: &[u32]| {
        let error = model.forward(ids).unwrap_err();
        assert_eq!(error.kind(), "Mismatch", "{error}");
        error.to_string()
    };
    with_model(&tensors, 4, 10, |model| {
        assert_eq!(message(model, &[]), "expected at least one token, found none");
        assert!(message(model, &[1, 97]).contains("97 at position 1"));
        assert!(message(model, &[1; 17]).contains("the model's context"));
        assert!(message(model, &[1; 11]).contains("at most 10 tokens"));
        assert!(model.forward(&[1; 10]).is_ok());
    })
    .unwrap();

    let on_gpu = OnGpu::new(&tensors).unwrap();
    let config = Config { vocab_size: 97, context_length: 16, ..Config::named("tiny").unwrap() };
    let refused = |change: &dyn Fn(&mut GpuTensor<'_>)| {
        let mut seen = on_gpu.see(&tensors);
        seen.iter_mut().filter(|it| it.name == "final_norm.scale").for_each(change);
        let ledger = Ledger::new();
        let reserve = |len_bytes| ledger.reserve(Space::Device(Device::Cuda(0)), len_bytes);
        let model = GpuModel::new(&on_gpu.kernels, &seen, config, Naming::Notebook, 8, reserve);
        let error = model.map(|_| ()).unwrap_err();
        assert_eq!((error.kind(), ledger.get().1.device_bytes.total_bytes()), ("Mismatch", 0));
        assert!(error.to_string().contains("`final_norm.scale`"), "{error}");
        error.to_string()
    };
    assert!(
        refused(&|it| it.dtype = DType::F64).contains("float32, float16 or bfloat16 [64], found float64")
    );
    assert!(refused(&|it| it.shape = &[63]).contains("[63]"));
    assert!(refused(&|it| it.start_byte += 2).contains("a multiple of 4"));
    assert!(refused(&|it| it.start_byte = u64::MAX).contains("in all"));
    assert!(refused(&|it| it.start_byte = it.memory.len_bytes() - 4).contains("256 bytes from byte"));

    let other = Context::open(1).unwrap();
    let reservation = Ledger::new().reserve(Space::Device(Device::Cuda(0)), 256);
    let elsewhere = Memory::new(&other, reservation).unwrap();
    let mut seen = on_gpu.see(&tensors);
    let norm = seen.iter_mut().find(|it| it.name == "final_norm.scale").unwrap();
    (norm.memory, norm.start_byte) = (&elsewhere, 0);
    let reserve = |len_bytes| Ledger::new().reserve(Space::Device(Device::Cuda(0)), len_bytes);
    let model = GpuModel::new(&on_gpu.kernels, &seen, config, Naming::Notebook, 8, reserve);
    assert!(
        model.map(|_| ()).unwrap_err().to_string().contains("every tensor on cuda:0, found one on cuda:1")
    );
}

#[test]
fn a_gpu_that_fails_in_the_middle_gives_an_error_and_the_next_pass_is_right() {
    let test = "gpu::a_gpu_that_fails_in_the_middle_gives_an_error_and_the_next_pass_is_right";
    let Some(fake) = Fake::over(test, Report::assert_clean) else { return };
    let tensors = load("hf.safetensors");
    with_model(&tensors, 4, 16, |model| {
        let before = fake.report();
        model.forward(&ids()).unwrap();
        let calls = fake.report().calls_since(&before);
        let asked = ["cuLaunchKernel", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2", "cuStreamSynchronize"];
        for function in asked {
            for number in first_middle_last(calls[function]) {
                fake.tell(&format!("delay_us 2000\nfail {function} {number} 701"));
                let error = model.forward(&ids()).unwrap_err();
                fake.tell("");
                assert_failed(&error, function, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES");
                assert_close(&model.forward(&ids()).unwrap(), &expected_logits("hf"), "afterwards");
            }
        }
    })
    .unwrap();
}

#[track_caller]
fn assert_failed(error: &Error, function: &str, what: &str) {
    let called = format!("{}: {what}", function.trim_end_matches("_v2"));
    assert!(error.kind() == "Device" && error.to_string().contains(&called), "{function}: {error}");
    assert!(!error.hint().is_empty(), "{error}");
}

#[test]
fn every_call_that_fails_gives_an_error_and_everything_back() {
    // What gives back is not among them: it cannot be had back if that fails.
    let gives_back = ["cuMemFree_v2", "cuModuleUnload", "cuDevicePrimaryCtxRelease_v2"];
    // Pushed and popped once more; and who unloads a module has waited before for what he began.
    let forgiven = ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuCtxSynchronize"];
    let test = "gpu::every_call_that_fails_gives_an_error_and_everything_back";
    let Some(fake) = Fake::over(test, Report::assert_clean) else { return };
    let tensors = load("hf.safetensors");
    let pass = || with_model(&tensors, 4, 16, |it| it.forward(&ids())).flatten();
    // The driver starts once.
    pass().unwrap();
    let before = fake.report();
    pass().unwrap();
    let calls = fake.report().calls_since(&before);
    for (function, &n_calls) in calls.iter().filter(|(it, _)| !gives_back.contains(&it.as_str())) {
        for number in first_middle_last(n_calls) {
            let n_told_before = fake.report().n_told_to_fail(function);
            fake.tell(&format!("delay_us 100\nfail {function} {number} 999"));
            let found = pass();
            fake.tell("");
            let report = fake.report();
            report.assert_clean();
            let n_told = report.n_told_to_fail(function) - n_told_before;
            assert_eq!(n_told, 1, "{function}, call {number}: it was not called");
            match found {
                Err(error) if !forgiven.contains(&function.as_str()) => {
                    assert_failed(&error, function, "CUDA_ERROR_UNKNOWN")
                }
                Err(error) => panic!("{function}, call {number}: {error}"),
                Ok(_) if !forgiven.contains(&function.as_str()) => panic!("{function}: nobody noticed"),
                Ok(logits) => assert_close(&logits, &expected_logits("hf"), function),
            }
        }
    }
    assert_close(&pass().unwrap(), &expected_logits("hf"), "afterwards");
}
