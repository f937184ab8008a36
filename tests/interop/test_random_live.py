"""Hundreds of random checkpoints of PyTorch's, in every way that it saves: read here as `torch.load` reads them, byte for
byte, and converted so that PyTorch and safetensors read the same."""
import pytest
import torch
from safetensors.torch import load_file

from random_checkpoints import KINDS
from tensors import DTYPES, SAFETENSORS_READS, dtype_name, flat, resolved_bytes, sha256
from unladen_cli import hashes, ok

LEGACY = {"_use_new_zipfile_serialization": False}
WAYS = {f"protocol {it}": {"pickle_protocol": it} for it in (1, 2, 3, 4, 5)}
WAYS |= {f"legacy, {name}": {**LEGACY, **how} for name, how in WAYS.items()}


# The others have no class of storages of their own, and `torch.load` fails for them in legacy files that it wrote.
LEGACY_READS = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 complex64".split()


def expected(value):
    return {name: (dtype_name(t), list(t.shape), sha256(resolved_bytes(t.as_subclass(torch.Tensor)))) for name, t in flat(value)}


def assert_same(found, reference, what):
    assert sorted(found) == sorted(reference), f"{what}: other names"
    for name, want in reference.items(): assert found[name] == want, f"{what}: `{name}` is {found[name]}, not {want}"


def cases():
    """(kind, way), and how many seeds of it."""
    for kind, (_, n_seeds) in KINDS.items():
        for way in WAYS: yield pytest.param(kind, way, n_seeds, id=f"{kind}, {way}")


@pytest.mark.parametrize("kind, way, n_seeds", cases())
def test_random_checkpoints_are_read_and_converted_byte_for_byte(tmp_path, kind, way, n_seeds):
    make = KINDS[kind][0]
    for seed in range(n_seeds):
        # Every other one has only what safetensors can hold.
        dtypes = SAFETENSORS_READS if seed % 2 else DTYPES
        if way.startswith("legacy"): dtypes = [it for it in dtypes if it in LEGACY_READS]
        number = 1000 * list(WAYS).index(way) + seed
        path = tmp_path / f"{number}.pt"
        torch.save(make(number, dtypes), path, **WAYS[way])
        reference = expected(torch.load(path, weights_only=False))
        assert len(reference) > 1
        assert_same(hashes(path), reference, path.name)

        # In turn, so that each file costs a conversion or two.
        out = tmp_path / f"{number}.out.{'safetensors' if seed % 2 else 'pth'}"
        ok("convert", path, out)
        read = load_file(out) if seed % 2 else torch.load(out, weights_only=True)
        assert_same(expected(read), reference, out.name)
        ok("verify", path, out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_of_a_random_checkpoint_holds_for_its_conversion(tmp_path, kind):
    path, manifest = tmp_path / "in.pt", tmp_path / "in.json"
    torch.save(KINDS[kind][0](77, SAFETENSORS_READS), path)
    ok("verify", path, "--write-manifest", manifest)
    for name in ["out.safetensors", "out.pth"]:
        ok("convert", path, tmp_path / name)
        ok("verify", tmp_path / name, "--manifest", manifest)
        ok("verify", tmp_path / name, "--write-manifest", tmp_path / f"{name}.json")
        assert (tmp_path / f"{name}.json").read_bytes() == manifest.read_bytes()
