"""GPT-2 both ways: what PyTorch saved loads here, what was saved here loads there, and the logits are the same."""
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import gpt2_torch
from tensors import digest
from unladen_cli import STRATEGIES, fails, ok, ok_json

MAX_DISTANCE = 1e-4  # max |difference| / max |reference|
MIB = 2**20


def forward(path, tokens, *words):
    """The logits that unladen computes, one row for each token."""
    found = ok_json("gpt2", "forward", path, "--tokens", ",".join(map(str, tokens)), *words)
    return torch.tensor(found["logits"]).reshape(found["shape"])


def assert_close(found, reference):
    assert found.shape == reference.shape, f"logits of shape {tuple(found.shape)}, not {tuple(reference.shape)}"
    distance = ((found - reference).abs().max() / reference.abs().max()).item()
    assert distance <= MAX_DISTANCE, f"logits are {distance:.2e} away from PyTorch's"


def assert_row(row, strategy, state):
    """A line of `load --json` or `compare --json`: everything arrived, and the ledger is what the plan said."""
    assert row["strategy"] == strategy
    assert row["tensors"] == len(state)
    assert row["bytes"] == sum(t.nbytes for t in state.values())
    assert row["load_s"] > 0
    assert row["digest"] == digest(state), f"{strategy} loaded other bytes than PyTorch saved"
    assert row["device_peak_bytes"] == row["predicted_device_peak_bytes"], row
    # RSS is predicted as if every mapped page were touched, so it is a bound; so is the mapping itself, but for the pages
    # of the program that count with it.
    assert row["host_peak_rss_bytes"] <= row["predicted_host_peak_rss_bytes"] + 16 * MIB, row
    assert row["mapped_peak_bytes"] <= row["predicted_mapped_peak_bytes"] + (0 if strategy == "mmap" else 2 * MIB), row
    measured, predicted = row["host_peak_anon_bytes"], row["predicted_host_peak_anon_bytes"]
    if strategy == "mmap": assert measured <= 16 * MIB, row
    else: assert abs(measured - predicted) <= max(0.02 * predicted, 16 * MIB), row


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_loads_what_torch_saved(tiny, strategy):
    assert_row(ok_json("load", tiny.pth, "--strategy", strategy, "--digest"), strategy, tiny.state)


def test_a_folder_of_tensors_loads_one_by_one(tiny):
    assert_row(ok_json("load", tiny.params, "--strategy", "per-tensor", "--digest"), "per-tensor", tiny.state)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_loads_safetensors(tiny, strategy):
    assert_row(ok_json("load", tiny.safetensors, "--strategy", strategy, "--digest"), strategy, tiny.state)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "params"])
def test_logits_of_a_checkpoint_of_torch_are_torchs(tiny, kind):
    assert_close(forward(getattr(tiny, kind), tiny.tokens), tiny.logits)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_do_not_depend_on_the_strategy(tiny, strategy):
    assert_close(forward(tiny.pth, tiny.tokens, "--strategy", strategy), tiny.logits)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torch_computes_the_same_logits_from_a_file_saved_here(tmp_path, suffix):
    path = tmp_path / f"ours{suffix}"
    ok("gpt2", "save", "--size", "tiny", path, "--seed", 7)
    if suffix == ".pth": state = torch.load(path, weights_only=True, mmap=True)
    else: state = load_file(path)
    model = gpt2_torch.GPTModel(gpt2_torch.config("tiny")).eval()
    model.load_state_dict(state)  # strict: the notebook's names, masks included
    with torch.no_grad(): reference = model(torch.tensor([[5, 6, 7, 8]]))[0]
    assert reference.abs().max() > 0.01, "the weights are next to nothing: the comparison would prove nothing"
    assert_close(forward(path, [5, 6, 7, 8]), reference)


def test_a_seed_gives_the_same_weights_again_and_another_gives_others(tmp_path):
    digests = []
    for index, seed in enumerate([7, 7, 8]):
        path = tmp_path / f"{index}.pth"
        ok("gpt2", "save", "--size", "tiny", path, "--seed", seed)
        digests.append(ok_json("load", path, "--digest")["digest"])
    assert digests[0] == digests[1] != digests[2]


def hugging_face(tie=True):
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=211, n_positions=32, n_embd=48, n_layer=3, n_head=4, tie_word_embeddings=tie, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        # Fresh weights are small and biases zero: make every one of them count.
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.2)
        return model, model(torch.tensor([[1, 2, 3, 200]])).logits[0]


@pytest.mark.parametrize("tie", [True, False], ids=["tied head", "own head"])
def test_logits_of_a_saved_transformers_model_are_the_same(tmp_path, tie):
    model, reference = hugging_face(tie)
    model.save_pretrained(tmp_path)
    assert_close(forward(tmp_path / "model.safetensors", [1, 2, 3, 200]), reference)


def test_the_folder_of_a_saved_transformers_model_is_the_model(tmp_path):
    model, reference = hugging_face()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert_close(forward(tmp_path, [1, 2, 3, 200]), reference)
    row = ok_json("load", tmp_path, "--digest")
    weights = load_file(tmp_path / "model.safetensors")
    assert (row["tensors"], row["digest"]) == (len(weights), digest(weights))
    assert row["page_cache_after_bytes"] == (tmp_path / "model.safetensors").stat().st_size, "other files are counted too"


def test_a_model_that_transformers_computes_otherwise_loads_and_does_not_run(tmp_path):
    config = dict(vocab_size=64, n_positions=16, n_embd=48, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, activation_function="relu")).save_pretrained(tmp_path / "relu")
    transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**config)).save_pretrained(tmp_path / "bigcode")
    for kind, word in [("relu", "relu"), ("bigcode", "c_attn")]:
        fails(1, "gpt2", "forward", tmp_path / kind, mentions=[kind, word])
        row = ok_json("load", tmp_path / kind, "--digest", "--strategy", "naive")
        assert row["digest"] == digest(load_file(tmp_path / kind / "model.safetensors"))


def test_logits_of_a_transformers_state_dict_are_the_same(tmp_path):
    model, reference = hugging_face()
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path)
    assert_close(forward(path, [1, 2, 3, 200], "--heads", 4), reference)


def test_logits_without_prefix_and_head_are_the_same(tmp_path):
    model, reference = hugging_face()
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.transformer.state_dict(), path)
    assert_close(forward(path, [1, 2, 3, 200], "--heads", 4), reference)


def test_mask_buffers_of_older_transformers_are_ignored(tmp_path):
    model, reference = hugging_face()
    state = dict(model.state_dict())
    for layer in range(3):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    assert_close(forward(path, [1, 2, 3, 200], "--heads", 4), reference)


def test_generation_repeats_itself_and_continues_the_prompt(tiny):
    words = ("gpt2", "generate", tiny.pth, "--prompt", "Hello, I am", "--tokens", 8)
    first, again = ok(*words).stdout, ok(*words).stdout
    assert first == again
    assert first.startswith("Hello, I am") and len(first.strip()) > len("Hello, I am"), first


def test_compare_runs_every_strategy_and_they_agree(tiny, tmp_path):
    result = ok("compare", tiny.pth, "--dir", tmp_path, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(row["strategy"] for row in rows) == sorted([*STRATEGIES, "per-tensor"]), result
    for row in rows: assert_row(row, row["strategy"], tiny.state)


def test_compare_takes_a_checkpoint_that_is_no_gpt2(tmp_path):
    state = {"a": torch.arange(12.0).reshape(3, 4).t(), "b": torch.ones(5, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "other.pth")
    result = ok("compare", tmp_path / "other.pth", "--dir", tmp_path / "work", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == len(STRATEGIES) + 1, result
    assert {row["digest"] for row in rows} == {digest(state)}, result
    assert "no GPT-2" in result.stderr, result


def test_a_model_with_a_missing_tensor_is_named(tiny, tmp_path):
    state = dict(tiny.state)
    del state["trf_blocks.1.att.W_key.bias"]
    torch.save(state, tmp_path / "missing.pth")
    fails(1, "gpt2", "forward", tmp_path / "missing.pth", mentions=["missing.pth", "trf_blocks.1.att.W_key.bias"])


def test_a_model_with_a_tensor_of_another_shape_names_both(tiny, tmp_path):
    state = {**tiny.state, "trf_blocks.0.norm1.scale": torch.ones(63)}
    torch.save(state, tmp_path / "shape.pth")
    fails(1, "gpt2", "forward", tmp_path / "shape.pth", mentions=["shape.pth", "trf_blocks.0.norm1.scale", "63", "64"])


def test_a_token_that_the_model_does_not_know_is_an_error(tiny):
    fails(1, "gpt2", "forward", tiny.pth, "--tokens", "1,50257", mentions=["50257"])
