"""Draws the results: faults found and false alarms of every detector, with intervals, and which fault by which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from spikes.detectors import PRACTICE, SHIPPED
from spikes.evaluate import interval
from spikes.faults import FAULTS

# Okabe and Ito's colours, told apart with any colour vision; the markers tell them apart without.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
#: The detectors of the map, in its order.
SHOWN = (
    SHIPPED,
    "loss + update norm + gradient norm per group",
    "loss + global gradient norm",
    f"{PRACTICE}, as shipped",
    "loss",
    "global gradient norm",
    "update norm per group",
    "gradient norm per group",
    "RMS_t per parameter",
    "activation kurtosis",
    "CUSUM of the loss",
)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the figure of a results file."""
    tasks = list(found["models"])
    names = sorted(found["totals"], key=lambda name: found["totals"][name]["found"] / found["totals"][name]["runs"])
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17, 7), width_ratios=(1.2, 1, 1.5), layout="constrained"
    )
    shares = {task: _shares(found["faults"][task]) for task in tasks}
    rates = {
        task: {name: (row["per_1000"], row["low"], row["high"]) for name, row in found["false_alarms"][task].items()}
        for task in tasks
    }
    _dots(left, names, [shares[task] for task in tasks], tasks)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_xlim(0, 1)
    left.set_title("share of injected faults found", fontsize=9)
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(tasks), frameon=False)
    _dots(middle, names, [rates[task] for task in tasks], tasks)
    middle.set_yticks(range(len(names)), [])
    middle.axvline(found["budget_per_1000"], color="black", linewidth=0.8, linestyle=":")
    middle.set_title("alarms per 1000 steps without a fault, other seeds", fontsize=9)
    _map(right, found)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _shares(faults: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return the share that each detector found of one model's faults, without the control, and its interval."""
    sums: dict[str, list[int]] = {}
    for fault in FAULTS[:-1]:
        for name, row in faults[fault.name].items():
            each = sums.setdefault(name, [0, 0])
            each[0] += row["found"]
            each[1] += row["runs"]
    return {name: (hits / runs, *interval(hits, runs)) for name, (hits, runs) in sums.items()}


def _dots(
    axes: Axes,
    names: Sequence[str],
    numbers: Sequence[Mapping[str, tuple[float, float, float]]],
    labels: Sequence[str],
) -> None:
    for i, (rows, label) in enumerate(zip(numbers, labels, strict=True)):
        color, marker = _STYLES[i]
        there = [(y + 0.22 * (i - 1), rows[name]) for y, name in enumerate(names) if name in rows]
        at = [y for y, _ in there]
        axes.plot([row[0] for _, row in there], at, marker, color=color, markersize=4, label=label)
        axes.hlines(at, [row[1] for _, row in there], [row[2] for _, row in there], color=color, linewidth=1)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)


def _map(axes: Axes, found: Mapping[str, Any]) -> None:
    """Draw which share of each fault each of some detectors found, over all models."""
    shares = np.full((len(SHOWN), len(FAULTS)), np.nan)
    for column, fault in enumerate(FAULTS):
        for line, name in enumerate(SHOWN):
            rows = [faults[fault.name][name] for faults in found["faults"].values() if name in faults[fault.name]]
            if rows:
                shares[line, column] = sum(row["found"] for row in rows) / sum(row["runs"] for row in rows)
                dark = shares[line, column] > 0.6
                text = f"{100 * shares[line, column]:.0f}"
                axes.text(column, line, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.imshow(shares, cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(FAULTS)), [fault.name for fault in FAULTS], rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(SHOWN)), SHOWN, fontsize=7)
    axes.set_title("found, in %, by fault; all models", fontsize=9)
