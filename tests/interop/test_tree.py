"""What stands beside plain tensors: sparse, nested, quantised ones and subclasses, the state dict's place, the rest of the tree, strictness."""
import argparse, collections, datetime, json, math, os, pickle, zipfile

import numpy as np
import pytest
import torch
from torch._weights_only_unpickler import _get_allowed_globals

from tensors import digest, dtype_name, resolved_bytes, sha256
from unladen_cli import fails, hashes, ok, ok_json

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(tmp_path, value, name="in.pt", **how):
    torch.save(value, tmp_path / name, **how)
    return tmp_path / name


def row(t):
    return dtype_name(t), list(t.shape), sha256(resolved_bytes(t))


DENSE = torch.tensor([[0, 1.5, 0, 2], [3, 0, 0, 0], [0, 0, 0, 0], [0, 4, 5, 0]])
COMPRESSED = {"sparse_csr": "crow col", "sparse_csc": "ccol row", "sparse_bsr": "crow col", "sparse_bsc": "ccol row"}


def sparse(layout):
    if layout == "sparse_coo": return DENSE.to_sparse()
    return getattr(DENSE, f"to_{layout}")(*([(2, 2)] if "bs" in layout else []))


@pytest.mark.parametrize("layout", ["sparse_coo", *COMPRESSED])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: torch.nn.Parameter(t, requires_grad=False)], ids=["plain", "parameter"])
def test_sparse_tensors_are_listed_by_their_parts(tmp_path, layout, wrap):
    t = sparse(layout)
    path = saved(tmp_path, {"a": {"s": wrap(t)}, "w": torch.ones(2)})
    if layout == "sparse_coo":
        parts = {"indices": t._indices(), "values": t._values()}
    else:
        first, second = COMPRESSED[layout].split()
        parts = {f"{first}_indices": getattr(t, f"{first}_indices")(), f"{second}_indices": getattr(t, f"{second}_indices")(), "values": t.values()}
    expected = {f"a.s.{name}": row(part) for name, part in parts.items()} | {"w": row(torch.ones(2))}
    assert hashes(path) == expected
    composite, = ok_json("inspect", path)["composites"]
    assert (composite["name"], composite["kind"], composite["what"], composite["shape"]) == ("a.s", "sparse", layout, [4, 4])
    assert composite["parts"] == [f"a.s.{name}" for name in parts]


def test_hybrid_and_batched_sparse_tensors_fit_their_sizes(tmp_path):
    hybrid = torch.sparse_coo_tensor([[0, 2]], torch.arange(6.0).reshape(2, 3), (4, 3))
    batched = torch.stack([DENSE, DENSE]).to_sparse_csr()
    dense = torch.sparse_csr_tensor([0, 1, 2], [0, 1], torch.ones(2, 5), (2, 3, 5))
    path = saved(tmp_path, {"hybrid": hybrid, "batched": batched, "dense": dense, "empty": torch.zeros(3, 0).to_sparse(), "scalar": torch.tensor(2.0).to_sparse()})
    shapes = {it["name"]: it["shape"] for it in ok_json("inspect", path)["composites"]}
    assert shapes == {"hybrid": [4, 3], "batched": [2, 4, 4], "dense": [2, 3, 5], "empty": [3, 0], "scalar": []}


def test_sparse_parts_that_contradict_the_sizes_are_an_error(tmp_path):
    class Lie:
        def __init__(self, *data): self.data = data
        def __reduce__(self): return torch._utils._rebuild_sparse_tensor, self.data
    coo, csr = torch.sparse_coo, torch.sparse_csr
    i2, v3, size = torch.zeros(2, 3, dtype=torch.long), torch.ones(3), torch.Size([4, 4])
    for lie in [(coo, (i2, torch.ones(4), size)), (coo, (torch.zeros(5, 3, dtype=torch.long), v3, size)), (coo, (i2.float(), v3, size)),
                (coo, (i2, v3)), (coo, (i2, v3, size, True, 1)), (csr, (torch.zeros(4, dtype=torch.long), torch.zeros(3, dtype=torch.long), v3, size)),
                (coo, (i2, DENSE.to_sparse(), size)), (torch.strided, (i2, v3, size))]:
        fails(1, "inspect", saved(tmp_path, {"lie": Lie(*lie)}), mentions=["lie"])


def test_strided_nested_tensors_are_listed_by_their_parts(tmp_path):
    t = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)])
    found = hashes(saved(tmp_path, {"n": t}))
    assert found == {"n.buffer": row(t.values()), "n.sizes": row(t._nested_tensor_size()), "n.strides": row(t._nested_tensor_strides()),
                     "n.offsets": row(t._nested_tensor_storage_offsets())}
    composite, = ok_json("inspect", tmp_path / "in.pt")["composites"]
    assert (composite["kind"], composite["shape"]) == ("nested", [2])


def test_jagged_nested_tensors_are_listed_by_their_parts(tmp_path):
    t = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    listing = ok_json("inspect", "--hash", "sha256", saved(tmp_path, {"n": t}))
    found = {it["name"]: (it["dtype"], it["shape"], it["sha256"]) for it in listing["tensors"]}
    assert found["n.values"] == row(t.values()) and found["n.offsets"] == row(t.offsets())
    assert all(name.startswith(("n.values", "n.offsets", "n.lengths", "n.metadata.")) for name in found), found
    assert listing["composites"][0]["kind"] == "nested" and listing["composites"][0]["shape"] == [2]


def test_quantised_tensors_are_their_integers_and_scales(tmp_path):
    w = torch.randn(4, 6)
    each = torch.quantize_per_tensor(w, 0.125, 7, torch.quint8)
    channel = torch.quantize_per_channel(w, torch.tensor([0.5, 0.25, 1, 2]), torch.tensor([0, 1, 2, 3]), 0, torch.qint8)
    floats = torch.quantize_per_channel(w, torch.rand(6) + 0.1, torch.rand(6), 1, torch.quint8)
    path = saved(tmp_path, {"each": each, "channel": channel, "floats": floats})
    found = hashes(path)
    for name, t in {"each": each, "channel": channel, "floats": floats}.items():
        assert found[name] == (dtype_name(t), [4, 6], sha256(resolved_bytes(t.int_repr())))
    for name, t in {"channel": channel, "floats": floats}.items():
        assert found[f"{name}.scales"] == row(t.q_per_channel_scales())
        assert found[f"{name}.zero_points"] == row(t.q_per_channel_zero_points())
    composites = {it["name"]: it for it in ok_json("inspect", path)["composites"]}
    assert (composites["each"]["scale"], composites["each"]["zero_point"]) == (0.125, 7)
    assert (composites["channel"]["axis"], composites["floats"]["axis"]) == (0, 1)
    assert composites["channel"]["parts"] == ["channel", "channel.scales", "channel.zero_points"]


def test_quantisers_that_contradict_the_sizes_are_an_error(tmp_path):
    storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(24, dtype=torch.uint8).untyped_storage(), dtype=torch.quint8, _internal=True)
    class Lie:
        def __init__(self, *quantiser): self.quantiser = quantiser
        def __reduce__(self): return torch._utils._rebuild_qtensor, (storage, 0, (4, 6), (6, 1), self.quantiser, False, collections.OrderedDict())
    numbers, six = torch.ones(4), torch.ones(6)
    ok("inspect", saved(tmp_path, Lie(torch.per_channel_affine, numbers, numbers, 0)))
    ok("inspect", saved(tmp_path, Lie(torch.per_channel_affine, [1.0] * 4, [0] * 4, 0)))
    for quantiser in [(torch.per_channel_affine, six, numbers, 0), (torch.per_channel_affine, numbers, numbers, 2), (torch.per_channel_affine, numbers, numbers, -1),
                      (torch.per_channel_affine, [1.0] * 3, [0] * 4, 0), (torch.per_tensor_affine, "x", 1), (torch.per_tensor_affine, 1.0, 0.5),
                      (torch.per_tensor_affine, 1.0), (torch.per_channel_symmetric, 1.0, 0), (1, 2.0, 3), ()]:
        fails(1, "inspect", saved(tmp_path, {"lie": Lie(*quantiser)}), mentions=["lie"])


class Scaled(torch.Tensor):
    """A tensor whose data are in two others, as torchao's are."""
    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, (*data.shape, 2), dtype=torch.float32)
    def __init__(self, data, scale): self.tensor_data, self.scale = data, scale
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default: return Scaled(args[0].tensor_data, args[0].scale)
        raise NotImplementedError(str(func))


def test_subclasses_around_other_tensors_are_listed_by_what_they_hold(tmp_path):
    data, scale = torch.arange(6, dtype=torch.int8), torch.ones(6)
    path = saved(tmp_path, {"w": torch.nn.Parameter(Scaled(data, scale), requires_grad=False), "b": torch.ones(1)})
    found = hashes(path)
    assert found["w.tensor_data"] == row(data) and found["w.scale"] == row(scale) and len(found) == 3, found
    composite, = ok_json("inspect", path)["composites"]
    assert (composite["kind"], composite["shape"], composite["parts"]) == ("subclass", [6, 2], ["w.tensor_data", "w.scale"])
    assert composite["what"].endswith("Scaled")


def test_converting_parts_says_so_and_quantised_tensors_are_refused(tmp_path):
    path = saved(tmp_path, {"s": DENSE.to_sparse(), "w": torch.ones(2)})
    for target in ["out.pth", "out.safetensors", "folder"]:
        done = ok("convert", path, tmp_path / target)
        assert "`s` (sparse_coo [4, 4]) is written as its parts" in done.stderr, str(done)
        assert hashes(tmp_path / target) == hashes(path)
    assert torch.load(tmp_path / "out.pth")["s.values"].tolist() == [1.5, 2, 3, 4, 5]
    path = saved(tmp_path, {"q": torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8)})
    fails(1, "convert", path, tmp_path / "q.pth", mentions=["`q`", "qint8"])
    assert not (tmp_path / "q.pth").exists()


def model():
    torch.manual_seed(1)
    inner = torch.nn.Linear(3, 3)
    net = torch.nn.Sequential(inner, torch.nn.BatchNorm1d(3), inner, torch.nn.Linear(3, 3, bias=False))
    net[3].weight = inner.weight
    net.register_buffer("kept", torch.ones(2))
    net.register_buffer("dropped", torch.zeros(2), persistent=False)
    net.register_parameter("nothing", None)
    return net


def test_whole_modules_are_listed_as_their_state_dict(tmp_path):
    net = model()
    listing = ok_json("inspect", "--hash", "sha256", saved(tmp_path, net))
    expected = {name: row(t) for name, t in net.state_dict().items()}
    assert {it["name"]: (it["dtype"], it["shape"], it["sha256"]) for it in listing["tensors"]} == expected
    assert any("`dropped`" in it for it in listing["warnings"]), listing["warnings"]


def test_parameters_with_attributes_stay_tied(tmp_path):
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.note = "kept"
    assert sorted(hashes(saved(tmp_path, {"a": p, "b": p, "c": [p]}))) == ["a", "b", "c.0"]


def test_deep_parameters_and_every_protocol(tmp_path):
    class Wrapped:
        def __init__(self, inner): self.inner = inner
    class Pickler(pickle.Pickler):
        def reducer_override(self, it):
            return (torch._utils._rebuild_parameter, (it.inner, False, collections.OrderedDict())) if isinstance(it, Wrapped) else NotImplemented
    # Too deep for Python's own recursion: the pickle is put together by hand.
    path = saved(tmp_path, {"w": torch.ones(3)})
    with zipfile.ZipFile(path) as zipped: records = {it: zipped.read(it) for it in zipped.namelist()}
    data = records["in/data.pkl"]
    start = data.index(b"ctorch._utils\n_rebuild_tensor_v2")
    end = data.rindex(b"s.")
    deep = data[:start] + b"ctorch._utils\n_rebuild_parameter\n(" * 2000 + data[start:end] + b"\x89NtR" * 2000 + data[end:]
    with zipfile.ZipFile(tmp_path / "deep.pt", "w") as zipped:
        for name, it in records.items(): zipped.writestr(name, deep if name == "in/data.pkl" else it)
    assert hashes(tmp_path / "deep.pt") == {"w": row(torch.ones(3))}


def lightning():
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return net, {"epoch": 3, "global_step": 2**70, "state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()],
                 "hyper_parameters": {"lr": 1e-3, "betas": (0.9, 0.999), "name": "x'\n\x1b[31m", "nan": math.nan, "inf": -math.inf},
                 "callbacks": {}, "args": argparse.Namespace(seed=1), "when": datetime.datetime(2020, 1, 2), "tags": {"a"},
                 "counts": collections.defaultdict(int, a=1), "raw": b"\x00\x01", "none": None, 5: "five", "5": "text"}


def test_the_root_opens_the_state_dict_alone(tmp_path):
    net, checkpoint = lightning()
    path = saved(tmp_path, checkpoint)
    result = ok("inspect", path)
    assert "the state dict is `state_dict` (--root state_dict opens it alone)" in result.stderr, str(result)
    expected = {name: row(t) for name, t in net.state_dict().items()}
    for root in ["auto", "state_dict", "state_dict."]:
        listing = ok_json("inspect", path, "--hash", "sha256", "--root", root)
        assert {it["name"]: (it["dtype"], it["shape"], it["sha256"]) for it in listing["tensors"]} == expected
        left, = [it for it in listing["warnings"] if "left out" in it]
        assert "6 tensors" in left and "`state_dict`" in left
    load = ok_json("load", path, "--root", "auto", "--digest")
    assert (load["tensors"], load["digest"]) == (2, digest(net.state_dict()))
    assert ok_json("plan", path, "--root", "state_dict")["tensors"] == 2
    ok("convert", path, tmp_path / "out.safetensors", "--root", "auto")
    assert hashes(tmp_path / "out.safetensors") == expected
    below = ok_json("inspect", path, "--root", "optimizer_states.0.state.1")
    assert sorted(it["name"] for it in below["tensors"]) == ["exp_avg", "exp_avg_sq", "step"]
    fails(1, "inspect", path, "--root", "state_dict.nothing", mentions=["`weight`, `bias` below `state_dict`"])
    fails(1, "load", path, "--root", "model", mentions=["`state_dict`", "`optimizer_states`", "at the top"])


def test_several_candidates_are_said_to_be_ambiguous(tmp_path):
    w = {"a.w": torch.ones(2)}
    path = saved(tmp_path, {"ema": w, "model": {"a.w": torch.zeros(3)}, "loss": torch.tensor(1.0)})
    assert ok_json("inspect", path)["roots"] == ["model", "ema"]
    assert "`model` (--root model opens it alone); also: ema" in ok("inspect", path).stderr
    assert [it["shape"] for it in ok_json("inspect", path, "--root", "auto")["tensors"]] == [[3]]
    # A path is the start of names, so that a key with a dot needs no quotes.
    assert [it["name"] for it in ok_json("inspect", path, "--root", "model.a")["tensors"]] == ["w"]
    assert ok_json("inspect", saved(tmp_path, {"mine": w, "epoch": 1}))["roots"] == ["mine"]
    assert ok_json("inspect", saved(tmp_path, {"one": w, "two": w}))["roots"] == []
    assert ok_json("inspect", saved(tmp_path, w))["roots"] == []
    assert ok_json("inspect", saved(tmp_path, {"model": model(), "epoch": 1}))["roots"] == ["model"]


def test_gpt2_and_compare_find_their_state_dict(tmp_path, tiny):
    path = saved(tmp_path, {"model": tiny.state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 1}, "training.pth")
    tokens = ",".join(map(str, tiny.tokens))
    alone, beside = (ok_json("gpt2", "forward", it, "--tokens", tokens) for it in (tiny.pth, path))
    assert alone["logits"] == beside["logits"]
    words = ("compare", "--json", "--root", "auto", "--strategies", "stream,mmap,per-tensor", "--dir", tmp_path / "bench")
    rows = [json.loads(line) for line in ok(*words, path).stdout.splitlines()]
    assert {it["digest"] for it in rows} == {digest(tiny.state)} and len(rows) == 3


def tree(path, how="--tree"):
    return json.loads(ok("inspect", how, "--json", path).stdout)


def test_the_tree_is_everything_that_is_no_tensor(tmp_path):
    _, checkpoint = lightning()
    path = saved(tmp_path, checkpoint)
    found = dict(tree(path)["$dict"])
    assert dict(tree(path, "--tree=full")["$dict"]) == found
    assert (found["epoch"], found["global_step"], found["none"], found[5], found["5"]) == (3, 2**70, None, "five", "text")
    hyper = found["hyper_parameters"]
    assert (hyper["lr"], hyper["betas"], hyper["name"]) == (1e-3, {"$tuple": [0.9, 0.999]}, "x'\n\x1b[31m")
    assert (hyper["nan"], hyper["inf"]) == ({"$float": "nan"}, {"$float": "-inf"})
    assert found["args"] == {"$object": "argparse.Namespace", "args": [], "state": {"seed": 1}}
    assert found["when"]["$object"] == "datetime.datetime"
    assert found["raw"] == {"$bytes": 2, "first": "0001"}
    assert (found["tags"], found["counts"]) == (["a"], {"a": 1})
    state = found["state_dict"]["$value"]
    assert state["weight"] == {"$tensor": "float32", "shape": [2, 3], "names": ["state_dict.weight"]}
    assert found["state_dict"]["$attributes"]["_metadata"][""] == {"version": 1}
    assert found["optimizer_states"][0]["param_groups"][0]["params"] == [0, 1]
    text = ok("inspect", "--tree", path).stdout
    assert "'epoch': 3\n" in text and "`state_dict.weight`" in text and "argparse.Namespace() {'seed': 1}" in text
    assert all(it.isprintable() or it == "\n" for it in text)


def test_floats_and_integers_come_back_the_same(tmp_path):
    floats = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e16, 123456789.125]
    integers = [0, -1, 2**31, -(2**63), 2**63, 2**64 + 1, -(2**200), 10**300]
    assert tree(saved(tmp_path, {"floats": floats, "integers": integers}), "--tree=full") == {"floats": floats, "integers": integers}


def test_shared_things_and_cycles_are_marked_and_long_ones_cut(tmp_path):
    shared, cycle = [1], {}
    cycle["self"] = cycle
    value = {"a": shared, "b": shared, "cycle": cycle, "long": list(range(1000)), "surrogate": "\ud800", "text": "x" * 999}
    found = tree(saved(tmp_path, value))
    assert (found["a"], found["b"]) == ({"$shared": 1, "$value": [1]}, {"$ref": 1})
    assert found["cycle"] == {"$shared": 2, "$value": {"self": {"$ref": 2}}}
    assert (len(found["long"]), found["long"][-1]) == (21, {"$cut": 980})
    assert (found["surrogate"], found["text"]) == ("\ud800", {"$text": "x" * 200, "len_bytes": 999})
    full = tree(tmp_path / "in.pt", "--tree=full")
    assert (full["long"], full["text"]) == (value["long"], value["text"])


def test_the_tree_of_safetensors_is_its_metadata(tmp_path):
    from safetensors.torch import save_file
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "pt", "x": "'y'"})
    assert tree(tmp_path / "a.safetensors") == {"__metadata__": {"format": "pt", "x": "'y'"}}
    assert "'format': 'pt'" in ok("inspect", "--tree", tmp_path / "a.safetensors").stdout


def with_pickle(path, body):
    """An archive around a pickle of protocol 2."""
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("x/data.pkl", b"\x80\x02" + body + b".")
        zipped.writestr("x/version", "3\n")
    return path


def test_strict_allows_what_weights_only_allows_and_nothing_else(tmp_path):
    names = [it.rpartition(".")[::2] for it in _get_allowed_globals()]
    allowed = b"".join(f"c{module}\n{name}\n".encode() for module, name in names)
    ok("inspect", "--strict", with_pickle(tmp_path / "a.pt", b"(" + allowed + b"l"))
    refused = [("os", "system"), ("builtins", "eval"), ("builtins", "list"), ("argparse", "Namespace"), ("collections", "defaultdict"),
               ("torch._utils", "_rebuild_nested_tensor"), ("torch", "FloatStorages"), ("torch.nn.modules.linear", "Linear")]
    for module, name in refused:
        path = with_pickle(tmp_path / "b.pt", f"c{module}\n{name}\n".encode())
        for command in (("inspect",), ("inspect", "--tree"), ("load",), ("plan",), ("gpt2", "forward"), ("compare",)):
            fails(1, *command, "--strict", path, mentions=[f"{module}.{name}"])
        ok("inspect", path)
        with pytest.raises(pickle.UnpicklingError): torch.load(path, weights_only=True)


def test_dangerous_names_are_called_so_and_nothing_runs(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'ran'}",)
    path = saved(tmp_path, {"w": torch.ones(2), "x": Evil()})
    listing = ok_json("inspect", path)
    assert any("dangerous" in it and "posix.system" in it for it in listing["warnings"]), listing["warnings"]
    assert tree(path)["x"]["$object"] == "posix.system"
    ok("load", path)
    assert not (tmp_path / "ran").exists()
    plain = ok_json("inspect", saved(tmp_path, {"args": argparse.Namespace(a=1), "w": torch.ones(1)}))
    assert not any("dangerous" in it for it in plain["warnings"])


def test_strict_refuses_bytes_behind_the_end(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(2)})
    path.write_bytes(path.read_bytes() + b"junk")
    assert any("4 bytes follow" in it for it in ok_json("inspect", path)["warnings"])
    fails(1, "inspect", "--strict", path, mentions=["4 bytes"])


# ---- NumPy, keys, paths ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numbers_and_arrays_of_numpy_are_shown_as_numpy_has_them(tmp_path, protocol):
    numbers = {name: np.dtype(name).type(value) for value in (0, 1, 7) for name in ("int8", "uint16", "int32", "uint64", "float16", "float32", "float64")}
    numbers |= {"f": np.float32(0.1), "h": np.float16(0.1), "d": np.float64(1 / 3), "n": np.int64(-(2**63)), "t": np.bool_(True)}
    arrays = {"a": np.arange(6.0).reshape(2, 3), "be": np.arange(3, dtype=">i4"), "F": np.asfortranarray(np.arange(12, dtype="u1").reshape(2, 3, 2)),
              "scalar": np.array(2.5), "empty": np.zeros((0, 3)), "b": np.array([True, False]), "T": np.arange(6).reshape(2, 3).T}
    odd = {"nan": np.float32("nan"), "inf": np.float64("-inf"), "c": np.complex64(1 + 2j), "long": np.arange(1000), "huge": np.zeros(100000)}
    path = saved(tmp_path, {"w": torch.ones(1), "numbers": numbers, "arrays": arrays, "odd": odd, "text": np.array(["a"])}, pickle_protocol=protocol)
    found = tree(path, "--tree=full")
    for name, number in numbers.items():
        shown = found["numbers"][name]
        assert shown["$numpy"] == number.dtype.name and type(number)(shown["value"]) == number, shown
    for name, array in arrays.items():
        shown = found["arrays"][name]
        shown = shown.get("$value", shown)
        assert (shown["$numpy"], shown["shape"]) == (array.dtype.name, list(array.shape))
        assert shown["values"] == (array.tolist() if array.size else [])
    assert [found["odd"][it]["value"] for it in ("nan", "inf", "c")] == [{"$float": "nan"}, {"$float": "-inf"}, [1.0, 2.0]]
    assert found["odd"]["huge"] == {"$numpy": "float64", "shape": [100000]} and "$object" in found["text"]
    assert tree(path)["odd"]["long"] == {"$numpy": "int64", "shape": [1000]}
    assert "'f': np.float32(0.1)\n" in ok("inspect", "--tree", path).stdout


def test_tensors_that_are_keys_are_counted(tmp_path):
    shared = torch.ones(4)
    value = {"k": {torch.ones(2): torch.ones(3), torch.ones(2): 1}, "t": {(torch.ones(5), 1): 1}, "s": {frozenset([(torch.ones(1),)]): 1},
             "listed": {shared: 1}, "w": shared, "plain": {("a", 1): torch.ones(1)}}
    listing = ok_json("inspect", saved(tmp_path, value))
    left_out = [it for it in listing["warnings"] if it.startswith("left out")]
    assert len(left_out) == 3 and "2 tensors in keys of the dictionary `k`" in left_out[0], left_out
    assert "a tensor in a key of the dictionary `t`" in left_out[1] and "dictionary `s`" in left_out[2], left_out
    top = ok_json("inspect", saved(tmp_path, {torch.ones(1): torch.ones(2)}))
    assert any("a tensor in a key of the dictionary at the top" in it for it in top["warnings"]), top


def test_the_tree_below_a_path_is_that_part_of_the_tree(tmp_path):
    _, checkpoint = lightning()
    path = saved(tmp_path, checkpoint)
    whole = dict(tree(path)["$dict"])
    at = lambda root: json.loads(ok("inspect", "--tree", "--json", "--root", root, path).stdout)
    assert at("hyper_parameters") == whole["hyper_parameters"] and at("epoch") == 3
    assert at("optimizer_states.0.param_groups") == whole["optimizer_states"][0]["param_groups"]
    assert at("args.seed") == 1
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, name in enumerate("ab", 1): torch.save({name: {"w": torch.ones(1), "n": number}}, shards / f"pytorch_model-0000{number}-of-00002.bin")
    found = json.loads(ok("inspect", "--tree", "--json", "--root", "b.n", shards).stdout)
    assert found == {str(shards / "pytorch_model-00002-of-00002.bin"): 2}
    fails(1, "inspect", "--tree", "--root", "c", shards, mentions=["`a` at the top", "pytorch_model-00001-of-00002.bin"])
    fails(1, "inspect", "--tree", "--root", "hyper_parameters.nope", path, mentions=["`lr`", "below `hyper_parameters`"])


def test_views_that_share_bytes_are_said_to(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    left, right = base[:, :3], base[:, 3:]
    path = saved(tmp_path, {"left": left, "right": right, "again": left, "other": torch.ones(2)})
    assert [it for it in ok("inspect", path).stdout.splitlines() if "shared" in it] == ["shared: `again` = `left`"]
    rows = saved(tmp_path, {"base": base, "row": base[1], "column": base[:, 2]}, "rows.pt")
    lines = [it for it in ok("inspect", rows).stdout.splitlines() if "shared" in it]
    assert lines == ["shared: `row` shares bytes with `base`", "shared: `column` shares bytes with `base`"]
    listed = {it["name"]: it for it in ok_json("inspect", rows)["tensors"]}
    assert {it["storage"] for it in listed.values()} == {0} and listed["row"]["offset_bytes"] == 24
