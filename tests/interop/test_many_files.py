"""Checkpoints of many files: what PyTorch and Hugging Face's libraries write, listed, hashed and loaded by every strategy."""
import json, os, pathlib, random, subprocess, sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import dcp_ranks
from random_checkpoints import checkpoint
from tensors import DTYPES, SAFETENSORS_READS, digest, dtype_name, flat, of_bytes, resolved_bytes, sha256
from unladen_cli import STRATEGIES, fails, hashes, ok, ok_json


def assert_is(path, state):
    """`path` holds the tensors of `state`, by the listing and by every strategy, within a small budget too."""
    expected = {name: (dtype_name(t), list(t.shape), sha256(resolved_bytes(t))) for name, t in state.items()}
    assert hashes(path) == expected
    for strategy in [*STRATEGIES, "per-tensor"]:
        row = ok_json("load", path, "--strategy", strategy, "--digest")
        assert (row["tensors"], row["digest"]) == (len(state), digest(state)), f"{strategy}: {row}"
    row = ok_json("load", path, "--strategy", "stream", "--host-budget", "4MiB", "--digest")
    assert row["digest"] == digest(state), f"within 4 MiB: {row}"


def split(rng, state, n_shards):
    """The names of each shard; tensors that share a storage stay together."""
    of_storage = {}
    for name, t in state.items(): of_storage.setdefault(t.untyped_storage().data_ptr() or name, []).append(name)
    shards = [[] for _ in range(n_shards)]
    for names in of_storage.values(): rng.choice(shards).extend(names)
    return [it for it in shards if it]


def write_shards(folder, stem, suffix, state, shards, save):
    """The shards and their weight map."""
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        save({name: state[name] for name in names}, folder / file)
        weight_map.update({name: file for name in names})
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2)
    (folder / f"{stem}.{suffix}.index.json").write_text(text)


@pytest.mark.parametrize("seed", range(4))
def test_random_shards_of_torch_save(tmp_path, seed):
    state = dict(flat(checkpoint(seed, DTYPES)))
    rng = random.Random(seed)
    write_shards(tmp_path, "pytorch_model", "bin", state, split(rng, state, 5), torch.save)
    assert_is(tmp_path, state)
    assert_is(tmp_path / "pytorch_model.bin.index.json", state)


@pytest.mark.parametrize("seed", range(4))
def test_random_shards_of_safetensors(tmp_path, seed):
    state = {name: t.resolve_conj().resolve_neg().contiguous().clone() for name, t in flat(checkpoint(seed, SAFETENSORS_READS))}
    state |= {f"bf16.{it}": of_bytes(torch.bfloat16, 999 * (it + 1), first=it) for it in range(7)}
    rng = random.Random(seed)
    write_shards(tmp_path, "model", "safetensors", state, split(rng, state, 5), save_file)
    assert_is(tmp_path, state)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_is(tmp_path, state)


@pytest.mark.parametrize("stem, suffix", [("model", "safetensors"), ("model.fp16", "safetensors"), ("model", "bin")])
def test_shards_of_transformers(tmp_path, stem, suffix):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=16)).to(torch.bfloat16)
    if suffix == "safetensors":
        model.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16" if "fp16" in stem else None)
        state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    else:  # newer releases write safetensors alone; the older ones wrote this
        state = model.state_dict()
        write_shards(tmp_path, "pytorch_model", "bin", state, split(random.Random(1), state, 3), torch.save)
    assert len(list(tmp_path.glob(f"*-of-*.{suffix}"))) > 1
    assert_is(tmp_path, state)


def test_the_plain_model_comes_before_its_variants(tmp_path):
    state = {"w": torch.arange(6.0)}
    save_file(state, tmp_path / "model.safetensors")
    save_file({"w": state["w"].half()}, tmp_path / "model.fp16.safetensors")
    torch.save({"w": state["w"] + 1}, tmp_path / "pytorch_model.bin")
    assert_is(tmp_path, state)
    assert "model.fp16.safetensors" in ok("inspect", tmp_path).stderr


@pytest.mark.parametrize("per_rank", [True, False])
def test_a_distributed_checkpoint_of_one_process(tmp_path, per_rank):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3).bfloat16())
    optimizer = torch.optim.AdamW([it for it in model.parameters() if it.dtype == torch.float32])
    sum(it.sum() for it in model.parameters()).backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "all": [torch.ones(2), {"deep": torch.zeros(3).t()}]}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "save", single_file_per_rank=per_rank, thread_count=3), no_dist=True)
    # By PyTorch's own way back to one file; what is no tensor stays a pickled object there too.
    dcp_to_torch_save(tmp_path / "save", tmp_path / "one.pt")
    read = dict(flat(torch.load(tmp_path / "one.pt", weights_only=False)))
    assert len(read) > 20
    assert_is(tmp_path / "save", {name: t.detach() for name, t in read.items()})
    listing = ok("inspect", tmp_path / "save").stderr
    assert "`step`" in listing and "dcp" in listing, listing
    tree = json.loads(ok("inspect", "--tree=full", "--json", tmp_path / "save").stdout)
    assert {name for name, it in tree.items() if isinstance(it, dict) and "$tensor" in it} == set(read)
    assert tree["step"] == 3 and tree["optimizer.param_groups.0.lr"] == 0.001, tree


@pytest.mark.parametrize("n_ranks", [4])
def test_a_distributed_checkpoint_of_several_ranks(tmp_path, n_ranks):
    script = pathlib.Path(dcp_ranks.__file__)
    subprocess.run([sys.executable, script, tmp_path / "save", str(n_ranks)], check=True, timeout=300)
    assert len(list((tmp_path / "save").glob("*.distcp"))) == n_ranks
    state = {name: t for name, (t, _) in dcp_ranks.tensors().items()}
    assert_is(tmp_path / "save", state)
    # Converted to one file, PyTorch reads the same.
    ok("convert", tmp_path / "save", tmp_path / "one.pth")
    read = torch.load(tmp_path / "one.pth", weights_only=True)
    assert {name: resolved_bytes(t) for name, t in read.items()} == {name: resolved_bytes(t) for name, t in state.items()}


def test_a_rank_that_is_missing_or_cut_is_named(tmp_path):
    state = {f"t{it}": of_bytes(torch.float32, 1000, first=it) for it in range(20)}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path, thread_count=2), no_dist=True)
    file = tmp_path / "__0_1.distcp"
    data = file.read_bytes()
    for share in (0.0, 0.3, 0.999):
        file.write_bytes(data[:int(len(data) * share)])
        for command in ("inspect", "load"): fails(1, command, tmp_path, mentions=[file.name])
    file.unlink()
    fails(1, "load", tmp_path, mentions=[file.name])


def offload(folder, state):
    """What Accelerate's `offload_state_dict` writes: NumPy's maps, bfloat16 as integers."""
    index = {}
    for name, t in state.items():
        dtype = "bfloat16" if t.dtype == torch.bfloat16 else None
        array = (t.view(torch.int16) if dtype else t).numpy()
        index[name] = {"dtype": dtype or str(array.dtype), "shape": list(array.shape)}
        if array.ndim == 0: array = array[None]
        written = np.memmap(folder / f"{name}.dat", dtype=array.dtype, mode="w+", shape=array.shape)
        written[:] = array[:]
        written.flush()
    (folder / "index.json").write_text(json.dumps(index, indent=2))


def test_offloaded_tensors(tmp_path):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64]
    state = {f"layers.{it}.weight": of_bytes(dtype, 12, (3, 4), first=it) for it, dtype in enumerate(dtypes)}
    state |= {"scalar": torch.tensor(2.5), "transposed": torch.arange(6.0).reshape(2, 3).t(), "one": torch.ones(1)}
    offload(tmp_path, state)
    assert_is(tmp_path, state)
    (tmp_path / "one.dat").write_bytes(b"123")
    fails(1, "load", tmp_path, mentions=["one.dat", "4 bytes"])


def test_a_snapshot_of_the_cache(tmp_path):
    state = {f"w{it}": of_bytes(torch.float32, 100, first=it) for it in range(6)}
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots/0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_shards(blobs, "model", "safetensors", state, [["w0", "w5"], ["w1", "w2", "w3"], ["w4"]], save_file)
    for file in list(blobs.iterdir()):
        blob = blobs / sha256(file.read_bytes())
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    assert_is(snapshot, state)
    # A link of the snapshot that leads elsewhere is not followed.
    shard = snapshot / "model-00003-of-00003.safetensors"
    target = shard.resolve()
    target.rename(tmp_path / "elsewhere")
    shard.unlink()
    shard.symlink_to(tmp_path / "elsewhere")
    fails(1, "load", snapshot, mentions=[shard.name, "a link to"])


def test_a_shard_that_is_missing_or_a_pipe_is_named(tmp_path):
    state = {"a": torch.ones(3), "b": torch.ones(4)}
    write_shards(tmp_path, "model", "safetensors", state, [["a"], ["b"]], save_file)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    for command in ("inspect", "load"): fails(1, command, tmp_path, mentions=[shard.name, "incomplete"])
    os.mkfifo(shard)
    for command in ("inspect", "load"): fails(1, command, tmp_path, mentions=[shard.name, "pipe"])
