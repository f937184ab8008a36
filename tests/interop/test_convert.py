"""Random checkpoints of PyTorch's: listed and hashed byte for byte, and converted so that the libraries read the same."""
import pytest
import torch
from safetensors.torch import load_file, save

from random_checkpoints import checkpoint
from tensors import DTYPES, SAFETENSORS_READS, SAFETENSORS_WRITES, digest, dtype_name, flat, of_bytes, resolved_bytes, sha256
from unladen_cli import fails, hashes, ok, ok_json

SEEDS = range(24)


def expected(state):
    return {name: (dtype_name(t), list(t.shape), sha256(resolved_bytes(t))) for name, t in state.items()}


def assert_same(found, reference, what):
    assert sorted(found) == sorted(reference), f"{what}: other names"
    for name, want in reference.items(): assert found[name] == want, f"{what}: `{name}` is {found[name]}, not {want}"


def ties(state):
    """Which names are exactly the same tensor, as a set of sets."""
    groups = {}
    for name, t in state.items():
        if t.numel(): groups.setdefault((t.data_ptr(), dtype_name(t), tuple(t.shape), t.stride(), t.is_conj(), t.is_neg()), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def saved(tmp_path, seed, dtypes=DTYPES, **how):
    """A random checkpoint on disk, and its tensors by full name."""
    value = checkpoint(seed, dtypes)
    torch.save(value, tmp_path / "in.pth", **how)
    return tmp_path / "in.pth", dict(flat(value))


@pytest.mark.parametrize("seed", SEEDS)
def test_inspect_hashes_what_torch_saved(tmp_path, seed):
    path, state = saved(tmp_path, seed)
    assert_same(hashes(path), expected(state), f"seed {seed}")


@pytest.mark.parametrize("seed", SEEDS)
def test_load_gives_what_torch_saved(tmp_path, seed):
    path, state = saved(tmp_path, seed)
    row = ok_json("load", path, "--strategy", ["stream", "mmap", "naive"][seed % 3], "--digest")
    assert (row["tensors"], row["digest"]) == (len(state), digest(state)), f"seed {seed}: {row}"
    assert row["device_peak_bytes"] == row["predicted_device_peak_bytes"], f"seed {seed}: {row}"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_reads_the_same(tmp_path, protocol):
    path, state = saved(tmp_path, 1000 + protocol, pickle_protocol=protocol)
    assert_same(hashes(path), expected(state), f"protocol {protocol}")


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_reads_a_converted_pth(tmp_path, seed):
    path, state = saved(tmp_path, seed)
    ok("convert", path, tmp_path / "out.pth")
    loaded = torch.load(tmp_path / "out.pth", weights_only=True, mmap=True)
    assert_same(expected(dict(flat(loaded))), expected(state), f"seed {seed}")
    assert_same(hashes(tmp_path / "out.pth"), expected(state), f"seed {seed}, read here")
    assert ties(dict(flat(loaded))) >= ties(state), f"seed {seed}: tensors that were one are two"


@pytest.mark.parametrize("seed", SEEDS)
def test_safetensors_reads_a_converted_file(tmp_path, seed):
    path, state = saved(tmp_path, seed, SAFETENSORS_READS)
    ok("convert", path, tmp_path / "out.safetensors")
    assert_same(expected(load_file(tmp_path / "out.safetensors")), expected(state), f"seed {seed}")
    assert_same(hashes(tmp_path / "out.safetensors"), expected(state), f"seed {seed}, read here")


def test_a_converted_safetensors_file_is_the_librarys_byte_for_byte(tmp_path):
    state = {f"w.{name}": of_bytes(getattr(torch, name), 6, (2, 3), first=index) for index, name in enumerate(SAFETENSORS_WRITES)}
    torch.save(state, tmp_path / "in.pth")
    ok("convert", tmp_path / "in.pth", tmp_path / "out.safetensors")
    # The metadata that transformers asks for.
    assert (tmp_path / "out.safetensors").read_bytes() == save(state, metadata={"format": "pt"})


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_reads_a_converted_folder(tmp_path, seed):
    path, state = saved(tmp_path, seed)
    ok("convert", path, tmp_path / "out", "--to", "folder")
    files = {it.name.removesuffix(".pt"): it for it in (tmp_path / "out").iterdir()}
    loaded = {name: torch.load(file, weights_only=True) for name, file in files.items()}
    assert_same(expected(loaded), expected(state), f"seed {seed}")
    assert_same(hashes(tmp_path / "out"), expected(state), f"seed {seed}, read here")


@pytest.mark.parametrize("seed", range(6))
def test_a_tour_of_all_formats_changes_nothing(tmp_path, seed):
    path, state = saved(tmp_path, 2000 + seed, SAFETENSORS_READS)
    stations = [path, tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c.pth", tmp_path / "d.safetensors"]
    for source, target in zip(stations, stations[1:]):
        ok("convert", source, target, *([] if target.suffix else ["--to", "folder"]))
        assert_same(hashes(target), expected(state), target.name)
    assert stations[1].read_bytes() == stations[4].read_bytes()


def test_a_converted_pth_is_aligned_for_mapping(tmp_path):
    path, state = saved(tmp_path, 3000)
    ok("convert", path, tmp_path / "out.pth")
    reader = torch._C.PyTorchFileReader(str(tmp_path / "out.pth"))
    offsets = [reader.get_record_offset(it) for it in reader.get_all_records() if it.startswith("data/")]
    assert offsets and all(at % 64 == 0 for at in offsets), offsets


def test_a_dtype_that_safetensors_lacks_is_an_error_and_leaves_nothing(tmp_path):
    torch.save({"good": torch.ones(2), "bad": torch.ones(2, dtype=torch.complex128)}, tmp_path / "in.pth")
    fails(1, "convert", tmp_path / "in.pth", tmp_path / "out.safetensors", mentions=["bad", "complex128"])
    assert sorted(it.name for it in tmp_path.iterdir()) == ["in.pth"]


@pytest.mark.parametrize("dtype", [torch.quint4x2, torch.quint2x4], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_packed_integers_are_listed_as_their_bytes_and_said_to_be(tmp_path, dtype):
    quantised = torch.quantize_per_channel(torch.randn(4, 6), torch.ones(4), torch.zeros(4), 0, dtype)
    path = tmp_path / "packed.pt"
    torch.save({"q": quantised, "w": torch.ones(3)}, path)
    packed = bytes(quantised.untyped_storage())
    found = ok_json("inspect", "--hash", "sha256", path)
    q, scales, zero_points, w = found["tensors"]
    assert (q["name"], q["dtype"], q["shape"], q["sha256"]) == ("q", str(dtype).removeprefix("torch."), [len(packed)], sha256(packed))
    assert (w["name"], w["shape"], scales["name"], zero_points["name"]) == ("w", [3], "q.scales", "q.zero_points")
    composite, = found["composites"]
    assert (composite["name"], composite["shape"], composite["axis"]) == ("q", [4, 6], 0)


def test_views_that_repeat_bytes_are_written_out_and_said_to_be(tmp_path):
    column = torch.arange(3.0)
    state = {"wide": column[:, None].expand(3, 1000), "column": column, "tied": column, "row": torch.ones(1).expand(100), "turned": torch.randn(4, 5).T,
             "gaps": torch.randn(7, 9)[:, :1].expand(7, 20)}
    torch.save(state, tmp_path / "in.pth")
    for target in ["out.pth", "out.safetensors", "folder"]:
        done = ok("convert", tmp_path / "in.pth", tmp_path / target)
        more_bytes = 4 * (3 * 999 + 99 + 7 * 19)
        assert f"warning: 3 expanded views are written out in full: {more_bytes} bytes more than" in done.stderr, str(done)
        assert hashes(tmp_path / target) == hashes(tmp_path / "in.pth")
    assert torch.equal(torch.load(tmp_path / "out.pth")["wide"], state["wide"])
    assert "expanded" not in ok("convert", tmp_path / "out.pth", tmp_path / "again.pth").stderr
