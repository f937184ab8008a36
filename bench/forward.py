#!/usr/bin/env python3
"""GPT-2's forward pass, ours and PyTorch's in turns, on the same checkpoint.

usage: forward.py UNLADEN CHECKPOINT SIZE [--tokens N] [--rounds N]

Each of our rounds is a fresh process whose one and only forward pass counts; PyTorch's passes come from one process that
has warmed up. Prints a line per round, the medians, and how far the logits lie apart (max |difference| / max |reference|).
"""
import argparse, json, os, statistics, subprocess, sys, time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "interop"))
from gpt2_torch import GPTModel, config

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("unladen"); parser.add_argument("checkpoint"); parser.add_argument("size")
parser.add_argument("--tokens", type=int, default=64); parser.add_argument("--rounds", type=int, default=5)
args = parser.parse_args()

with torch.device("meta"):
    model = GPTModel(config(args.size)).eval()
model.load_state_dict(torch.load(args.checkpoint, weights_only=True), assign=True)
ids = [(7919 * i + 13) % 50257 for i in range(args.tokens)]
ours, theirs, apart = [], [], 0.0
with torch.no_grad():
    for _ in range(2):
        reference = model(torch.tensor([ids]))[0]
    for round_ in range(args.rounds):
        words = [args.unladen, "gpt2", "forward", args.checkpoint, "--json", "--tokens", ",".join(map(str, ids))]
        line = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        start = time.perf_counter()
        reference = model(torch.tensor([ids]))[0]
        theirs.append(time.perf_counter() - start)
        ours.append(line["forward_s"])
        logits = torch.tensor(line["logits"]).view(line["shape"])
        apart = max(apart, ((logits - reference).abs().max() / reference.abs().max()).item())
        print(f"round {round_ + 1}: unladen {ours[-1] * 1e3:6.1f} ms, PyTorch {theirs[-1] * 1e3:6.1f} ms")
ratio = statistics.median(a / b for a, b in zip(ours, theirs))
print(f"median: unladen {statistics.median(ours) * 1e3:.1f} ms, PyTorch {statistics.median(theirs) * 1e3:.1f} ms "
      f"({torch.get_num_threads()} threads), median of the ratios {ratio:.2f}; logits {apart:.1e} apart")
