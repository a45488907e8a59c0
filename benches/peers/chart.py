"""Draws a bar chart of the results of gpu_attention.py: `python chart.py RESULTS.json CHART.svg`
(needs matplotlib)."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# The calls from padded tensors to a padded tensor.
SHOWN = ["ours", "ours, metadata on device", "pack + fa3 + scatter", "pack + fa2 + scatter", "sdpa, default"]
COLOURS = ["#0b6e4f", "#7fb69e", "#c05746", "#e09f7d", "#4a5899"]


def main(results, chart):
    report = json.loads(pathlib.Path(results).read_text())
    workloads = report["workloads"]
    # Makes the output reproducible.
    matplotlib.rcParams["svg.hashsalt"] = "varlen-fa"
    figure, axis = plt.subplots(figsize=(9, 0.9 * len(workloads) + 1.2))
    height = 0.85 / len(SHOWN)
    for at, (method, colour) in enumerate(zip(SHOWN, COLOURS)):
        places, lengths = [], []
        for row, workload in enumerate(workloads):
            if method in workload["methods"]:
                places.append(row + (at - len(SHOWN) / 2 + 0.5) * height)
                lengths.append(workload["methods"][method]["median_ms"] / workload["methods"]["ours"]["median_ms"])
        bars = axis.barh(places, lengths, height, color=colour, label=method)
        axis.bar_label(bars, [f"{length:.2f}" for length in lengths], fontsize=6, padding=2)
    axis.set_yticks(range(len(workloads)), [workload["name"] for workload in workloads])
    axis.invert_yaxis()
    axis.set_xlabel(f"time relative to ours (less is better); {report['dtype']}, {report['device']}")
    axis.axvline(1, color="black", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(chart, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
