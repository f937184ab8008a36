"""What goes wrong is said once, with the file, the reason and what to try; nothing half written is left behind."""
import os, shutil, signal, subprocess, time

import pytest
import torch
from safetensors.torch import save_file

from unladen_cli import UNLADEN, fails, ok, ok_json, run


@pytest.fixture
def good(tmp_path):
    folder = tmp_path / "good"
    folder.mkdir()
    state = {"w": torch.arange(3000.0).reshape(50, 60), "b": torch.ones(60)}
    torch.save(state, folder / "good.pth")
    save_file(state, folder / "good.safetensors")
    return folder


READERS = [("inspect",), ("load",), ("gpt2", "forward"), ("gpt2", "generate"), ("compare",)]


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_a_missing_file_is_named(tmp_path, command):
    fails(1, *command, tmp_path / "nowhere.pth", mentions=["nowhere.pth"])


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, command):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>404")
    fails(1, *command, tmp_path / "page.pth", mentions=["page.pth"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error_everywhere(good, tmp_path, suffix, share):
    data = (good / f"good.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(data[:int(len(data) * share)])
    for command in (("inspect",), ("inspect", "--hash", "sha256"), ("load",), ("load", "--strategy", "mmap")):
        fails(1, *command, cut, mentions=[cut.name])
    fails(1, "convert", cut, tmp_path / "out.pth", mentions=[cut.name])
    assert sorted(it.name for it in tmp_path.iterdir()) == [cut.name, "good"], "something half written is left"


def test_a_truncated_tensor_of_a_folder_names_its_file(good, tmp_path):
    ok("convert", good / "good.pth", tmp_path / "params", "--to", "folder")
    file = tmp_path / "params/w.pt"
    file.write_bytes(file.read_bytes()[:-100])
    fails(1, "load", tmp_path / "params", "--strategy", "per-tensor", mentions=["w.pt"])


@pytest.mark.parametrize("words", [
    (), ("unknown-command",), ("inspect",), ("load", "FILE", "--no-such-option"), ("load", "FILE", "--strategy", "magic"),
    ("load", "FILE", "--device", "abacus"), ("inspect", "FILE", "--hash", "md5"), ("convert", "FILE"),
    ("gpt2", "save", "OUT.pth", "--size", "gigantic"), ("gpt2", "forward", "FILE", "--tokens", "one"), ("compare", "--strategies", "stream,magic"),
], ids=" ".join)
def test_wrong_usage_exits_with_2_and_prints_no_result(good, words):
    result = run(*(str(good / "good.pth") if word == "FILE" else word for word in words))
    assert result.code == 2, f"wrong usage should exit with 2:\n{result}"
    assert result.stdout == "" and result.stderr.strip(), str(result)


def test_an_unknown_strategy_is_answered_with_the_known_ones(good):
    result = run("load", good / "good.pth", "--strategy", "magic")
    assert all(name in result.stderr for name in ("stream", "mmap-copy", "per-tensor")), str(result)


def test_convert_replaces_nothing_unless_forced(good, tmp_path):
    out = tmp_path / "out.pth"
    out.write_bytes(b"precious")
    fails(1, "convert", good / "good.pth", out, mentions=["out.pth", "--force"])
    assert out.read_bytes() == b"precious"
    ok("convert", good / "good.pth", out, "--force")
    assert sorted(torch.load(out, weights_only=True)) == ["b", "w"]
    assert sorted(it.name for it in tmp_path.iterdir()) == ["good", "out.pth"]


def test_convert_into_a_missing_folder_is_an_error(good, tmp_path):
    fails(1, "convert", good / "good.pth", tmp_path / "no/such/out.pth", mentions=["no/such"])
    assert not (tmp_path / "no").exists()


def test_a_failed_convert_keeps_the_file_that_was_there(good, tmp_path):
    out = tmp_path / "out.pth"
    shutil.copy(good / "good.pth", out)
    data = (good / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[:len(data) // 2])
    fails(1, "convert", tmp_path / "cut.pth", out, "--force", mentions=["cut.pth"])
    assert out.read_bytes() == data
    assert sorted(it.name for it in tmp_path.iterdir()) == ["cut.pth", "good", "out.pth"]


def test_results_are_on_stdout_and_words_on_stderr(good):
    assert "w" in ok("inspect", good / "good.pth").stdout
    assert ok_json("load", good / "good.pth")["tensors"] == 2  # the whole of stdout is one JSON value


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            import os
            return os.system, (f"touch {tmp_path}/was-run",)

    torch.save({"w": torch.ones(3), "evil": Evil()}, tmp_path / "evil.pth")
    result = run("load", tmp_path / "evil.pth", "--json")
    assert not (tmp_path / "was-run").exists(), str(result)
    assert "system" in result.stderr, f"unsaid that the file names code:\n{result}"


def test_a_pipe_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for command in READERS: fails(1, *command, tmp_path / "pipe.pth", mentions=["pipe.pth"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(good):
    (good / "good.pth").chmod(0)
    for command in READERS: fails(1, *command, good / "good.pth", mentions=["good.pth", "Permission denied"])


def test_names_of_files_that_are_no_text_work(good, tmp_path):
    name = os.fsdecode(b"\xff odd\n'\".pth")
    shutil.copy(good / "good.pth", tmp_path / name)
    assert ok_json("load", tmp_path / name)["tensors"] == 2
    ok("convert", tmp_path / name, tmp_path / f"to {name}")
    assert sorted(torch.load(tmp_path / f"to {name}", weights_only=True)) == ["b", "w"]
    ok("compare", tmp_path / name, "--dir", tmp_path / "work")


def interrupted(folder, *words):
    """Interrupts a save once its temporary file is there; what it left in the folder, its exit code and its words."""
    before = set(folder.iterdir())
    with subprocess.Popen([UNLADEN, *map(str, words)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        began = time.monotonic()
        while child.poll() is None and set(folder.iterdir()) == before and time.monotonic() - began < 60: time.sleep(0.001)
        child.send_signal(signal.SIGINT)
        stderr = child.communicate(timeout=60)[1]
    return set(folder.iterdir()) - before, child.returncode, stderr


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out"])
def test_an_interrupted_save_leaves_nothing(tmp_path, name):
    left, code, stderr = interrupted(tmp_path, "gpt2", "save", "--size", "medium", tmp_path / name)
    assert (left, code) == (set(), 130), stderr
    assert "cancelled" in stderr
