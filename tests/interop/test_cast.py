"""Loads with --dtype give the very bytes that PyTorch's own casts give, whatever the file and however tensors lie in it."""
import fnmatch

import pytest
import torch
from safetensors.torch import save_file

from tensors import digest, of_bytes
from unladen_cli import fails, ok_json, run

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TARGETS = {"f64": torch.float64, "float32": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}
OTHERS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


def random_bits(dtype, n, seed):
    """Numbers from all over a type, infinities and subnormals among them. NaNs are left out: their payload may change."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    t = torch.randint(0, 256, (n * size,), dtype=torch.uint8, generator=rng).view(dtype)
    return torch.where(t.isnan(), torch.zeros_like(t), t)


def hard_numbers(dtype):
    """Values of 16-bit floats, the middles between them, and what lies just beside: where roundings go wrong."""
    bits = torch.arange(0, 0x7c00, 7, dtype=torch.int16)
    values = torch.cat([bits.view(torch.float16).double(), bits.view(torch.bfloat16).double()])
    values = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([0.0, float("inf"), 65519.99, 65520.0, 3.4e38, 1e-45, 1e300])])
    values = torch.cat([values, -values]).to(dtype)
    if dtype.itemsize < 4: return values
    beside = [torch.nextafter(values, torch.full_like(values, end)) for end in (float("inf"), -float("inf"))]
    return torch.cat([values, *beside])


def plain(seed):
    """Tensors as safetensors can hold them."""
    state = {}
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        state[f"{name}.bits.weight"] = random_bits(dtype, 6 * 35, seed).reshape(6, 35)
        state[f"{name}.hard.weight"] = hard_numbers(dtype)
        state[f"{name}.bias"] = random_bits(dtype, 1, seed + 1).reshape(())  # 0-dim
        state[f"{name}.empty"] = torch.empty(3, 0, dtype=dtype)
        state[f"{name}.odd.weight"] = random_bits(dtype, 1031, seed + 2)
    for dtype in OTHERS: state[f"other.{str(dtype).removeprefix('torch.')}"] = of_bytes(dtype, 6, (2, 3), first=seed)
    # Longer than what is read at once, so that it is cast in pieces.
    state["large.weight"] = torch.randn(3_000_001, generator=torch.Generator().manual_seed(seed))
    return state


def viewed(seed):
    """The same, and views of them: transposed, stepped, repeated, tied."""
    state = plain(seed)
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        whole = state[f"{name}.bits.weight"]
        state[f"{name}.transposed.weight"] = whole.t()
        state[f"{name}.stepped.weight"] = whole[1::2, ::3]
        state[f"{name}.inner.weight"] = whole[2:4, 5:8]
        state[f"{name}.repeated.weight"] = whole[0].expand(4, 35)
        state[f"{name}.tied.weight"] = whole
        state[f"{name}.tied.bias"] = whole
    return state


def cast(state, rules):
    """The state dict with PyTorch's casts. `rules` are (pattern or None, dtype or None), the first that fits decides."""
    def one(name, t):
        for pattern, dtype in rules:
            if pattern is None and t.dtype not in FLOATS: continue
            if pattern is None or fnmatch.fnmatchcase(name, pattern): return t if dtype is None else t.to(dtype)
        return t
    return {name: one(name, t).contiguous() for name, t in state.items()}


def assert_loads_as(path, text, expected, *words):
    row = ok_json("load", path, "--dtype", text, "--digest", *words)
    assert (row["tensors"], row["digest"]) == (len(expected), digest(expected)), f"--dtype {text}: {row}"
    assert row["device_peak_bytes"] == row["predicted_device_peak_bytes"], f"--dtype {text}: {row}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [plain, viewed], ids=["plain", "viewed"])
def test_every_float_becomes_what_torch_makes_of_it(tmp_path, make, target):
    state = make(1)
    torch.save(state, tmp_path / "in.pth")
    assert_loads_as(tmp_path / "in.pth", target, cast(state, [(None, TARGETS[target])]))


@pytest.mark.parametrize("target", TARGETS)
def test_safetensors_are_cast_as_well(tmp_path, target):
    state = plain(2)
    save_file(state, tmp_path / "in.safetensors")
    assert_loads_as(tmp_path / "in.safetensors", target, cast(state, [(None, TARGETS[target])]))


RULES = [
    ("*.weight=bf16", [("*.weight", torch.bfloat16)]),
    ("float64.*=f32,*.bias=keep,f16", [("float64.*", torch.float32), ("*.bias", None), (None, torch.float16)]),
    ("float??.tied.weight=float64,*.tied.*=bfloat16", [("float??.tied.weight", torch.float64), ("*.tied.*", torch.bfloat16)]),
    ("other.*=keep,*=f32", [("other.*", None), ("*", torch.float32)]),
    ("keep", []),
]


@pytest.mark.parametrize("text, rules", RULES, ids=[text for text, _ in RULES])
def test_the_first_rule_that_fits_decides_for_tied_tensors_too(tmp_path, text, rules):
    state = viewed(3)
    torch.save(state, tmp_path / "in.pth")
    assert_loads_as(tmp_path / "in.pth", text, cast(state, rules))


def test_a_pattern_that_names_integers_is_an_error(tmp_path):
    torch.save({"w": torch.ones(2), "steps": torch.ones(2, dtype=torch.int64)}, tmp_path / "in.pth")
    fails(1, "load", tmp_path / "in.pth", "--dtype", "*=bf16", mentions=["steps", "int64", "*=bf16", "steps=keep"])


@pytest.mark.parametrize("text", ["", "bf17", "w=", "=bf16", "bf16,", "bf16,w=f32"])
def test_rules_that_make_no_sense_are_an_error(tmp_path, text):
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pth")
    result = run("load", tmp_path / "in.pth", "--dtype", text)
    assert result.code != 0 and result.stdout == "" and "error:" in result.stderr, str(result)
    assert "bf16" in result.stderr, f"does not say what would be right:\n{result}"
