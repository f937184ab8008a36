"""`scripts/gpu-check` from end to end over the fake driver: every part runs, and says of itself that it saw no GPU."""
import json, os, subprocess, sys

import pytest

from fake_cuda import ROOT, library
from unladen_cli import UNLADEN

PARTS = ["save", "bus", "compare", "budgets", "peers", "faults", "large"]
PEERS = ["mmap_assign", "safetensors_load_file", "instanttensor"]
SMALL_GPU = ["memory 300000000", "poison off", "delay_us 1000"]


def gpu_check(folder, *words, settings=SMALL_GPU):
    """Runs it: exit code, what it printed, its JSON and its tables."""
    env = dict(os.environ, LD_LIBRARY_PATH=str(library().parent), FAKE_CUDA="; ".join(settings))
    words = [sys.executable, ROOT / "scripts/gpu-check", UNLADEN, "--quick", "--dir", folder / "dir", "--out", folder / "out", *words]
    done = subprocess.run([str(it) for it in words], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1, 3), f"{done.stdout}{done.stderr}"
    return done.returncode, done.stdout, json.loads((folder / "out/gpu-check.json").read_text()), (folder / "out/gpu-check.md").read_text()


def failed(data):
    """Promises that were not kept; a debug build is as large as it is."""
    return [it for it in data["checks"] if it["is_kept"] is False and it["promise"] != "the binary is below 20 MiB"]


def check(data, words):
    found = [it for it in data["checks"] if words in it["promise"]]
    assert len(found) == 1, f"{words}: {found}"
    return found[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-check")
    return folder, *gpu_check(folder, "--peers", ",".join(PEERS))


def test_every_part_runs_and_keeps_its_promises(whole):
    folder, code, printed, data, tables = whole
    assert failed(data) == [], printed
    assert code == int(data["binary_bytes"] >= 20 * 2**20), printed
    for part in PARTS: assert f"\n{part}: " in printed, part
    rows = data["rows"]
    assert list(rows["budgets"]) == ["8 MiB", "64 MiB", "512 MiB"]
    # The promise of the memory that comes back, seven times over.
    assert len(rows["faults"]) == 7 and all(got[0]["is_kept"] for got in rows["faults"].values())
    assert {"bus", "unladen_pth", "unladen_safetensors", "unladen_forward", "mmap_assign", "safetensors_load_file"} <= set(rows["peers"])
    ours, theirs = rows["peers"]["unladen_pth"][0], rows["peers"]["mmap_assign"][0]
    assert ours["digest"] == theirs["digest"] == rows["peers"]["safetensors_load_file"][0]["digest"]
    assert theirs["first_logits_s"] > theirs["load_s"] > 0 and len(theirs["logits"]) == 50257
    assert check(data, "the logits of the GPU are those of the host")["is_kept"] is True, printed
    assert ours["device_peak_bytes"] >= ours["bytes"] and ours["host_peak_bytes"] > 2**20
    assert rows["large"]["bus"][0]["bytes"] >= rows["large"]["unladen"][0]["bytes"] >= 50_000_000
    assert not (folder / "dir/large.safetensors").exists(), "what is large stays only if it is asked for"


def test_what_is_no_gpu_has_no_figures_of_one(whole):
    _, _, printed, data, tables = whole
    assert data["is_gpu"] is False
    assert printed.startswith("NOT A GPU: Fake GPU 0.")
    assert "**Not a GPU: made over the driver of the tests. No figure here is one of a GPU.**" in tables
    for words in ["times as fast as mmap=True", "not slower than safetensors_load_file", "of what the bus brings"]:
        found = check(data, words)
        assert found["is_kept"] is None and found["figures"].endswith("; not a GPU"), found
    # A peer that is not installed, or that needs a GPU, is said and left out.
    assert check(data, "not slower than instanttensor")["is_kept"] is None


def test_the_tables_show_every_row_and_every_promise(whole):
    _, _, printed, data, tables = whole
    for it in data["checks"]:
        assert f" {it['promise']} |" in tables
        assert it["promise"] in printed
    for name in ["unladen_pth", "mmap_assign", "instanttensor", "64 MiB", "per-tensor"]: assert f"\n| {name} |" in tables, name


def test_it_goes_on_where_it_was_stopped(tmp_path):
    # Saving, which comes first, takes longer than that.
    code, printed, data, _ = gpu_check(tmp_path, "--parts", "bus,budgets", "--minutes", "0.000001")
    assert code in (1, 3) and failed(data) == [] and "NOT COMPLETE" in printed, printed
    assert data["rows"].get("budgets", {}) == {}
    code, printed, first, _ = gpu_check(tmp_path, "--parts", "bus")
    assert len(first["rows"]["bus"]["bus"]) == 1 and "budgets" not in first["rows"]
    code, printed, second, _ = gpu_check(tmp_path, "--parts", "bus,budgets", "--rounds", "2")
    assert "NOT COMPLETE" not in printed
    assert second["rows"]["bus"]["bus"][0] == first["rows"]["bus"]["bus"][0] and len(second["rows"]["bus"]["bus"]) == 2
    assert all(len(got) == 2 for got in second["rows"]["budgets"].values())


def test_a_promise_that_is_not_kept_is_a_failure(tmp_path):
    code, printed, data, tables = gpu_check(tmp_path, "--parts", "budgets", settings=[*SMALL_GPU, "pinnable 0"])
    assert code == 1
    assert check(data, "gpt2-tiny: staging is pinned")["is_kept"] is False
    assert "FAIL: gpt2-tiny: staging is pinned" in printed and "| FAIL | gpt2-tiny: staging is pinned |" in tables


def test_a_large_file_that_does_not_fit_is_left_out_loudly(tmp_path):
    code, printed, data, _ = gpu_check(tmp_path, "--parts", "large", "--large-gb", "0.4")
    assert "SKIPPED: THE 0.4 GB PART" in printed and "of GPU memory" in printed
    found = check(data, "of what the bus brings")
    assert found["is_kept"] is None and "NOT MEASURED: it needs 0.4 GB of GPU memory" in found["figures"]
    assert "unladen" not in data["rows"].get("large", {})
