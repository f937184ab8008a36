"""Random checkpoints from a seed: nested containers, every dtype, views of all kinds, ties, 0-dim and empty tensors."""
import random

import torch

from tensors import DTYPES, of_bytes


def tensor(rng, dtype):
    """A tensor of up to four dimensions, seen through a random view."""
    shape = [rng.choice([0, 1, 1, 2, 3, 4, 5, 7]) if rng.random() < 0.9 else 33 for _ in range(rng.randrange(5))]
    n = 1
    for size in shape: n *= size
    t = of_bytes(getattr(torch, dtype), n, shape, first=rng.randrange(256))
    for _ in range(rng.randrange(3)): t = view(rng, t)
    return t


def view(rng, t):
    """The same storage seen another way. Only what needs no arithmetic, so that every dtype can do it."""
    kinds = ["permute", "narrow", "step", "expand", "select", "overlap"]
    kind = rng.choice(kinds) if t.dim() else "expand"
    dim = rng.randrange(t.dim()) if t.dim() else 0
    if kind == "permute": return t.permute(rng.sample(range(t.dim()), t.dim()))
    if kind == "narrow":
        start = rng.randint(0, t.shape[dim])
        return t.narrow(dim, start, rng.randint(0, t.shape[dim] - start))
    if kind == "step": return t[(slice(None),) * dim + (slice(rng.randrange(2), None, rng.choice([2, 3])),)]
    if kind == "select" and t.shape[dim]: return t.select(dim, rng.randrange(t.shape[dim]))
    if kind == "overlap" and t.numel() >= 6 and t.is_contiguous(): return t.as_strided((t.numel() - 3, 2), (1, 1), t.storage_offset())
    return t.unsqueeze(0).expand(rng.choice([1, 3]), *t.shape)


def lazy(rng, t):
    """Now and then a conjugate or negative view, which is only noted in the file."""
    if t.dtype in (torch.complex64, torch.complex128) and rng.random() < 0.5:
        return t.conj() if rng.random() < 0.5 else t.conj().imag
    return t


def checkpoint(seed, dtypes=DTYPES):
    """A nested checkpoint with 5 to 30 tensors. The same seed gives the same one."""
    rng = random.Random(seed)
    made, names = [], iter(range(10**6))

    def leaf():
        if made and rng.random() < 0.2: return rng.choice(made)  # tied
        if made and rng.random() < 0.15: return view(rng, rng.choice(made))  # another view of the same storage
        made.append(lazy(rng, tensor(rng, rng.choice(dtypes))))
        return made[-1]

    def node(depth):
        kind = rng.random()
        if depth == 0 or kind < 0.5: return leaf()
        if kind < 0.6: return rng.choice([1, 2.5, "text", None, True, (), {}])
        if kind < 0.75: return [node(depth - 1) for _ in range(rng.randrange(1, 4))]
        if kind < 0.85: return {key: node(depth - 1) for key in range(rng.randrange(1, 4))}
        return {f"k{next(names)}": node(depth - 1) for _ in range(rng.randrange(1, 5))}

    root = {f"k{next(names)}": node(3) for _ in range(rng.randrange(3, 9))}
    while len(made) < 5: root[f"k{next(names)}"] = leaf()
    return root
