"""How a file is read depends on what the page cache holds of it, also where the kernel does not tell: a file of somebody else."""
import json, os, shutil, subprocess, sys, time

import pytest
import torch

from unladen_cli import UNLADEN

sys.path.insert(0, str(os.path.join(os.path.dirname(__file__), "..", "..", "bench")))
import budgets

NOBODY = 65534


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A program and a checkpoint that nobody may read, and only root may write."""
    if os.geteuid() != 0: pytest.skip("only root can be somebody else")
    folder = tmp_path_factory.mktemp("theirs")
    torch.save({f"w{i}": torch.full((1 << 20,), float(i)) for i in range(16)}, folder / "model.pth")
    shutil.copy(UNLADEN, folder / "unladen")
    # From the root on, so that somebody else can go there.
    for it in [folder, *folder.parents]:
        if not os.stat(it).st_mode & 0o001:
            if it.owner() != "root" or it == it.parent: pytest.skip(f"{it} is closed to others")
            os.chmod(it, os.stat(it).st_mode | 0o011)
    os.chmod(folder / "model.pth", 0o644)
    return folder


def io_of(folder, user):
    words = [folder / "unladen", "plan", folder / "model.pth", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, user=user, group=user, extra_groups=[])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["files"][0]["io"]


@pytest.mark.parametrize("user", [0, NOBODY], ids=["owner", "somebody else"])
def test_a_cached_file_is_read_through_the_page_cache_and_another_past_it(theirs, user):
    path = theirs / "model.pth"
    budgets.warm(path)
    # Its owner is told; somebody else asks by samples, and on a busy machine their answers may come late.
    found = [io_of(theirs, user) for _ in range(3)]
    assert found.count("buffered") >= (3 if user == 0 else 1), found
    found = [io_when_evicted(path, theirs, user) for _ in range(3)]
    is_right = bool({"direct", "drop-behind"} & set(found))
    if user != 0 and not is_right and not can_tell(path): pytest.skip("here nobody but the owner can tell a file on the disk from a cached one")
    assert is_right, found
    assert budgets.resident_bytes(path) < 4 * 2**20, "asking brought the file in"


def io_when_evicted(path, folder, user):
    budgets.evict(path)
    if budgets.resident_bytes(path) > 2**20: pytest.skip("this file system keeps its pages")
    return io_of(folder, user)


def can_tell(path):
    """True if most pages that are on the disk alone either do not come without waiting, or take longer than a copy."""
    budgets.evict(path)
    n_quick = 0
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for at_byte in range(2**20, 64 * 2**20, 2 * 2**20):
            began = time.perf_counter_ns()
            try: os.preadv(file.fileno(), [bytearray(1)], at_byte, os.RWF_NOWAIT)
            except BlockingIOError: continue
            except OSError: return False  # The file system knows no such reads.
            n_quick += time.perf_counter_ns() - began < 40_000
    return n_quick < 16
