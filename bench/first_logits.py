#!/usr/bin/env python3
"""From the start of a process to a GPT-2's first logits, ours and PyTorch's in turns, on the same checkpoint.

usage: first_logits.py UNLADEN CHECKPOINT SIZE [--tokens 1,2,3] [--rounds N] [--strategy mmap]

Each round is a fresh process of each, the page cache warm: `unladen gpt2 forward CHECKPOINT --strategy mmap`, and a
Python that builds the notebook's model on the meta device, loads with `torch.load(mmap=True)` and
`load_state_dict(assign=True)`, and runs one forward pass. The processes are timed from start to end; PyTorch's load and
forward pass are timed inside its process as well, without its imports and the making of the model. A round before the
first that counts compares the logits; it fails if they lie further apart than 1e-4 (max |difference| / max
|reference|). Prints a Markdown table: the rounds, their medians, and the medians of the rounds' ratios.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time

MAX_DISTANCE = 1e-4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("unladen"); parser.add_argument("checkpoint"); parser.add_argument("size")
parser.add_argument("--tokens", default="1,2,3"); parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--strategy", default="mmap")
parser.add_argument("--torch-to", help=argparse.SUPPRESS)  # what the processes of PyTorch are started with
parser.add_argument("--save-logits", action="store_true", help=argparse.SUPPRESS)
args = parser.parse_args()


def in_torch():
    """One process of PyTorch: writes its times, and the logits if asked to, to the folder `--torch-to`."""
    import torch
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "interop"))
    from gpt2_torch import GPTModel, config
    with torch.device("meta"):
        model = GPTModel(config(args.size)).eval()
    start = time.perf_counter()
    model.load_state_dict(torch.load(args.checkpoint, mmap=True, weights_only=True), assign=True)
    with torch.no_grad():
        logits = model(torch.tensor([[int(it) for it in args.tokens.split(",")]]))[0]
    took_s = time.perf_counter() - start
    with open(os.path.join(args.torch_to, "torch.json"), "w") as file:
        json.dump({"load_and_forward_s": took_s, "n_threads": torch.get_num_threads()}, file)
    if args.save_logits:
        torch.save(logits, os.path.join(args.torch_to, "logits.pt"))


def run_torch(folder, *more):
    words = [sys.executable, os.path.abspath(__file__), args.unladen, args.checkpoint, args.size,
             "--tokens", args.tokens, "--torch-to", folder, *more]
    start = time.perf_counter()
    subprocess.run(words, check=True)
    took_s = time.perf_counter() - start
    with open(os.path.join(folder, "torch.json")) as file:
        return took_s, json.load(file)


def run_unladen(*more):
    words = [args.unladen, "gpt2", "forward", args.checkpoint, "--strategy", args.strategy, "--tokens", args.tokens, *more]
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    took_s = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    return took_s, done.stdout


def compare_logits(folder):
    import torch
    run_torch(folder, "--save-logits")
    reference = torch.load(os.path.join(folder, "logits.pt"), weights_only=True)
    line = json.loads(run_unladen("--json")[1])
    logits = torch.tensor(line["logits"]).view(line["shape"])
    if logits.shape != reference.shape:
        sys.exit(f"logits of shape {list(logits.shape)}, PyTorch's have {list(reference.shape)}")
    apart = ((logits - reference).abs().max() / reference.abs().max()).item()
    if not apart <= MAX_DISTANCE:
        sys.exit(f"the logits lie {apart:.1e} apart, more than {MAX_DISTANCE:.0e}")
    return apart


def main():
    with tempfile.TemporaryDirectory() as folder:
        apart = compare_logits(folder)
        ours, theirs, alone = [], [], []
        print("| round | unladen, whole process (s) | PyTorch, whole process (s) | PyTorch, load and forward (s) "
              "| of the process | of load and forward |")
        print("|---|---|---|---|---|---|")

        def row(name, a, b, c, of_b, of_c):
            print(f"| {name} | {a:.3f} | {b:.3f} | {c:.3f} | {of_b:.3f} | {of_c:.3f} |", flush=True)

        for round_ in range(args.rounds):
            ours.append(run_unladen()[0])
            whole_s, said = run_torch(folder)
            theirs.append(whole_s); alone.append(said["load_and_forward_s"])
            row(round_ + 1, ours[-1], theirs[-1], alone[-1], ours[-1] / theirs[-1], ours[-1] / alone[-1])
        ratios = [statistics.median(a / b for a, b in zip(ours, others)) for others in (theirs, alone)]
        row("median", *map(statistics.median, (ours, theirs, alone)), *ratios)
        row("smallest", min(ours), min(theirs), min(alone), min(ours) / min(theirs), min(ours) / min(alone))
    print(f"\ntokens {args.tokens}, strategy {args.strategy}, page cache warm, {len(os.sched_getaffinity(0))} cores, PyTorch "
          f"with {said['n_threads']} threads; the logits lie {apart:.1e} apart")


if args.torch_to:
    in_torch()
else:
    main()
