"""Runs the command-line program the way a script does: pipes, no terminal, no standard input."""
import json, os, pathlib, subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The program under test; `./check` says which.
UNLADEN = os.environ.get("UNLADEN") or str(ROOT / "target/debug/unladen")
TIMEOUT_S = 120

STRATEGIES = ["naive", "sequential", "meta", "mmap", "mmap-copy", "stream"]  # from one file; per-tensor needs a folder


class Result:
    """What a run left behind: its exit code, what it printed, and the words to show when a test fails."""

    def __init__(self, words, done):
        self.command = " ".join(words)
        self.code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr

    def __str__(self):
        return f"$ {self.command}\nexit code {self.code}\nstdout: {self.stdout[:2000]}\nstderr: {self.stderr[:2000]}"


def run(*words):
    """Runs `unladen` with these words and returns what happened, whatever it was."""
    words = [UNLADEN, *map(str, words)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S)
    result = Result(words, done)
    assert result.code in (0, 1, 2), f"neither success nor a typed error:\n{result}"
    assert "panicked" not in result.stderr, f"a panic:\n{result}"
    assert "\x1b" not in result.stdout + result.stderr and "\r" not in result.stdout + result.stderr, f"terminal codes in a pipe:\n{result}"
    return result


def ok(*words):
    """Runs `unladen`, which has to succeed."""
    result = run(*words)
    assert result.code == 0, f"should have worked:\n{result}"
    return result


def ok_json(*words):
    """The one JSON value that a command prints with --json."""
    result = ok(*words, "--json")
    return json.loads(result.stdout)


def fails(code, *words, mentions=()):
    """Runs `unladen`, which has to fail with `code`, say why on stderr, and print no result."""
    result = run(*words)
    assert result.code == code, f"should have failed with {code}:\n{result}"
    assert result.stdout == "", f"a result beside an error:\n{result}"
    assert "error:" in result.stderr, f"no error line:\n{result}"
    if code == 1: assert "hint:" in result.stderr, f"no hint:\n{result}"
    for word in map(str, mentions): assert word in result.stderr, f"does not mention {word!r}:\n{result}"
    return result


def hashes(path):
    """What `unladen inspect --hash` says: name -> (dtype, shape, sha256)."""
    listing = ok_json("inspect", path, "--hash", "sha256")
    names = [it["name"] for it in listing["tensors"]]
    assert len(names) == len(set(names)), f"{path}: a name stands twice: {names}"
    return {it["name"]: (it["dtype"], it["shape"], it["sha256"]) for it in listing["tensors"]}
