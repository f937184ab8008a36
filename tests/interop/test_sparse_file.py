"""A checkpoint far larger than memory, whose data was never written: opening reads headers alone."""
import resource, subprocess

import pytest
import torch

from unladen_cli import UNLADEN, ok_json

GIB, MIB = 2**30, 2**20
LIMIT_BYTES = 20 * MIB


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """5 GiB of tensors by PyTorch's `skip_data`: a file with holes where the data would be."""
    path = tmp_path_factory.mktemp("sparse") / "large.pt"
    with torch.device("meta"): shapes = {f"layers.{i}.weight": torch.empty(64 * MIB, dtype=torch.float32) for i in range(20)}
    state = {name: torch.empty_like(it, device="cpu") for name, it in shapes.items()}
    with torch.serialization.skip_data(): torch.save(state, path)
    if path.stat().st_blocks * 512 > GIB: pytest.skip("this file system writes holes out")
    yield path
    path.unlink()


def test_a_sparse_file_of_five_gib_lists_in_little_memory(sparse):
    assert sparse.stat().st_size > 5 * GIB
    listing = ok_json("inspect", sparse)
    assert [(it["name"], it["dtype"], it["shape"]) for it in listing["tensors"]] == [(f"layers.{i}.weight", "float32", [64 * MIB]) for i in range(20)]
    print(f"opened in {listing['open_s'] * 1e3:.1f} ms")
    # The program itself, its pages included.
    cap = lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    done = subprocess.run([UNLADEN, "inspect", sparse, "--json"], capture_output=True, text=True, preexec_fn=cap, timeout=60)
    assert done.returncode == 0, done.stderr
