"""How a file is read depends on what the page cache holds of it, also where the kernel does not tell: a file of somebody else."""
import json, os, shutil, subprocess, sys

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
    assert {"direct", "drop-behind"} & set(found), found
    assert budgets.resident_bytes(path) < 4 * 2**20, "asking brought the file in"


def io_when_evicted(path, folder, user):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if budgets.resident_bytes(path) > 2**20: pytest.skip("this file system keeps its pages")
    return io_of(folder, user)
