"""What `verify` says of tensors that are made of others, beside what PyTorch says: its own checks of invariants are the reference."""
import json, zipfile

import pytest
import torch

from unladen_cli import fails, ok, ok_json, run

pytestmark = pytest.mark.filterwarnings("ignore")

DENSE = torch.tensor([[0, 1.5, 0, 2], [3, 0, 0, 0], [0, 0, 0, 0], [0, 4, 5, 0]])


def saved(tmp_path, value, name="in.pt"):
    torch.save(value, tmp_path / name)
    return tmp_path / name


def deflated(path, out):
    """The same archive, its records packed."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist(): target.writestr(info.filename, source.read(info))
    return out


def faults(path, *more):
    result = run("verify", path, "--json", *more)
    assert result.code in (0, 1) and result.stdout, result
    return json.loads(result.stdout)["faults"]


def compressed(layout, first, second, values, size, dtype=torch.int64, check=False):
    first, second = torch.tensor(first, dtype=dtype), torch.tensor(second, dtype=dtype)
    return torch.sparse_compressed_tensor(first, second, values, size, layout=layout, check_invariants=check)


def many(n):
    """A matrix whose indices take several reads."""
    generator = torch.Generator().manual_seed(n)
    return (torch.rand(n, 64, generator=generator) < 0.3).float()


def good():
    strided = torch.arange(4).repeat_interleave(2).reshape(4, 2)
    sparse = {
        "coo": DENSE.to_sparse(), "uncoalesced": torch.sparse_coo_tensor([[0, 0, 3], [1, 1, 0]], torch.ones(3), (4, 4)),
        "hybrid": torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (4, 3)), "empty": torch.zeros(3, 0).to_sparse(), "scalar": torch.tensor(2.0).to_sparse(),
        # Indices that stand in the file in another order, and every other of a larger storage.
        "turned": torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 3], [3, 0]]).t(), torch.ones(3), (4, 4)),
        "every_other": torch.sparse_coo_tensor(strided[:, 1][None], torch.ones(4), (4,)),
        "csr": DENSE.to_sparse_csr(), "csc": DENSE.to_sparse_csc(), "bsr": DENSE.to_sparse_bsr((2, 2)), "bsc": DENSE.to_sparse_bsc((2, 1)),
        "int32": compressed(torch.sparse_csr, [0, 2, 3, 3, 5], [1, 3, 0, 1, 2], torch.ones(5), (4, 4), torch.int32),
        "none": torch.zeros(0, 4).to_sparse_csr(), "batched": torch.stack([DENSE, DENSE]).to_sparse_csr(),
        "values_of_rows": compressed(torch.sparse_csr, [0, 1, 2], [0, 1], torch.ones(2, 5), (2, 3, 5)),
        "many": many(5000).to_sparse_csr(), "many_coo": many(5000).to_sparse(),
    }
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    padded = torch.nested.nested_tensor_from_jagged(torch.ones(9, 3), torch.tensor([0, 4, 9]), torch.tensor([2, 5]))
    nested = {
        "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)]), "row_of_none": torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(0, 3)]),
        "scalars": torch.nested.nested_tensor([torch.tensor(1.0), torch.tensor(2.0)]), "no_rows": torch.nested.nested_tensor([]),
        "nested_turned": torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)]).transpose(1, 2), "jagged": jagged, "padded": padded,
        "jagged_turned": jagged.transpose(1, 2),
    }
    return sparse, nested


def is_valid(t):
    """What PyTorch's own check of invariants says."""
    if t.layout == torch.sparse_coo: torch.sparse_coo_tensor(t._indices(), t._values(), t.shape, check_invariants=True)
    else:
        by_rows = t.layout in (torch.sparse_csr, torch.sparse_bsr)
        first, second = (t.crow_indices(), t.col_indices()) if by_rows else (t.ccol_indices(), t.row_indices())
        torch.sparse_compressed_tensor(first, second, t.values(), t.shape, layout=t.layout, check_invariants=True)


@pytest.mark.parametrize("pack", [False, True], ids=["stored", "deflated"])
def test_what_pytorch_makes_and_checks_is_without_a_fault(tmp_path, pack):
    sparse, nested = good()
    for t in sparse.values(): is_valid(t)
    for name, t in (sparse | nested).items():
        path = saved(tmp_path, {name: t})
        if pack: path = deflated(path, tmp_path / "packed.pt")
        assert faults(path) == [], name
        assert faults(path, "--write-manifest", tmp_path / "m.json", "--force") == [], name
        assert faults(path, "--manifest", tmp_path / "m.json") == [], name
        ok("verify", path, path)
    path = saved(tmp_path, sparse | nested)
    row = ok_json("verify", path)
    assert row["is_right"] and row["faults"] == []


def coo(indices, size):
    indices = torch.tensor(indices)
    return torch.sparse_coo_tensor(indices, torch.ones(indices.shape[1]), size, check_invariants=False), lambda: torch.sparse_coo_tensor(indices, torch.ones(indices.shape[1]), size, check_invariants=True)


def packed(layout, first, second, values, size, dtype=torch.int64):
    return compressed(layout, first, second, values, size, dtype), lambda: compressed(layout, first, second, values, size, dtype, check=True)


CSR, CSC, BSR, BSC = torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc
BROKEN = {
    "coo beyond": (lambda: coo([[0, 2], [1, 5]], (3, 5)), "indices", "5, of value 1"),
    "coo below": (lambda: coo([[0, -1], [1, 2]], (3, 5)), "indices", "-1, of value 1"),
    "csr start": (lambda: packed(CSR, [1, 2, 2, 3], [0, 1, 2], torch.ones(3), (3, 3)), "crow_indices", "1 at 0"),
    "csr end": (lambda: packed(CSR, [0, 1, 2, 2], [0, 1, 2], torch.ones(3), (3, 3)), "crow_indices", "2 at 3"),
    "csr wild": (lambda: packed(CSR, [0, 900, -5, 3], [0, 1, 2], torch.ones(3), (3, 3)), "crow_indices", "900 at 1"),
    "csr shrinks": (lambda: packed(CSR, [0, 2, 1, 3], [0, 1, 2], torch.ones(3), (3, 3)), "crow_indices", "1 at 2"),
    "csr leaps": (lambda: packed(CSR, [0, 3, 3, 3], [0, 1, 1], torch.ones(3), (3, 2)), "crow_indices", "3 at 1"),
    "csr column": (lambda: packed(CSR, [0, 1, 2, 3], [0, 1, 3], torch.ones(3), (3, 3), torch.int32), "col_indices", "3 at 2"),
    "csr order": (lambda: packed(CSR, [0, 2, 3, 3], [1, 0, 2], torch.ones(3), (3, 3)), "col_indices", "0 at 1, after 1"),
    "csr twice": (lambda: packed(CSR, [0, 2, 3, 3], [1, 1, 2], torch.ones(3), (3, 3)), "col_indices", "1 at 1, after 1"),
    "csc row": (lambda: packed(CSC, [0, 1, 2], [0, 3], torch.ones(2), (3, 2)), "row_indices", "3 at 1"),
    "bsr column": (lambda: packed(BSR, [0, 1, 2], [0, 2], torch.ones(2, 2, 3), (4, 6)), "col_indices", "2 at 1"),
    "bsc row": (lambda: packed(BSC, [0, 1, 2], [0, 2], torch.ones(2, 2, 3), (4, 6)), "row_indices", "2 at 1"),
    "batch": (lambda: packed(CSR, [[0, 1, 2], [0, 1, 1]], [[0, 1], [0, 1]], torch.ones(2, 2), (2, 2, 2)), "crow_indices", "1 at 2 of batch 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_indices_that_pytorch_refuses_are_found(tmp_path, case):
    make, part, found = BROKEN[case]
    t, checked = make()
    with pytest.raises(RuntimeError): checked()
    path = saved(tmp_path, {"s": t, "w": torch.ones(2)})
    for path in (path, deflated(path, tmp_path / "packed.pt")):
        for more in ((), ("--write-manifest", tmp_path / "m.json")):
            fault, = faults(path, *more)
            assert (fault["kind"], fault["tensors"]) == ("parts", [f"s.{part}"]), fault
            assert fault["found"].startswith(found) and "`s` is sparse_" in fault["expected"], fault
    assert not (tmp_path / "m.json").exists()


class Lie:
    def __init__(self, *parts): self.parts = parts
    def __reduce__(self): return torch._utils._rebuild_nested_tensor, self.parts


def test_nested_rows_outside_of_their_buffer_are_found(tmp_path):
    sizes, strides = torch.tensor([[2, 3], [4, 3]]), torch.tensor([[3, 1], [3, 1]])
    def fault(offsets, sizes=sizes, strides=strides):
        return faults(saved(tmp_path, {"n": Lie(torch.ones(18), sizes, strides, torch.tensor(offsets))}))
    assert fault([0, 6]) == []
    for bad in (fault([0, 7]), fault([0, 10**9]), fault([-1, 6]), fault([0, 6], sizes=sizes * 2), fault([0, 6], strides=-strides)):
        assert [(it["kind"], it["tensors"]) for it in bad] == [("parts", ["n.offsets"])], bad
    jagged = lambda *args: faults(saved(tmp_path, {"n": torch.nested.nested_tensor_from_jagged(torch.ones(6, 3), *map(torch.tensor, args))}))
    assert jagged([0, 2, 6]) == [] and jagged([0, 2, 6], [1, 4]) == []
    for bad in (jagged([0, 2, 9]), jagged([0, 5, 2]), jagged([0, 2, 6], [1, 5])):
        assert [(it["kind"], it["tensors"]) for it in bad] == [("parts", ["n.offsets"])], bad


# ---- two checkpoints, or a manifest ------------------------------------------------------------------------------

def integers(scale, zero_point): return {"t": torch._make_per_tensor_quantized_tensor(torch.ones(4, dtype=torch.int8), scale, zero_point)}
def by_axis(axis): return {"t": torch._make_per_channel_quantized_tensor(torch.ones(4, 4, dtype=torch.int8), torch.ones(4), torch.zeros(4), axis)}
def coordinates(*size): return {"t": torch.sparse_coo_tensor([[0], [1]], [1.0], size)}
def rows(*size): return {"t": torch.sparse_csr_tensor([0, 1, 2, 3], [0, 1, 2], torch.ones(3), size)}
def parts(): return {"t.indices": torch.tensor([[0], [1]]), "t.values": torch.tensor([1.0])}


PAIRS = {
    "scale": (lambda: integers(0.1, 3), lambda: integers(0.2, 3), ["scale 0.1", "scale 0.2"]),
    "zero point": (lambda: integers(0.1, 3), lambda: integers(0.1, 5), ["zero point 3", "zero point 5"]),
    "axis": (lambda: by_axis(0), lambda: by_axis(1), ["axis 0", "axis 1"]),
    "coo size": (lambda: coordinates(2, 2), lambda: coordinates(5, 5), ["sparse_coo [2, 2]", "sparse_coo [5, 5]"]),
    "csr size": (lambda: rows(3, 3), lambda: rows(3, 9), ["sparse_csr [3, 3]", "sparse_csr [3, 9]"]),
    "kind": (lambda: {"t": DENSE.to_sparse_csr()}, lambda: {"t": DENSE.t().contiguous().to_sparse_csc()}, ["sparse_csr", "sparse_csc"]),
    "parts alone": (lambda: coordinates(2, 2), parts, ["sparse_coo [2, 2]", "plain tensors"]),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("turned", [False, True])
def test_tensors_that_mean_something_else_differ(tmp_path, case, turned):
    *sides, words = PAIRS[case]
    if turned: sides, words = sides[::-1], words[::-1]
    one, other = [saved(tmp_path, make(), f"{name}.pt") for name, make in zip("ab", sides)]
    for path in (one, other): ok("verify", path, path)
    told = run("verify", one, other)
    line, = [it for it in told.stdout.splitlines() if it.startswith("`t` differs: ")]
    assert told.code == 1 and line.index(words[0]) < line.rindex(words[1]), told
    ok("verify", one, "--write-manifest", tmp_path / "m.json")
    fault, = [it for it in faults(other, "--manifest", tmp_path / "m.json") if it["kind"] == "composite"]
    assert fault["tensors"] == ["t"] and words[0] in fault["expected"] and words[1] in fault["found"], fault
    assert faults(one, "--manifest", tmp_path / "m.json") == []


def test_a_root_goes_for_both_files(tmp_path):
    model = {"w": torch.ones(3), "b": torch.zeros(2)}
    whole, alone = saved(tmp_path, {"model": model, "epoch": torch.tensor(3)}, "whole.pt"), saved(tmp_path, model, "alone.pt")
    ok("verify", whole, whole, "--root", "model")
    assert "nothing below `model`" in ok("verify", whole, alone, "--root", "model").stderr
    fails(2, "verify", alone, whole, "--root", "model", mentions=["alone.pt"])
