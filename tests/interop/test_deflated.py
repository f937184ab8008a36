"""Archives that were zipped again: PyTorch's records deflated by Python's zipfile, some, all, by every level, and damaged."""
import json, os, pickle, struct, sys, zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tensors import digest, dtype_name, flat, resolved_bytes, sha256
from unladen_cli import ROOT, STRATEGIES, UNLADEN, fails, hashes, ok, ok_json, run

os.environ["UNLADEN"] = UNLADEN
sys.path.insert(0, str(ROOT / "bench"))
import budgets

PATHS = ["buffered", "drop-behind", "direct", "mixed"]


def a_bit_of_everything():
    """Some MiB: plain, strided, tied, sliced, expanded, empty tensors, of several types."""
    torch.manual_seed(7)
    base = torch.randint(-50, 50, (1200, 900), dtype=torch.int16)
    wide = torch.randn(700, 500).to(torch.bfloat16)
    flat_ = torch.randn(400_000)
    tied = torch.randn(300, 200)
    return {
        "plain": torch.randn(1000, 1024), "zeros": torch.zeros(3_000_000), "transposed": wide.t(), "wide": wide,
        "columns": base[:, 3:600:2], "rows": base[100:200], "permuted": torch.randn(20, 30, 40).permute(2, 0, 1),
        "slices.a": flat_[:1000], "slices.b": flat_[1000:301_000], "slices.c": flat_[350_000:],
        "tied": tied, "tied_too": tied, "expanded": torch.arange(5.0).expand(4, 5), "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64), "bool": torch.rand(1000) > 0.5,
        "conjugate": torch.randn(50, 40, dtype=torch.complex64).conj(), "nested": {"list": [torch.arange(10), torch.ones(2, 2)]},
    }


def zip_again(source, target, method=lambda name: zipfile.ZIP_DEFLATED, level=6):
    """Every record as it was, packed by `method(name)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), compress_type=method(info.filename), compresslevel=level)
    return target


@pytest.fixture(scope="module")
def state():
    return a_bit_of_everything()


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("deflated") / "saved.pt"
    torch.save(state, path)
    return path


def as_torch_has_it(path):
    """Name -> (dtype, shape, sha256) of what PyTorch loads, which inflates too."""
    state = torch.load(path, mmap=False)
    return {name: (dtype_name(t), list(t.shape), sha256(resolved_bytes(t))) for name, t in flat(state)}


WAYS_TO_ZIP = {
    "all": dict(), "fast": dict(level=1), "best": dict(level=9), "unshrunk": dict(level=0),
    "only-data": dict(method=lambda name: zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED),
    "only-headers": dict(method=lambda name: zipfile.ZIP_STORED if "/data/" in name else zipfile.ZIP_DEFLATED),
    "every-other": dict(method=lambda name: zipfile.ZIP_DEFLATED if name[-1] in "02468l" else zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("how", WAYS_TO_ZIP)
def test_a_deflated_archive_holds_what_torch_finds_in_it(how, saved, state, tmp_path):
    path = zip_again(saved, tmp_path / "again.pt", **WAYS_TO_ZIP[how])
    wanted = as_torch_has_it(path)
    assert hashes(path) == wanted
    whole = digest(dict(flat(state)))
    for strategy in STRATEGIES:
        row = ok_json("load", path, "--strategy", strategy, "--host-budget", "none", "--digest")
        assert row["digest"] == whole, (strategy, row)


@pytest.mark.parametrize("io", PATHS)
def test_every_strategy_and_way_to_read_keeps_a_budget_of_4_mib(io, saved, state, tmp_path):
    path = zip_again(saved, tmp_path / "again.pt")
    whole = digest(dict(flat(state)))
    for strategy in STRATEGIES:
        budgets.evict(path)
        holds_two = strategy in ("naive", "sequential", "meta")
        row = ok_json("load", path, "--strategy", strategy, "--host-budget", "none" if holds_two else "4MiB", "--io", io, "--digest")
        assert row["digest"] == whole, (strategy, io, row)


def test_converted_archives_hold_the_same(saved, state, tmp_path):
    path = zip_again(saved, tmp_path / "again.pt")
    wanted = as_torch_has_it(path)
    for name in ["out.pth", "folder"]:
        ok("convert", path, tmp_path / name, "--host-budget", "4MiB")
        assert hashes(tmp_path / name) == wanted, name


def test_a_folder_of_deflated_files_loads(state, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    some = {name: state[name] for name in ["plain", "transposed", "columns", "scalar"]}
    for number, (name, t) in enumerate(some.items()):
        torch.save(t, tmp_path / "one.pt")
        zip_again(tmp_path / "one.pt", folder / f"{name}.pt", level=6 if number % 2 else 0)
    for strategy in STRATEGIES + ["per-tensor"]:
        row = ok_json("load", folder, "--strategy", strategy, "--host-budget", "none", "--digest")
        assert row["digest"] == digest(some), strategy


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two tensors of 24 MiB each, transposed, deflated."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(1)
    big = torch.randint(0, 20, (3072, 2048), dtype=torch.int32)
    torch.save({"one": big.t(), "other": big.clone().t()}, folder / "saved.pt")
    return zip_again(folder / "saved.pt", folder / "large.pt", level=1)


@pytest.mark.parametrize("warm", [True, False])
def test_a_record_larger_than_the_budget_takes_what_was_predicted(large, warm):
    (budgets.warm if warm else budgets.evict)(large)
    row = ok_json("load", large, "--strategy", "stream", "--host-budget", "4MiB")
    overhead, predicted = (row[it] - row["weights_bytes"] for it in ("host_peak_anon_bytes", "predicted_host_peak_anon_bytes"))
    assert predicted <= 4 * budgets.MIB, row
    assert overhead <= predicted, row
    assert predicted - overhead <= 2 * budgets.MIB, row
    if not warm and row["page_cache_before_bytes"] == 0: assert row["page_cache_after_bytes"] <= budgets.MIB, row


def records_of(path):
    """Name -> (where the packed bytes start, how many they are, where the directory's entry starts)."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        infos = {it.filename: it for it in file.infolist()}
        at, found = file.start_dir, {}
    while data[at:at + 4] == b"PK\1\2":
        name_len, extra_len, comment_len = struct.unpack_from("<3H", data, at + 28)
        name = data[at + 46:at + 46 + name_len].decode()
        header = infos[name].header_offset
        payload = header + 30 + sum(struct.unpack_from("<2H", data, header + 26))
        found[name] = payload, infos[name].compress_size, at
        at += 46 + name_len + extra_len + comment_len
    return found


def damaged(path, target, record, change):
    """`path` with one record of it damaged."""
    data = bytearray(path.read_bytes())
    start, length, entry = next(it for name, it in records_of(path).items() if name.endswith(record))
    change(data, start, length, entry, struct.unpack_from("<L", data, entry + 42)[0])
    target.write_bytes(data)
    return target


def both(data, entry, header, at, value):
    """Sets a field of the directory's entry and of the local header."""
    struct.pack_into("<L", data, entry + at, value)
    struct.pack_into("<L", data, header + at - 2, value)


def garbage(data, start, length, entry, header): data[start:start + length] = os.urandom(length)
def a_flipped_byte(data, start, length, entry, header): data[start + length // 2] ^= 0x55
def cut_off(data, start, length, entry, header): both(data, entry, header, 20, length - 100)
def another_checksum(data, start, length, entry, header): both(data, entry, header, 16, 12345)
def an_end_too_early(data, start, length, entry, header): data[start:start + 2] = b"\x03\x00"
def a_block_of_no_kind(data, start, length, entry, header): data[start] = 0x07


@pytest.mark.parametrize("damage", [garbage, a_flipped_byte, cut_off, another_checksum, an_end_too_early, a_block_of_no_kind], ids=lambda it: it.__name__)
def test_a_damaged_record_is_a_typed_error_that_names_it(damage, saved, state, tmp_path):
    path = zip_again(saved, tmp_path / "again.pt")
    broken = damaged(path, tmp_path / "broken.pt", "/data/0", damage)
    assert "plain" in hashes_without(broken), "it lists all the same"
    for strategy in STRATEGIES:
        fails(1, "load", broken, "--strategy", strategy, "--host-budget", "none", mentions=["/data/0", "broken.pt"])
    fails(1, "inspect", broken, "--hash", "sha256", mentions=["/data/0"])
    row = ok_json("load", path, "--digest")
    assert row["digest"] == digest(dict(flat(state)))
    headers = damaged(path, tmp_path / "headers.pt", "/data.pkl", damage)
    fails(1, "inspect", headers)


def hashes_without(path):
    return {it["name"] for it in ok_json("inspect", path)["tensors"]}


@pytest.mark.parametrize("by", [-4, 4, 400])
def test_a_length_that_is_not_true_is_a_typed_error(by, tmp_path):
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "saved.pt")
    path = zip_again(tmp_path / "saved.pt", tmp_path / "again.pt")
    lie = lambda data, start, length, entry, header: both(data, entry, header, 24, 4000 + by)
    broken = damaged(path, tmp_path / "broken.pt", "/data/0", lie)
    fails(1, "load", broken, mentions=["data/0"])


def test_a_checksum_that_was_not_computed_is_none(saved, state, tmp_path):
    path = zip_again(saved, tmp_path / "again.pt")
    for record in ["/data/0", "/data/1", "/data.pkl"]:
        path = damaged(path, path, record, lambda data, start, length, entry, header: both(data, entry, header, 16, 0))
    assert ok_json("load", path, "--digest")["digest"] == digest(dict(flat(state)))


def test_a_bomb_lists_and_loads_only_where_there_is_memory_for_it(tmp_path):
    torch.save({"bomb": torch.zeros(25_000_000)}, tmp_path / "saved.pt")
    path = zip_again(tmp_path / "saved.pt", tmp_path / "bomb.pt")
    assert path.stat().st_size < 200_000
    assert hashes_without(path) == {"bomb"}
    row = ok_json("plan", path, "--strategy", "stream", "--host-budget", "4MiB")
    assert row["weights_bytes"] >= 100_000_000
    fails(1, "plan", path, "--free-host", "50MiB", mentions=["bomb"])
    assert ok_json("load", path, "--strategy", "stream", "--host-budget", "4MiB")["bytes"] == 100_000_000


# ---- verify ----------------------------------------------------------------------------------------------------

def with_other_checksum(path, record):
    """Changes the checksum of one record in the directory; deflated records of `zipfile` have it in front of them too."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive: info = archive.getinfo(record)
    struct.pack_into("<I", data, info.header_offset + 14, info.CRC ^ 1)
    entry = data.rindex(b"PK\1\2", 0, data.rindex(record.encode()))
    struct.pack_into("<I", data, entry + 16, info.CRC ^ 1)
    path.write_bytes(data)


def verified(path, *more):
    result = run("verify", path, "--json", *more)
    return result.code, json.loads(result.stdout)


def test_checksums_of_packed_records_are_compared_whether_they_are_tensors_or_not(tmp_path):
    # One tensor's bytes start like an archive.
    state = {"w": torch.arange(5000.0), "zip": torch.tensor(list(b"PK\3\4") * 2000, dtype=torch.uint8)}
    torch.save(state, tmp_path / "saved.pt")
    path = zip_again(tmp_path / "saved.pt", tmp_path / "again.pt")
    with zipfile.ZipFile(path) as archive: n_records = len(archive.infolist())
    for more in ((), ("--write-manifest", tmp_path / "m.json")):
        code, row = verified(path, *more)
        assert code == 0 and row["records"] == {"compared": n_records, "without_checksum": 0, "packed": n_records}, row
    for record, tensors in (("saved/data/0", ["w"]), ("saved/.data/serialization_id", [])):
        zip_again(tmp_path / "saved.pt", path)
        with_other_checksum(path, record)
        code, row = verified(path)
        (fault,) = row["faults"]
        assert code == 1 and (fault["kind"], fault["record"], fault["tensors"]) == ("checksum", record, tensors), row


def test_the_chunks_of_a_distributed_checkpoint_are_compared_one_by_one(tmp_path):
    state = {f"w{number}": torch.full((1000,), float(number + 1)) for number in range(6)}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "save", thread_count=2), no_dist=True)
    code, row = verified(tmp_path / "save")
    assert code == 0 and row["records"]["compared"] >= 6 * 4, row
    file = tmp_path / "save/__0_0.distcp"
    data = file.read_bytes()
    at = data.index(struct.pack("<f", 3.0) * 100) if struct.pack("<f", 3.0) * 100 in data else data.index(struct.pack("<f", 4.0) * 100)
    file.write_bytes(data[:at] + b"\1" + data[at + 1:])
    code, row = verified(tmp_path / "save")
    (fault,) = row["faults"]
    assert code == 1 and fault["kind"] == "checksum" and len(fault["tensors"]) == 1 and fault["path"].endswith(".distcp"), row


def test_compressed_chunks_of_a_distributed_checkpoint_are_named(tmp_path):
    dcp.save({"w": torch.zeros(1000)}, storage_writer=FileSystemWriter(tmp_path / "save"), no_dist=True)
    file = tmp_path / "save/__0_0.distcp"
    zip_again(file, tmp_path / "again")
    chunk = (tmp_path / "again").read_bytes()
    with open(tmp_path / "save/.metadata", "rb") as metadata: saved = pickle.load(metadata)
    for info in saved.storage_data.values(): info.length = len(chunk)
    with open(tmp_path / "save/.metadata", "wb") as metadata: pickle.dump(saved, metadata, protocol=4)
    file.write_bytes(chunk)
    fails(1, "inspect", tmp_path / "save", mentions=["compressed", "`w`", "torch.distributed.checkpoint"])
