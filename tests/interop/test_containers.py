"""The older and odder containers: legacy files, tar archives, plain pickles and TorchScript, as PyTorch itself writes or reads them."""
import pickle, tarfile

import numpy as np
import pytest
import torch
from torch import nn

from random_checkpoints import checkpoint
from tar_archive import save_tar
from tensors import DTYPES, digest, dtype_name, flat, of_bytes, resolved_bytes, sha256
from unladen_cli import STRATEGIES, fails, hashes, ok, ok_json, run


def expected(state):
    return {name: (dtype_name(t), list(t.shape), sha256(resolved_bytes(t))) for name, t in state.items()}


def save_legacy(value, path, **how):
    torch.save(value, path, _use_new_zipfile_serialization=False, **how)
    return path


def inspect(path):
    return ok_json("inspect", path)


# ---- legacy ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(16))
def test_legacy_files_hold_what_torch_saved(tmp_path, seed):
    value = checkpoint(seed, DTYPES)
    path = save_legacy(value, tmp_path / "in.pt", pickle_protocol=1 + seed % 5)
    state = dict(flat(value))
    assert hashes(path) == expected(state)
    assert inspect(path)["format"] == "legacy"
    row = ok_json("load", path, "--strategy", STRATEGIES[seed % len(STRATEGIES)], "--digest")
    assert (row["tensors"], row["digest"]) == (len(state), digest(state))


def test_every_dtype_ties_and_views_survive_in_legacy_files(tmp_path):
    state = {name: of_bytes(getattr(torch, name), 6, (2, 3), first=i) for i, name in enumerate(DTYPES)}
    wide = torch.arange(600.0)
    state |= {"tied": state["float32"], "t": state["float32"].t(), "slice": wide[100:110], "step": wide[::7], "empty": torch.empty(0, 3)}
    state |= {"scalar": torch.tensor(7.5), "expanded": torch.tensor(2.5).expand(3, 4), "conj": torch.randn(3, dtype=torch.complex64).conj()}
    path = save_legacy(state, tmp_path / "in.pt")
    assert hashes(path) == expected(state)
    for strategy in STRATEGIES:
        row = ok_json("load", path, "--strategy", strategy, "--digest")
        assert row["digest"] == digest(state), strategy


def test_quantised_tensors_stand_in_legacy_files(tmp_path):
    state = {"q": torch.quantize_per_tensor(torch.randn(4, 6), 0.5, 2, torch.qint8), "w": torch.randn(3)}
    path = save_legacy(state, tmp_path / "in.pt")
    assert set(hashes(path)) >= {"q", "w"} and hashes(path)["w"] == expected(state)["w"]


@pytest.mark.parametrize("protocol", [1, 2, 4])
def test_thousands_of_tensors_in_one_dictionary(tmp_path, protocol):
    state = {f"layer.{i}.weight": torch.full((3,), float(i)) for i in range(2500)}
    path = save_legacy(state, tmp_path / "in.pt", pickle_protocol=protocol)
    assert list(hashes(path)) == list(state) and hashes(path) == expected(state)


def test_a_whole_model_is_listed_as_its_state_dict(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    path = save_legacy(model, tmp_path / "in.pt")
    assert hashes(path) == expected(model.state_dict())


def test_protocol_0_cannot_name_storages_and_says_so(tmp_path):
    # PyTorch writes the id as text there, and cannot read it itself.
    path = save_legacy({"w": torch.ones(3)}, tmp_path / "in.pt", pickle_protocol=0)
    with pytest.raises(Exception): torch.load(path, weights_only=False)
    fails(1, "inspect", path, mentions=["persistent id"])


def test_cut_legacy_files_are_refused(tmp_path):
    whole = save_legacy({"a": torch.arange(5.0), "b": torch.arange(3)}, tmp_path / "in.pt").read_bytes()
    for length in (*range(0, len(whole), 97), len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        fails(1, "inspect", tmp_path / "cut.pt")
    (tmp_path / "more.pt").write_bytes(whole + b"more")
    assert any("4 bytes follow" in it for it in inspect(tmp_path / "more.pt")["warnings"])


# ---- tar -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_archives_hold_what_torch_reads(tmp_path, how):
    wide = torch.arange(40.0)
    state = {"w": torch.randn(3, 4), "n": torch.arange(6), "part": wide[8:20].view(3, 4).t(), "whole": wide, "bytes": torch.arange(5, dtype=torch.uint8)}
    state["tied"] = state["w"]
    path = save_tar(state, tmp_path / "in.pt", views=["part"], how=how)
    read = torch.load(path, weights_only=False)
    assert expected(read) == expected(state)
    assert hashes(path) == expected(state) and inspect(path)["format"] == "tar"
    for strategy in STRATEGIES:
        assert ok_json("load", path, "--strategy", strategy, "--digest")["digest"] == digest(state), strategy


def test_other_tar_archives_are_named(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    with tarfile.open(tmp_path / "folder.tar", "w") as tar: tar.add(tmp_path / "w.pt", arcname="model/w.pt")
    fails(1, "inspect", tmp_path / "folder.tar", mentions=["something else", "tar -x"])


# ---- plain pickles ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_plain_pickles_hold_what_python_reads(tmp_path, protocol):
    wide = torch.randn(3000)
    state = {"short": torch.arange(6.0).view(2, 3), "long": torch.randn(70, 80).t(), "slice": wide[10:20], "half": torch.ones(3, dtype=torch.bfloat16)}
    state |= {"u16": of_bytes(torch.uint16, 5), "empty": torch.empty(0, 2), "parameter": nn.Parameter(torch.randn(4))}
    state |= {"array": np.arange(12, dtype=np.int32).reshape(3, 4), "columns": np.asfortranarray(np.random.rand(3, 2)), "big": np.arange(5, dtype=">f4")}
    state |= {"none": np.empty((0, 3), np.float32), "note": "text", "epoch": 3, "scalar": np.float64(0.5)}
    with open(tmp_path / "in.pkl", "wb") as file: pickle.dump({"model": state}, file, protocol=protocol)
    def tensor(it): return torch.from_numpy(it.astype(it.dtype.newbyteorder("="))) if isinstance(it, np.ndarray) else it
    state = {f"model.{key}": tensor(it) for key, it in state.items() if isinstance(it, (torch.Tensor, np.ndarray))}
    assert hashes(tmp_path / "in.pkl") == expected(state)
    assert inspect(tmp_path / "in.pkl")["format"] == "pickle"
    for strategy in STRATEGIES:
        assert ok_json("load", tmp_path / "in.pkl", "--strategy", strategy, "--digest")["digest"] == digest(state), strategy


def test_plain_pickles_larger_than_the_limit_of_a_pickle_take_no_memory_to_open(tmp_path):
    with open(tmp_path / "in.pkl", "wb") as file: pickle.dump({"w": torch.zeros(80 << 20), "v": torch.ones(2)}, file, protocol=4)
    listing = inspect(tmp_path / "in.pkl")
    assert [it["shape"] for it in listing["tensors"]] == [[80 << 20], [2]]


def test_bytes_as_escaped_text_are_named(tmp_path):
    with open(tmp_path / "in.pkl", "wb") as file: pickle.dump({"w": torch.ones(3)}, file, protocol=0)
    fails(1, "inspect", tmp_path / "in.pkl", mentions=["do not stand in the file", "protocol 4"])
    with open(tmp_path / "in.pkl", "wb") as file: pickle.dump({"a": np.ones(3), "n": 1}, file, protocol=0)
    listing = inspect(tmp_path / "in.pkl")
    assert listing["tensors"] == [] and any("`a`" in it for it in listing["warnings"])


def test_bytes_as_text_are_loaded_within_the_budget_and_opened_without_reading_them(tmp_path):
    torch.manual_seed(3)
    state = {"w": torch.randn(3000, 2000), "t": torch.randn(500, 700).t(), "v": torch.full((70_000,), 7, dtype=torch.uint8)}
    with open(tmp_path / "in.pkl", "wb") as file: pickle.dump(state, file, protocol=2)
    assert hashes(tmp_path / "in.pkl") == expected(state)
    for strategy in ("stream", "sequential", "mmap"):
        row = ok_json("load", tmp_path / "in.pkl", "--strategy", strategy, "--digest")
        assert row["digest"] == digest(state), strategy
    ok("load", tmp_path / "in.pkl", "--strategy", "stream", "--host-budget", "4MiB")
    ok("convert", tmp_path / "in.pkl", tmp_path / "out.safetensors")
    assert hashes(tmp_path / "out.safetensors") == expected(state)
    ok("verify", tmp_path / "in.pkl", tmp_path / "out.safetensors")


def test_text_that_is_cut_or_no_latin_1_is_an_error_and_no_tensor(tmp_path):
    with open(tmp_path / "in.pkl", "wb") as file: pickle.dump({"w": torch.full((40_000,), 200, dtype=torch.uint8)}, file, protocol=2)
    data = (tmp_path / "in.pkl").read_bytes()
    middle = data.index(b"\xc3\x88" * 1000) + 40_000
    for change in (b"\xc3\xc3", b"\xc8\x88", b"ab"):
        # `ab` is Latin-1: two bytes in the place of one, so that the text holds more than the tensor.
        (tmp_path / "in.pkl").write_bytes(data[:middle] + change + data[middle + 2:])
        fails(1, "load", tmp_path / "in.pkl", mentions=["text at byte"])
        assert run("verify", tmp_path / "in.pkl").code == 1


# ---- TorchScript -----------------------------------------------------------------------------------------------

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("running", torch.arange(4))
        self.register_buffer("transient", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.linear(x) + self.running


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Inner(), nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.scale = nn.Parameter(torch.randn(2, 3).t())
        self.shared = self.first.linear
        self.names, self.sizes = ["a", "b"], {"a": 1}

    def forward(self, x):
        return self.first(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_gives_the_tensors_of_its_state_dict(tmp_path, how):
    model = Net().eval()
    program = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(2, 3))
    torch.jit.save(program, tmp_path / "in.pt")
    state = torch.jit.load(tmp_path / "in.pt").state_dict()
    found, listing = hashes(tmp_path / "in.pt"), inspect(tmp_path / "in.pt")
    assert listing["format"] == "torchscript"
    assert any("TorchScript program" in it for it in listing["warnings"]), listing["warnings"]
    missing = {name: row for name, row in expected(state).items() if found.get(name) != row}
    assert not missing, f"{sorted(missing)} of {sorted(found)}"
    others = {name for name in found if name not in state}
    assert all(name.startswith("constants.") for name in others), others
    for strategy in STRATEGIES: ok("load", tmp_path / "in.pt", "--strategy", strategy)
