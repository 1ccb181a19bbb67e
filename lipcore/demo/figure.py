"""figure.png: a row per task; training loss, normalised length per epoch, test loss; green to red as it gets harder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogFormatterSciNotation

from lipcore.demo.runs import TaskResult

# Hue goes from green to red, lightness falls with it, and every level has its own marker: no two levels are told apart
# by green against red alone.
_COLORS = ("#4db35e", "#c9a100", "#e2671b", "#9c0f1f")
_MARKERS = ("o", "s", "^", "D")
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
_CAPTION = (
    "Normalised length per epoch: (1/N) Σ ‖∂L/∂u‖ / |∂L/∂ŷ| over the N training samples as visited; u: the first "
    "layer's output before its activation; ŷ: the {outputs}.\n"
    "Thick: mean over seeds ({seeds}); thin: single seeds. Training loss: mean over the epoch.{quick}"
)


def draw(results: list[TaskResult], path: Path, *, quick: bool) -> None:
    """Draw all rows and save them as a PNG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 7.9), layout=ConstrainedLayoutEngine(w_pad=0.1))
        parts: Any = figure.subfigures(len(results) + 1, 1, height_ratios=[1.0] * len(results) + [0.13])
        for result, part in zip(results, parts, strict=False):
            _draw_row(part, result)
        parts[-1].text(0.012, 0.5, _caption(results, quick), va="center", fontsize=9, color="#444444")
        figure.savefig(path, dpi=130)


def _draw_row(part: Any, result: TaskResult) -> None:
    task = result.task
    part.suptitle(task.title, fontsize=13, fontweight="bold", x=0.012, ha="left")
    left, middle, right = part.subplots(1, 3)
    _draw_panel(left, result, "train_loss")
    _draw_panel(middle, result, "normalized_length")
    _draw_panel(right, result, "test_loss")
    left.set(title="Training loss", ylabel=task.loss)
    middle.set(title=f"Normalised length per epoch, of the {task.output}", ylabel=f"{task.output} per unit of u")
    right.set(title="Test loss", ylabel=task.loss)
    for axis in (left, right):
        axis.set_yscale("log")
        # Between powers of ten where these are less than two, as a single label tells no scale.
        axis.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 0.5)))
    middle.set_ylim(bottom=0)
    lines, labels = left.get_legend_handles_labels()
    labels[0] = f"{task.difficulty}:  {labels[0]}"
    part.legend(lines, labels, loc="upper right", ncols=len(labels), frameon=False, borderaxespad=0.2)


def _draw_panel(axis: Any, result: TaskResult, values: str) -> None:
    epochs = np.arange(1, result.task.epochs + 1)
    for i, level in enumerate(result.task.levels):
        curves = np.array([getattr(run, values) for run in result.at(level)])
        axis.plot(epochs, curves.T, color=_COLORS[i], linewidth=0.7, alpha=0.4)
        axis.plot(
            epochs,
            curves.mean(axis=0),
            label=f"{level:g}",
            color=_COLORS[i],
            linewidth=2.2,
            marker=_MARKERS[i],
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.7,
            markevery=_every(len(epochs), i),
            zorder=3 + i,
        )
    axis.set_xlabel("epoch")


def _every(epochs: int, i: int) -> tuple[int, int]:
    """Return the places of about eight markers, shifted from level to level."""
    step = max(1, epochs // 8)
    return (i * step // len(_COLORS), step)


def _caption(results: list[TaskResult], quick: bool) -> str:
    seeds = ", ".join(f"{result.task.seeds} {result.task.name}" for result in results)
    outputs = " (first row), the ".join(result.task.output for result in results)
    return _CAPTION.format(
        outputs=f"{outputs} (second row)",
        seeds=seeds,
        quick=" A --quick run: too short for any order." if quick else "",
    )
