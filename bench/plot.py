#!/usr/bin/env python3
"""Draws what `peers.py --out FILE.json` measured: a bar of seconds for each loader, with the memory that it took beside it.

usage: plot.py OUT.png TITLE NAME=FILE.json...
One panel for each file. Rows without a load (mappings that nobody touched) are left out; a dotted line marks the median of
the round's least plain read. Needs: pip install matplotlib
"""
import json
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

UNTOUCHED = {"mmap_assign", "torch_mmap_only", "safetensors_load_file"}


def rows(runs_of):
    """(name, seconds of each round, peak of anonymous memory in GiB), the fastest first."""
    found = []
    for name, runs in runs_of.items():
        if name in UNTOUCHED or name.startswith("limit") or any("error" in run for run in runs):
            continue
        found.append((name, [run["load_s"] for run in runs], statistics.median(run["anon"] for run in runs) / 2**30))
    return sorted(found, key=lambda row: statistics.median(row[1]))


def limit_s(runs_of):
    limits = [[run["load_s"] for run in runs] for name, runs in runs_of.items() if name.startswith("limit")]
    return statistics.median(min(of_round) for of_round in zip(*limits)) if limits else None


def main():
    out, title, *panels = sys.argv[1:]
    read = {name: json.load(open(path)) for name, path in (panel.split("=", 1) for panel in panels)}
    heights = [len(rows(runs_of)) for runs_of in read.values()]
    figure, axes = plt.subplots(len(read), 1, figsize=(8, 0.32 * sum(heights) + 1.1 * len(read)), squeeze=False, height_ratios=heights)
    for axis, (name, runs_of) in zip(axes[:, 0], read.items()):
        for place, (loader, seconds, gib) in enumerate(rows(runs_of)):
            median = statistics.median(seconds)
            color = "tab:orange" if loader.startswith("unladen") else "tab:blue"
            axis.barh(place, median, color=color, alpha=0.8)
            axis.plot([min(seconds), max(seconds)], [place, place], color="black", linewidth=0.8)
            axis.annotate(f"{median:.1f} s, {gib:.2f} GiB", (max(seconds), place), xytext=(4, -3), textcoords="offset points", fontsize=8)
        limit = limit_s(runs_of)
        if limit is not None:
            axis.axvline(limit, color="grey", linestyle=":", linewidth=1, label="least plain read")
            axis.legend(loc="upper right", fontsize=8)
        axis.set_yticks(range(len(rows(runs_of))), [loader for loader, *_ in rows(runs_of)], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.25 * max(max(seconds) for _, seconds, _ in rows(runs_of)))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("seconds of the load: median (bar), least to most (line); beside it the peak of anonymous memory", fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


main()
