"""Saves a distributed checkpoint from several processes: `python dcp_ranks.py FOLDER N_RANKS`. Prints nothing."""
import sys, tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tensors import of_bytes


def tensors():
    """Every kind of split: name -> (the whole tensor, how it is placed on a grid of ranks; None: every rank has it)."""
    return {
        "rows": (of_bytes(torch.float32, 13 * 6, (13, 6)), [Shard(0), Replicate()]),
        "columns": (of_bytes(torch.bfloat16, 6 * 10, (6, 10), first=7), [Replicate(), Shard(1)]),
        "grid": (of_bytes(torch.int64, 9 * 7, (9, 7), first=31), [Shard(0), Shard(1)]),
        "rows.twice": (of_bytes(torch.float16, 11 * 4, (11, 4), first=5), [Shard(0), Shard(0)]),
        "deep.0.middle": (of_bytes(torch.uint8, 3 * 5 * 4, (3, 5, 4), first=99), [Shard(1), Shard(2)]),
        "few": (of_bytes(torch.float64, 3, (3,), first=77), [Shard(0), Shard(0)]),
        "replicated": (of_bytes(torch.float32, 12, (3, 4), first=11), [Replicate(), Replicate()]),
        "plain": (of_bytes(torch.float32, 12, (3, 4), first=1), None),
        "transposed": (of_bytes(torch.int16, 12, (3, 4), first=8).t(), None),
        "scalar": (of_bytes(torch.float64, 1, (), first=3), None),
        "empty": (torch.empty(0, 5), None),
    }


def save(rank, folder, n_ranks, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=n_ranks)
    mesh = init_device_mesh("cpu", (n_ranks // 2, 2))
    state = {name: t if placed is None else distribute_tensor(t, mesh, placed) for name, (t, placed) in tensors().items()}
    state["step"] = 1000  # no tensor
    dcp.save(state, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, n_ranks = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.start_processes(save, (folder, n_ranks, f"{meeting}/at"), n_ranks, start_method="fork")
