#!/usr/bin/env python3
"""The peers and our own command side by side, each row a fresh process, all measured the same way from outside.

usage: peers.py FOLDER SIZE [--cold] [--limit BYTES] [--only a,b] [--runs N] [--device cpu|cuda] [--digest]
                [--cmd 'NAME=COMMAND']... [--out FILE.json]
FOLDER holds what `gpt2_torch.py SIZE FOLDER` wrote. COMMAND may hold {pth}, {st} and {params}; it prints one JSON line with
"load_s" (seconds of the load alone) on stdout, and "digest" if it computed one (outside load_s).

Rows run in rounds, in an order rotated by one each round, so that a drifting machine and a row's place hit all alike.
Before a warm row its file is read until the kernel says that at least 99 % is resident; before a cold row the page cache is
dropped (root). Columns: median, least and most load seconds, and the median of
the per-round ratios to the least of the rows whose names begin with "limit" (imports and process start excluded; "naive", "sequential"
include the random initialisation that the notebook's cells pay); CPU seconds of the whole process; peak anonymous and whole
resident set over the process's state at the start of its load, polled every 2 ms from outside; peak of the process's own
memory cgroup, page cache that it was charged for included; the device's peak. Rows whose tensors are views of a mapping that
nobody touched are marked *: their seconds are not a load. --digest compares what every row loaded, bit by bit.
Needs: pip install torch numpy safetensors runai-model-streamer fastsafetensors (a missing one says so in its row).
"""
import argparse, ctypes, gc, hashlib, json, mmap, os, resource, shlex, statistics, subprocess, sys, threading, time

PEERS = ["naive", "sequential", "meta", "mmap_assign", "mmap_assign_touched", "mmap_copy", "per_tensor", "torch_load",
         "safetensors_load_file", "safetensors_copy", "runai", "fastsafetensors_nogds"]
UNTOUCHED = {"mmap_assign", "torch_mmap_only", "safetensors_load_file"}


# ---- inside a row's process -------------------------------------------------------------------------------------

def child(a):
    import torch
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "interop"))
    from gpt2_torch import GPTModel, config
    dev = torch.device(a.device)
    pth, st, pdir = (f"{a.data}/gpt2-{a.size}{s}" for s in (".pth", ".safetensors", "-params"))
    cfg = config(a.size)
    if dev.type == "cuda":
        torch.zeros(1, device=dev)
        torch.cuda.reset_peak_memory_stats()

    def on_meta():
        with torch.device("meta"): return GPTModel(cfg)
    def copy_each(model, source):
        with torch.no_grad():
            for name, target in model.state_dict().items(): target.copy_(source(name))
        return model.state_dict()

    def naive():
        model = GPTModel(cfg).to(dev)
        model.load_state_dict(torch.load(pth, map_location=dev, weights_only=True))
        return model.state_dict()
    def sequential():
        model = GPTModel(cfg).to(dev)
        state = torch.load(pth, map_location="cpu", weights_only=True)
        return copy_each(model, lambda name: state[name].to(dev))
    def meta():
        model = on_meta().to_empty(device=dev)
        state = torch.load(pth, map_location=dev, weights_only=True)
        return copy_each(model, lambda name: state[name])
    def mmap_assign():
        model = on_meta()
        model.load_state_dict(torch.load(pth, map_location=dev, weights_only=True, mmap=True), assign=True)
        return model.state_dict()
    def mmap_assign_touched():
        state = mmap_assign()
        for t in state.values(): t.view(-1)[:: 4096 // t.element_size()].sum()
        return state
    def mmap_copy():
        model = on_meta().to_empty(device=dev)
        state = torch.load(pth, map_location="cpu", weights_only=True, mmap=True)
        return copy_each(model, lambda name: state[name])
    def per_tensor():
        return copy_each(on_meta().to_empty(device=dev), lambda name: torch.load(f"{pdir}/{name}.pt", map_location="cpu", weights_only=True))
    def torch_load():
        return torch.load(pth, map_location=dev, weights_only=True)
    def torch_mmap_only():
        return torch.load(pth, map_location=dev, weights_only=True, mmap=True)
    def safetensors_load_file():
        from safetensors.torch import load_file
        return load_file(st, device=a.device)
    def safetensors_copy():
        from safetensors import safe_open
        with safe_open(st, "pt", device="cpu") as f: return copy_each(on_meta().to_empty(device=dev), f.get_tensor)
    def runai():
        from runai_model_streamer import SafetensorsStreamer
        with SafetensorsStreamer() as s:
            s.stream_file(st)
            return {name: t.clone() if dev.type == "cpu" else t.to(dev) for name, t in s.get_tensors()}
    def fastsafetensors_nogds():
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup
        loader = SafeTensorsFileLoader(SingleGroup(), dev, nogds=True)
        loader.add_filenames({0: [st]})
        buffer = loader.copy_files_to_device()
        child.keep = (loader, buffer)
        return {name: buffer.get_tensor(name) for name in loader.get_keys()}

    load = locals()[a.child]
    if a.child == "runai": import runai_model_streamer
    if a.child.startswith("safetensors"): import safetensors.torch
    if a.child.startswith("fastsafe"): import fastsafetensors
    gc.collect()
    print("READY", flush=True); sys.stdin.readline()
    start = time.perf_counter()
    state = load()
    if dev.type == "cuda": torch.cuda.synchronize()
    load_s = time.perf_counter() - start
    print("DONE", flush=True); sys.stdin.readline()
    row = dict(load_s=load_s, tensors=len(state), device_peak_bytes=torch.cuda.max_memory_allocated() if dev.type == "cuda" else -1)
    if a.digest:
        row["digest"] = digest((name, str(t.dtype).removeprefix("torch."), list(t.shape), t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()) for name, t in state.items())
    print(json.dumps(row), flush=True)


def digest(tensors):
    """sha256 over the sorted lines "name dtype shape sha256-of-contiguous-little-endian-bytes", shape as [2,3]."""
    lines = sorted(f"{name} {dtype} {json.dumps(shape, separators=(',', ':'))} {hashlib.sha256(memoryview(data)).hexdigest()}\n" for name, dtype, shape, data in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---- outside ----------------------------------------------------------------------------------------------------

def resident(path):
    """Share of a file that the page cache holds. Right for the file's owner and root only."""
    size = os.path.getsize(path)
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as m:
        pages = (size + 4095) // 4096
        vec = (ctypes.c_ubyte * pages)()
        at = ctypes.addressof(ctypes.c_char.from_buffer(m))
        ok = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), vec)
        gc.collect()
        return sum(b & 1 for b in bytes(vec)) / pages if ok == 0 else -1.0


def warm(path):
    for path in [path] if os.path.isfile(path) else [f"{path}/{n}" for n in os.listdir(path)]:
        for _ in range(4):
            if os.path.getsize(path) == 0 or resident(path) >= 0.99: break
            with open(path, "rb", buffering=0) as f:
                while f.read(1 << 24): pass


def cgroup(limit):
    """A fresh memory cgroup, v1 or v2: (folder, peak file), or None where there is none to be had."""
    for root, peak, cap in (("/sys/fs/cgroup/memory", "memory.max_usage_in_bytes", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.peak", "memory.max")):
        path = f"{root}/peers-{os.getpid()}"
        try:
            if os.path.isdir(path): os.rmdir(path)
            os.mkdir(path)
            if not os.path.exists(f"{path}/{peak}"): os.rmdir(path); continue
            if limit: open(f"{path}/{cap}", "w").write(str(limit))
            return path, f"{path}/{peak}"
        except OSError:
            continue


def status(pid):
    try:
        with open(f"/proc/{pid}/status") as f: lines = dict(l.split(":", 1) for l in f if l[:3] in ("Rss", "VmR"))
        kb = lambda key: int(lines.get(key, "0 kB").split()[0]) * 1024
        return kb("RssAnon") + kb("RssShmem"), kb("VmRSS")
    except (OSError, ValueError):
        return 0, 0


def run(a, name, command):
    files = {"pth": f"{a.data}/gpt2-{a.size}.pth", "st": f"{a.data}/gpt2-{a.size}.safetensors", "params": f"{a.data}/gpt2-{a.size}-params"}
    if a.cold: subprocess.run("sync; echo 3 > /proc/sys/vm/drop_caches", shell=True, check=True)
    else:
        reads_st = "{st}" in command if command else name.startswith(("safetensors", "runai", "fastsafe"))
        warm(files["params"] if name == "per_tensor" or command and "{params}" in command else files["st"] if reads_st else files["pth"])
    group = cgroup(a.limit)
    words = [w.format(**files) for w in shlex.split(command)] if command else [sys.executable, os.path.abspath(__file__), a.data, a.size, "--child", name, "--device", a.device] + ["--digest"] * a.digest
    cpu0 = resource.getrusage(resource.RUSAGE_CHILDREN)
    p = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=(lambda: open(f"{group[0]}/cgroup.procs", "w").write(str(os.getpid()))) if group else None)
    base, peak, over = [0, 0], [0, 0], threading.Event()
    def sample():
        while not over.is_set():
            now = status(p.pid)
            for i in (0, 1): peak[i] = max(peak[i], now[i] - base[i])
            time.sleep(0.002)
    sampler = threading.Thread(target=sample, daemon=True); sampler.start()
    errors = []
    drain = threading.Thread(target=lambda: errors.append(p.stderr.read()), daemon=True); drain.start()
    row, charged = None, -1
    for line in p.stdout:
        line = line.strip()
        if line == "READY":
            base[:] = status(p.pid); peak[:] = 0, 0
            p.stdin.write("\n"); p.stdin.flush()
        elif line == "DONE":
            over.set()
            if group: charged = int(open(group[1]).read())
            p.stdin.write("\n"); p.stdin.flush()
        elif line.startswith("{") and "load_s" in line: row = json.loads(line)
    code = p.wait(); over.set(); sampler.join(); drain.join()
    cpu1 = resource.getrusage(resource.RUSAGE_CHILDREN)
    if group:
        if charged < 0: charged = int(open(group[1]).read())
        try: os.rmdir(group[0])
        except OSError: pass
    if row is None or code:
        return dict(error=f"exit {code}: {(''.join(errors).strip().splitlines() or ['no JSON line with load_s'])[-1][:140]}")
    return dict(load_s=row["load_s"], cpu_s=cpu1.ru_utime + cpu1.ru_stime - cpu0.ru_utime - cpu0.ru_stime, anon=peak[0], rss=peak[1], cgroup=charged,
                device=row.get("device_peak_bytes", -1), tensors=row.get("tensors", 0), digest=row.get("digest", ""))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data"); p.add_argument("size"); p.add_argument("--cold", action="store_true"); p.add_argument("--digest", action="store_true")
    p.add_argument("--limit", type=int, default=0); p.add_argument("--only", default=""); p.add_argument("--runs", type=int, default=1)
    p.add_argument("--device", default="cpu"); p.add_argument("--cmd", action="append", default=[]); p.add_argument("--out", default="")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return child(a)
    jobs = [(n, None) for n in (a.only.split(",") if a.only else PEERS) if n != "none"] + [tuple(c.split("=", 1)) for c in a.cmd]
    rows = {name: [] for name, _ in jobs}
    for i in range(a.runs):
        for name, command in jobs[i % len(jobs):] + jobs[:i % len(jobs)]: rows[name].append(run(a, name, command))
    if a.out: json.dump(rows, open(a.out, "w"), indent=1)
    limits = [got for name, got in rows.items() if name.startswith("limit")]
    def of_limit(got):
        """Median of the ratios within a round to the least row whose name begins with limit."""
        ratios = [g["load_s"] / min(limit[i]["load_s"] for limit in limits) for i, g in enumerate(got)] if limits and not any("error" in g for it in limits for g in it) else []
        return f"{statistics.median(ratios):10.2f}" if ratios else f"{'-':>10}"
    print(f"{'row':24}{'load s':>9}{'min':>8}{'max':>8}{'of limit':>10}{'cpu s':>8}{'anon GiB':>10}{'rss GiB':>9}{'cgroup':>8}{'device':>8}  tensors digest")
    for name, got in rows.items():
        bad = [g for g in got if "error" in g]
        if bad: print(f"{name:24} FAILED {bad[0]['error']}"); continue
        m = lambda k: statistics.median(g[k] for g in got)
        gib = lambda k: f"{m(k) / 2**30:.2f}" if m(k) >= 0 else "-"
        digests = sorted({g["digest"][:12] for g in got})
        print(f"{name + '*' * (name in UNTOUCHED and a.device == 'cpu'):24}{m('load_s'):9.3f}{min(g['load_s'] for g in got):8.2f}{max(g['load_s'] for g in got):8.2f}{of_limit(got)}{m('cpu_s'):8.2f}"
              f"{gib('anon'):>10}{gib('rss'):>9}{gib('cgroup'):>8}{gib('device'):>8}  {got[0]['tensors']} {' '.join(digests)}", flush=True)


main()
