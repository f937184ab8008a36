"""Draws what `peers.py --out FILE.json` measured: seconds of a load against the memory that it took.

usage: plot.py OUT.png TITLE WARM.json [COLD.json]
Rows without a load (mappings that nobody touched) are left out. Needs: pip install matplotlib
"""
import json
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

UNTOUCHED = {"mmap_assign", "torch_mmap_only", "safetensors_load_file"}


def rows(path):
    for name, runs in json.load(open(path)).items():
        runs = [run for run in runs if "error" not in run]
        if runs and name not in UNTOUCHED and not name.startswith("limit"):
            seconds = [run["load_s"] for run in runs]
            yield name, statistics.median(seconds), min(seconds), max(seconds), statistics.median(run["anon"] for run in runs) / 2**30


def main():
    out, title, *files = sys.argv[1:]
    figure, axes = plt.subplots(1, len(files), figsize=(6.5 * len(files), 5), squeeze=False, sharey=True)
    for axis, path in zip(axes[0], files):
        limit = [run["load_s"] for name, runs in json.load(open(path)).items() if name.startswith("limit") for run in [min(runs, key=lambda it: it.get("load_s", 1e9))]]
        if limit:
            axis.axvline(min(limit), color="grey", linestyle=":", linewidth=1)
            axis.annotate("least plain read", (min(limit), 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, color="grey")
        for number, (name, median, least, most, gib) in enumerate(rows(path)):
            ours = name.startswith("unladen")
            color = "tab:orange" if ours else "tab:blue"
            axis.errorbar(median, gib, xerr=[[median - least], [most - median]], fmt="o", color=color, capsize=2, linewidth=0.8)
            axis.annotate(name, (median, gib), textcoords="offset points", xytext=(4, 5 if number % 2 else -12), fontsize=8, color=color, fontweight="bold" if ours else "normal")
        axis.set_xscale("log")
        axis.set_xlabel("seconds of the load (median, least to most)")
        axis.set_title(path.rsplit("/", 1)[-1].removesuffix(".json"))
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("peak of anonymous memory, GiB")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(out, dpi=120)


main()
