"""How long it takes to open checkpoints of many small tensors, beside PyTorch and safetensors.

    python bench/opening.py target/release/unladen [--folder FOLDER] [--runs 5] [--tensors 1000 10000 100000]

Writes a `.pth` (by `torch.save`) and a `.safetensors` file of each number of tensors to a temporary folder (or to
FOLDER, where they stay and are used again), opens each several times in turns, and prints a Markdown table of medians.
The files were just written or read once, so they are in the page cache. `unladen` is timed inside its process
(`open_s` of `inspect --json`); the others in this one, after their imports: `torch.load(mmap=True, weights_only=True)`,
which makes every tensor, and `safe_open`, which reads the header. A peer that took 20 s in all is not run again. Needs torch and safetensors.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PATIENCE_S = 20


def write(path, n_tensors):
    if path.exists():
        return
    tensors = {
        f"model.layers.{index // 10}.block.{index % 10}.weight": torch.full((4, 4), float(index))
        for index in range(n_tensors)
    }
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def open_s_of_unladen(binary, path):
    command = [binary, "inspect", str(path), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["open_s"]


def open_s_of_peer(path, n_tensors):
    began = time.perf_counter()
    if path.suffix == ".pth":
        n_found = len(torch.load(path, mmap=True, weights_only=True))
    else:
        with safe_open(path, "pt") as file:
            n_found = len(file.keys())
    took_s = time.perf_counter() - began
    assert n_found == n_tensors, f"{path}: {n_found} tensors"
    return took_s


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="unladen's release build")
    parser.add_argument("--folder", type=pathlib.Path, help="where the files are, or are made and stay")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tensors", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print("| file | tensors | unladen | µs a tensor | beside it | its time | µs a tensor | times as fast |")
        print("|---|---:|---:|---:|---|---:|---:|---:|")
        for suffix, peer in [(".pth", "torch.load(mmap=True)"), (".safetensors", "safe_open")]:
            for n_tensors in args.tensors:
                path = folder / f"{n_tensors}{suffix}"
                write(path, n_tensors)
                path.read_bytes()
                # In turns, so that a busy moment of the machine falls on both; a peer that takes long is not asked again.
                ours_s, theirs_s = [], []
                for _ in range(args.runs):
                    ours_s.append(open_s_of_unladen(args.binary, path))
                    if sum(theirs_s) < PATIENCE_S:
                        theirs_s.append(open_s_of_peer(path, n_tensors))
                ours_s, theirs_s = statistics.median(ours_s), statistics.median(theirs_s)
                ours, theirs = (
                    (f"{took_s * 1e3:.1f} ms", f"{took_s * 1e6 / n_tensors:.2f}") for took_s in (ours_s, theirs_s)
                )
                print(
                    f"| {suffix} | {n_tensors:,} | {ours[0]} | {ours[1]} "
                    f"| {peer} | {theirs[0]} | {theirs[1]} | {theirs_s / ours_s:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
