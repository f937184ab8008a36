"""Random checkpoints from a seed: nested containers, every dtype, views of all kinds, ties, 0-dim and empty tensors."""
import collections, random

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


def slices(seed, dtypes=DTYPES):
    """Few bytes of big storages: rows, columns, steps, ties."""
    rng = random.Random(f"slices {seed}")
    root = {}
    for number in range(rng.randrange(1, 4)):
        dtype = getattr(torch, rng.choice(dtypes))
        rows, columns = rng.choice([300, 1000]), rng.choice([64, 67])
        big = of_bytes(dtype, rows * columns, (rows, columns), first=rng.randrange(256))
        at = rng.randrange(rows - 8)
        views = [big[at], big[at:at + 7], big[:, rng.randrange(columns)], big[::rng.randrange(2, 99), 3:5], big.T[:4, at:at + 3],
                 big.reshape(-1)[at:at + 9], big[at:, 1:3], big[at, 5], big[at:at + 7]]
        for index, view_ in enumerate(rng.sample(views, rng.randrange(2, len(views)))): root[f"big{number}.{index}"] = view_
        if rng.random() < 0.3: root[f"big{number}"] = big
    return root


class Marked(torch.Tensor):
    """A subclass, as libraries make them: pickled with its name and its attributes."""


def parameters(seed, dtypes=DTYPES):
    """What modules hold: parameters, some with attributes, buffers, subclasses, an OrderedDict with `_metadata`."""
    rng = random.Random(f"parameters {seed}")
    root = collections.OrderedDict()
    for number in range(rng.randrange(3, 12)):
        t = tensor(rng, rng.choice(dtypes))
        kind = rng.randrange(5)
        if kind == 0: t = torch.nn.Parameter(t, requires_grad=t.dtype in (torch.float32, torch.bfloat16, torch.complex64))
        if kind == 1:
            t = torch.nn.Parameter(t, requires_grad=False)
            t.note, t.sizes = "an attribute", [1, 2.5, None]
        if kind == 2: t = t.as_subclass(Marked)
        if kind == 3:
            t = t.as_subclass(Marked)
            t.note = {"an": ("attribute",)}
        root[f"layer.{number}.weight"] = t
        if rng.random() < 0.3: root[f"head.{number}.weight"] = t
    root._metadata = {"": {"version": 1}, "layer": {"version": 2}}
    return root


def training(seed, dtypes=DTYPES):
    """A checkpoint of a training run: a model, its optimizer after a step or two, a scheduler, and what else there is."""
    rng = random.Random(f"training {seed}")
    torch.manual_seed(seed)
    n = rng.randrange(2, 6)
    model = torch.nn.Sequential(torch.nn.Embedding(7, n), torch.nn.Linear(n, n), torch.nn.LayerNorm(n), torch.nn.Linear(n, 7, bias=False))
    if rng.random() < 0.5: model[3].weight = model[0].weight  # tied
    makers = [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)]
    optimizer = rng.choice(makers)(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(rng.randrange(1, 3)):
        optimizer.zero_grad()
        model(torch.tensor([1, 2, 3])).square().mean().backward()
        optimizer.step()
        scheduler.step()
    extra = {f"buffer{index}": tensor(rng, rng.choice(dtypes)) for index in range(3)}
    return {"epoch": 3, "best": 0.25, "args": {"lr": 1e-4, "names": ["a", "b"]}, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(), "rng_state": torch.get_rng_state(), "extra": extra}


def many(seed, dtypes=DTYPES):
    """2,500 tensors in one dictionary: pickled in several batches of items."""
    rng = random.Random(f"many {seed}")
    return {f"t{number}": of_bytes(getattr(torch, rng.choice(dtypes)), rng.randrange(1, 4), first=number % 251) for number in range(2500)}


# Every kind, and how many are made of it in each way of saving.
KINDS = {"nested": (checkpoint, 36), "slices": (slices, 12), "parameters": (parameters, 12), "training": (training, 6), "many": (many, 1)}
