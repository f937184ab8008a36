#!/usr/bin/env python3
"""Are budgets kept, and what do they cost? Prints Markdown tables and a PASS or FAIL for each promise; exits 1 if one fails.

usage: budgets.py FOLDER [--size xl] [--rounds 5] [--quick] [--skip-loads] [--skip-cgroups]
FOLDER is on a disk, and keeps the checkpoints that are made here once: a GPT-2 of SIZE (tiny, small, medium, large or xl, by
`unladen gpt2 save`; one that is there serves), and a matrix checkpoint whose tensors are all transposed (by PyTorch). UNLADEN
names the program (else target/release/unladen). --quick: gpt2-small, an eighth of the matrices, 3 rounds.

Loads: each checkpoint as it is, and the GPT-2 cast to bf16, with host budgets of 4 to 512 MiB, warm, in rounds whose order
rotates. Measured is the kernel's peak of anonymous memory minus the weights; predicted is the plan's.
Control groups (root, version 1 or 2; a fresh group for each run): loads, refusals, hashes and a forward pass at limits that
leave room for what was promised and no more. All limits follow from the size of the model.
Needs: pip install torch (for the matrices).
"""
import argparse, collections, ctypes, dataclasses, gc, json, mmap, os, pathlib, statistics, subprocess, sys

MIB = 2**20
ROOT = pathlib.Path(__file__).resolve().parents[1]
UNLADEN = os.environ.get("UNLADEN") or str(ROOT / "target/release/unladen")
BUDGETS_MIB = [4, 16, 64, 512]
# What the kernel's counters are late by, and what any process takes, besides the budget.
SLACK_BYTES = 8 * MIB
# A process before it loads anything, its program's pages and page tables included.
PROCESS_BYTES = 32 * MIB
HASH_LIMIT_BYTES = 96 * MIB
PAGE_CACHE_LIMIT_BYTES = 64 * MIB


# ---- the page cache ---------------------------------------------------------------------------------------------

def resident_bytes(path):
    """Bytes of a file that the page cache holds. Right for the file's owner and for root only."""
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as map:
        states = (ctypes.c_ubyte * ((size + 4095) // 4096))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(map))
        status = ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), states)
        gc.collect()  # lets go of the mapping
        assert status == 0, "mincore failed"
        return 4096 * sum(state & 1 for state in bytes(states))


def evict(path):
    """Drops a file from the page cache; what is dirty goes to the disk first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(path):
    """Reads a file until nearly all of it is in the page cache, as far as the system keeps it."""
    for _ in range(3):
        if resident_bytes(path) >= 0.99 * os.path.getsize(path): return
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24): pass


# ---- the program, and control groups ----------------------------------------------------------------------------

class NoGroups(Exception):
    """No control group with a memory limit can be made here."""


def new_group(limit_bytes):
    """A fresh memory control group with a limit, version 1 or 2: its folder."""
    reasons = []
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = pathlib.Path(root) / f"unladen-budgets-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            reasons.append(str(error))
            continue
        try:
            (folder / limit).write_text(str(limit_bytes))
            swap = folder / ("memory.swap.max" if limit == "memory.max" else "memory.memsw.limit_in_bytes")
            if swap.exists(): swap.write_text("0" if limit == "memory.max" else str(limit_bytes))
            return folder
        except OSError as error:
            reasons.append(str(error))
            folder.rmdir()
    raise NoGroups("; ".join(reasons))


def unladen(*words, limit_bytes=None):
    """Runs the program, in a control group of its own if there is a limit. Returns exit code, output and errors."""
    group = new_group(limit_bytes) if limit_bytes else None
    enter = (lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None
    try:
        return subprocess.run([UNLADEN, *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, text=True, preexec_fn=enter, timeout=600)
    finally:
        if group: group.rmdir()


def unladen_json(*words):
    done = unladen(*words, "--json")
    if done.returncode: sys.exit(f"unladen {' '.join(map(str, words))}: {done.stderr}")
    return json.loads(done.stdout)


# ---- checks -----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Check:
    """A promise, whether it was kept, and the figures."""
    promise: str
    is_kept: bool
    figures: str

    def __str__(self):
        return f"{'PASS' if self.is_kept else 'FAIL'}: {self.promise} ({self.figures})"


def mib(n_bytes): return f"{n_bytes / MIB:.2f} MiB"


def weights_bytes(path, *how):
    """What the weights take in memory, by the plan."""
    return unladen_json("load", path, "--strategy", "stream", *how)["weights_bytes"]


# ---- checkpoints ------------------------------------------------------------------------------------------------

def gpt2(folder, size):
    path = folder / f"gpt2-{size}.pth"
    if not path.exists():
        done = unladen("gpt2", "save", path, "--size", size)
        if done.returncode: sys.exit(done.stderr)
    return path


def transposed(folder, n_matrices):
    """Matrices of 64 MiB that all lie transposed in the file."""
    path = folder / f"transposed-{n_matrices}.pth"
    if not path.exists():
        import torch
        torch.manual_seed(1)
        torch.save({f"layers.{index}.weight": torch.randn(4096, 4096).t() for index in range(n_matrices)}, path)
    return path


# ---- loads within budgets ---------------------------------------------------------------------------------------

def loads(cases, n_rounds):
    """Loads every case with every budget, n_rounds times: (case, budget in MiB) -> rows of `unladen load`."""
    jobs = [(name, budget) for name in cases for budget in BUDGETS_MIB]
    rows = collections.defaultdict(list)
    for number in range(n_rounds):
        first = number * len(jobs) // n_rounds
        for name, budget in jobs[first:] + jobs[:first]:
            path, *how = cases[name]
            warm(path)
            rows[name, budget].append(unladen_json("load", path, "--strategy", "stream", "--host-budget", f"{budget}MiB", *how))
    return rows


def report_loads(rows):
    print("\n| checkpoint | budget MiB | load s, median (min-max) | overhead MiB, worst | predicted MiB | speed to 512 MiB | read |")
    print("|---|---|---|---|---|---|---|")
    checks = []
    for (name, budget), got in rows.items():
        seconds = [row["load_s"] for row in got]
        pairs = [(row["host_peak_anon_bytes"] - row["weights_bytes"], row["predicted_host_peak_anon_bytes"] - row["weights_bytes"]) for row in got]
        worst = max(measured for measured, _ in pairs)
        ratio = statistics.median(most["load_s"] / row["load_s"] for row, most in zip(got, rows[name, BUDGETS_MIB[-1]]))
        io = "/".join(sorted({row["io"] for row in got}))
        print(f"| {name} | {budget} | {statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) | {worst / MIB:.2f} "
              f"| {max(predicted for _, predicted in pairs) / MIB:.2f} | {ratio:.2f} | {io} |")
        what = f"{name}, {budget} MiB"
        allowed = max(2 * MIB, 0.05 * budget * MIB)
        under = max(measured - predicted for measured, predicted in pairs)
        over = max(predicted - measured for measured, predicted in pairs)
        checks += [
            Check(f"{what}: measured overhead is within the budget", worst <= budget * MIB + SLACK_BYTES, f"{mib(worst)}"),
            Check(f"{what}: the prediction is not under what was measured", under <= 0, f"at most {mib(-under)} over"),
            Check(f"{what}: the prediction is over by at most {mib(allowed)}", over <= allowed, f"{mib(over)}"),
        ]
        if budget == 16: checks.append(Check(f"{what}: at least 0.9 of the speed with 512 MiB", ratio >= 0.9, f"{ratio:.2f}"))
    print()
    return checks


# ---- proofs by control groups -----------------------------------------------------------------------------------

def check_load_finishes(path, budget_bytes=16 * MIB):
    """In a group of the weights, their page tables, the budget and a process, a load finishes, warm and cold."""
    weights = weights_bytes(path)
    limit = weights + weights // 512 + budget_bytes + PROCESS_BYTES
    for state, prepare in (("warm", warm), ("cold", evict)):
        prepare(path)
        done = unladen("load", path, "--strategy", "stream", "--host-budget", budget_bytes, "--json", limit_bytes=limit)
        yield Check(f"a {state} load finishes in a group of {mib(limit)}", done.returncode == 0, f"exit {done.returncode} {done.stderr.strip()[:200]}")


def check_load_refuses(path):
    """In a group smaller than the weights, a load says so before it reads, and is not killed."""
    evict(path)
    limit = weights_bytes(path) * 3 // 4
    evict(path)
    done = unladen("load", path, "--strategy", "stream", limit_bytes=limit)
    is_said = "free memory" in done.stderr and "hint:" in done.stderr
    # A load that is killed says nothing.
    yield Check(f"a load refuses a group of {mib(limit)}", done.returncode == 1 and is_said, f"exit {done.returncode} {done.stderr.strip()[:200]}")
    read = resident_bytes(path)
    yield Check("and has read headers only", read <= PAGE_CACHE_LIMIT_BYTES, f"{mib(read)} in the page cache")


def check_hash(path):
    """A hash of everything fits into a small group, and leaves the page cache as it was."""
    evict(path)
    done = unladen("inspect", path, "--hash", "sha256", limit_bytes=HASH_LIMIT_BYTES)
    yield Check(f"`inspect --hash` finishes in a group of {mib(HASH_LIMIT_BYTES)}", done.returncode == 0, f"exit {done.returncode} {done.stderr.strip()[-200:]}")
    evict(path)
    before = resident_bytes(path)
    done = unladen("inspect", path, "--hash", "sha256")
    left = resident_bytes(path) - before
    yield Check("without a limit it leaves at most 64 MiB in the page cache", done.returncode == 0 and left <= PAGE_CACHE_LIMIT_BYTES, mib(left))


def check_forward(path):
    """A read-only forward pass runs on the file's own pages where a quarter of them fits, with the same logits."""
    words = ["gpt2", "forward", path, "--intent", "read-only", "--json"]
    # A quarter of the weights at a time, and enough for the activations and the logits of a small model.
    limit = max(os.path.getsize(path) * 61 // 256, 256 * MIB)
    logits = []
    for limit_bytes in (None, limit):
        # Pages that are there already were charged to somebody else, and would prove nothing.
        evict(path)
        done = unladen(*words, limit_bytes=limit_bytes)
        if done.returncode:
            yield Check(f"a forward pass finishes {'in a group of ' + mib(limit_bytes) if limit_bytes else 'without a limit'}", False, f"exit {done.returncode} {done.stderr.strip()[:200]}")
            return
        logits.append(json.loads(done.stdout)["logits"])
    yield Check(f"a read-only forward pass in a group of {mib(limit)} has the same logits", logits[0] == logits[1], f"{len(logits[0])} logits")


CGROUP_CHECKS = [check_load_finishes, check_load_refuses, check_hash, check_forward]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", default="xl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--skip-loads", action="store_true")
    parser.add_argument("--skip-cgroups", action="store_true")
    args = parser.parse_args()
    size, n_rounds, n_matrices = ("small", 3, 4) if args.quick else (args.size, args.rounds, 32)
    args.folder.mkdir(parents=True, exist_ok=True)
    model = gpt2(args.folder, size)
    checks = []
    if not args.skip_loads:
        cases = {f"gpt2-{size}": (model,), f"{n_matrices} transposed": (transposed(args.folder, n_matrices),), f"gpt2-{size} as bf16": (model, "--dtype", "bf16")}
        checks += report_loads(loads(cases, n_rounds))
    if not args.skip_cgroups:
        try:
            for check in CGROUP_CHECKS: checks += check(model)
        except NoGroups as reason:
            checks.append(Check("control groups", False, f"none can be made: {reason}"))
    for check in checks: print(check)
    sys.exit(any(not check.is_kept for check in checks))


if __name__ == "__main__":
    main()
