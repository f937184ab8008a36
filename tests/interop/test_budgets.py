"""Budgets by the kernel's word: the proofs of `bench/budgets.py` in control groups, on a small GPT-2."""
import os, pathlib, sys

import pytest

from unladen_cli import ROOT, UNLADEN

os.environ["UNLADEN"] = UNLADEN
sys.path.insert(0, str(ROOT / "bench"))
import budgets


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """gpt2-small on a disk: a file in memory is in the page cache whatever anybody does."""
    folder = tmp_path_factory.mktemp("budgets")
    on_disk = not any(kind in ("tmpfs", "ramfs") for kind in filesystems_of(folder))
    if not on_disk: pytest.skip(f"{folder} is in memory: set TMPDIR to a folder on a disk")
    path = budgets.gpt2(folder, "small")
    yield path
    path.unlink()


def filesystems_of(folder):
    """The kind of the file system that holds a folder."""
    mounts = [line.split()[1:3] for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    over = [(mount, kind) for mount, kind in mounts if folder.resolve().is_relative_to(mount)]
    return [max(over, key=lambda it: len(it[0]))[1]] if over else []


@pytest.mark.parametrize("check", budgets.CGROUP_CHECKS, ids=lambda it: it.__name__.removeprefix("check_"))
def test_a_control_group_proves(check, small):
    try:
        checks = list(check(small))
    except budgets.NoGroups as reason:
        pytest.skip(f"NOT PROVED, no control group can be made here (root can): {reason}")
    assert checks
    assert all(it.is_kept for it in checks), "\n".join(map(str, checks))


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("budget_mib", [4, 64])
def test_a_load_takes_what_was_predicted_and_no_more_than_its_budget(small, dtype, budget_mib):
    budgets.warm(small)
    row = budgets.unladen_json("load", small, "--strategy", "stream", "--host-budget", f"{budget_mib}MiB", "--dtype", dtype)
    measured, predicted = row["host_peak_anon_bytes"] - row["weights_bytes"], row["predicted_host_peak_anon_bytes"] - row["weights_bytes"]
    assert predicted <= budget_mib * budgets.MIB, row
    assert measured <= predicted, row
    assert predicted - measured <= max(2, 0.05 * budget_mib) * budgets.MIB, row
