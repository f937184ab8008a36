"""Forms that checkpoints take besides a dictionary of plain tensors: modules saved whole, exported programs, lazy parameters, keys of bytes, files beside a weight map."""
import json, pickle, zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tensors import dtype_name, resolved_bytes, sha256
from unladen_cli import STRATEGIES, fails, hashes, ok, ok_json

pytestmark = pytest.mark.filterwarnings("ignore")  # quantisation is deprecated in PyTorch, and still found in files


def expected(state):
    return {name: (dtype_name(t), list(t.shape), sha256(resolved_bytes(t))) for name, t in state.items()}


def warnings(path):
    return "\n".join(ok_json("inspect", path)["warnings"])


# ---- modules of quantised layers -------------------------------------------------------------------------------

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.fc, self.head = nn.Linear(4, 3), nn.Linear(3, 2, bias=False)


def dynamic(dtype):
    torch.manual_seed(1)
    return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}, dtype=dtype)


def static():
    torch.manual_seed(2)
    model = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = torch.ao.quantization.prepare(model)
    prepared(torch.randn(4, 1, 4, 4))
    return torch.ao.quantization.convert(prepared)


def embedding():
    layer = nn.EmbeddingBag(10, 8)
    layer.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    model = nn.Sequential(layer)
    return torch.ao.quantization.convert(torch.ao.quantization.prepare(model, inplace=False).eval())


def recurrent():
    torch.manual_seed(3)
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 5)), {nn.LSTM}, dtype=torch.qint8)


MODULES = {"qint8": lambda: dynamic(torch.qint8), "float16": lambda: dynamic(torch.float16), "static": static, "embedding": embedding, "recurrent": recurrent}


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_of_quantised_layers_is_listed_as_its_state_dict(tmp_path, kind):
    model = MODULES[kind]()
    torch.save(model, tmp_path / "module.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    whole, state = hashes(tmp_path / "module.pt"), hashes(tmp_path / "state.pt")
    # A scale and a zero point of a layer's results are numbers in a module.
    numbers = {name for name in state if name not in whole}
    assert all(name.endswith((".scale", ".zero_point")) for name in numbers), numbers
    assert whole == {name: row for name, row in state.items() if name not in numbers} and len(whole) > 0
    said = warnings(tmp_path / "module.pt")
    assert "not in the module's state" not in said, said
    assert ("scales and zero points" in said) == (len(numbers) > 0), said
    for strategy in STRATEGIES: ok("load", tmp_path / "module.pt", "--strategy", strategy)


def test_packed_weights_are_the_bytes_that_pytorch_unpacks(tmp_path):
    model = dynamic(torch.qint8)
    torch.save(model, tmp_path / "module.pt")
    weight, bias = model.fc._packed_params._weight_bias()
    found = hashes(tmp_path / "module.pt")
    assert found["fc._packed_params._packed_params.0"] == ("qint8", [3, 4], sha256(resolved_bytes(weight.int_repr())))
    assert found["fc._packed_params._packed_params.1"] == expected({"b": bias.detach()})["b"]
    assert found["conv.weight"] == expected({"w": model.conv.weight})["w"]
    assert "head._packed_params._packed_params.0" in found and "head._packed_params._packed_params.1" not in found


# ---- exported programs -----------------------------------------------------------------------------------------

def test_an_exported_program_is_named(tmp_path):
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, tmp_path / "in.pt2")
    result = fails(1, "inspect", tmp_path / "in.pt2", mentions=["in.pt2", "torch.export", "state_dict"])
    # The hint is a way that works.
    torch.save(torch.export.load(tmp_path / "in.pt2").state_dict, tmp_path / "out.pt")
    assert hashes(tmp_path / "out.pt") == expected(program.state_dict), str(result)


def test_an_exported_program_of_the_first_releases_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", b"")
        archive.writestr("version", "8.1")
    fails(1, "inspect", tmp_path / "in.pt2", mentions=["torch.export", "state_dict"])


# ---- parameters without a shape --------------------------------------------------------------------------------

@pytest.mark.parametrize("whole", [True, False])
def test_a_lazy_module_that_has_not_run_says_what_is_missing(tmp_path, whole):
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4), nn.LazyBatchNorm1d())
    torch.save(model if whole else model.state_dict(), tmp_path / "in.pt")
    assert {"0.weight", "0.bias"} <= set(hashes(tmp_path / "in.pt"))
    said = warnings(tmp_path / "in.pt")
    for name in ("1.weight", "1.bias", "2.weight", "2.running_mean"):
        assert f"parameter `{name}`: it has no shape" in said, said
    assert "UninitializedParameter" not in said and "leads back" not in said, said


# ---- packed elements -------------------------------------------------------------------------------------------

def nibbles():
    weight = torch.randn(6, 8)
    scales, zero_points = torch.full((6,), 0.1), torch.full((6,), 7.0)
    return torch.quantize_per_channel(weight, scales, zero_points, 0, torch.quint4x2)


def uniform_nibbles():
    return torch.quantize_per_tensor(torch.randn(6, 8), 0.1, 7, torch.quint4x2)


def test_two_elements_in_a_byte_are_listed_as_bytes(tmp_path):
    torch.save({"q": nibbles(), "w": torch.ones(2)}, tmp_path / "in.pt")
    found = hashes(tmp_path / "in.pt")
    assert set(found) == {"q", "q.scales", "q.zero_points", "w"} and found["q"][1] == [24]


PARTS = {"row": lambda: nibbles()[1], "turned": lambda: uniform_nibbles().t(), "slice": lambda: uniform_nibbles()[2:4]}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_such_a_tensor_is_left_out_alone(tmp_path, part):
    torch.save({"q": PARTS[part](), "w": torch.ones(2)}, tmp_path / "in.pt")
    assert set(hashes(tmp_path / "in.pt")) == {"w"}
    assert "tensor `q`: several elements stand in a byte" in warnings(tmp_path / "in.pt")


# ---- plain pickles without a mark ------------------------------------------------------------------------------

class Holder:
    def __init__(self, **values): self.__dict__.update(values)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("value", [("run", {"epoch": 3}), Holder(epoch=3), [(1, 2)], {"a": {1, 2}}, Holder(a=np.float64(0.5))], ids=str.__call__)
def test_plain_pickles_of_every_protocol_are_told(tmp_path, protocol, value):
    with open(tmp_path / "in.pkl", "wb") as file: pickle.dump(value, file, protocol=protocol)
    assert ok_json("inspect", tmp_path / "in.pkl")["format"] == "pickle"


def test_tensors_in_a_tuple_of_protocol_1_are_read(tmp_path):
    state = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.arange(4)}
    with open(tmp_path / "in.pkl", "wb") as file: pickle.dump(("run", state), file, protocol=1)
    assert hashes(tmp_path / "in.pkl") == expected({f"1.{name}": t for name, t in state.items()})


@pytest.mark.parametrize("text", ["(see the other file).", "checkpoint: none.\nNothing\nhere.", "[1, 2].", "}", "c.", "(((((."])
def test_texts_are_no_pickles(tmp_path, text):
    (tmp_path / "in.pt").write_text(text)
    fails(1, "inspect", tmp_path / "in.pt", mentions=["in.pt", "a file that starts with"])


# ---- keys ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_keys_of_bytes_have_one_name_in_all_protocols(tmp_path, protocol):
    state = {b"w": torch.ones(2), b"": torch.ones(3), "ä".encode(): torch.ones(4), b"\xff": torch.ones(5)}
    torch.save({"s": state}, tmp_path / "in.pt", pickle_protocol=protocol)
    assert {name: row[1] for name, row in hashes(tmp_path / "in.pt").items()} == {"s.w": [2], "s.": [3], "s.ä": [4], "s.ÿ": [5]}
    assert "b'w': " in ok("inspect", tmp_path / "in.pt", "--tree").stdout


# ---- folders ---------------------------------------------------------------------------------------------------

def test_tensors_of_several_parts_have_files_of_their_own(tmp_path):
    weight = torch.randn(4, 6)
    of_channels = torch.quantize_per_channel(weight, torch.rand(4) + 0.1, torch.arange(4), 0, torch.qint8)
    state = {"a.pc": of_channels, "b.pt": torch.quantize_per_tensor(weight, 0.5, 2, torch.qint8), "c.coo": weight.to_sparse(), "d": weight}
    for name, t in state.items(): torch.save(t, tmp_path / f"{name}.pt")
    listing = ok_json("inspect", tmp_path)
    assert [it["name"] for it in listing["tensors"]] == ["a.pc", "a.pc.scales", "a.pc.zero_points", "b.pt", "c.coo.indices", "c.coo.values", "d"]
    torch.save(state, tmp_path.parent / "one.pt")
    assert hashes(tmp_path) == hashes(tmp_path.parent / "one.pt")
    for strategy in [*STRATEGIES, "per-tensor"]: ok("load", tmp_path, "--strategy", strategy)


@pytest.mark.parametrize("name", ["last.ckpt", "model.pth", "model.pt", "weights.bin"])
def test_a_folder_around_one_checkpoint_names_it(tmp_path, name):
    (tmp_path / "config.yaml").write_text("lr: 1")
    torch.save({"w": torch.ones(2), "b": torch.ones(3)}, tmp_path / name)
    fails(1, "inspect", tmp_path, mentions=[name, "hint: ", f"`{name}`"])
    assert len(hashes(tmp_path / name)) == 2


def test_files_beside_a_weight_map(tmp_path):
    state = {"a": torch.ones(2), "b": torch.ones(3)}
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in shards.items(): save_file({name: state[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    save_file(state, tmp_path / "consolidated.safetensors")
    save_file(state, tmp_path / "model.fp16-00001-of-00001.safetensors")
    torch.save(state, tmp_path / "optimizer.bin")
    assert hashes(tmp_path) == expected(state)
    said = warnings(tmp_path)
    assert "1 file beside the weight map" in said and "consolidated.safetensors" in said, said
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "lists no tensors" in warnings(tmp_path) and hashes(tmp_path) == {}
