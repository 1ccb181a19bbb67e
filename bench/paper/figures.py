"""Curves of several difficulties: median over seeds, band from the 25th to the 75th percentile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Ordered by lightness as well as hue, with a line style each: told apart without colour vision.
_COLORS = ("#e8c500", "#35b779", "#31688e", "#440154")
_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    label: str  #: of the horizontal axis
    x: np.ndarray  #: [epochs], or [levels, seeds, epochs]: then falling and logarithmic (a training loss)
    values: np.ndarray  #: [levels, seeds, epochs]
    logarithmic: bool = False


def bands(panels: list[Panel], labels: list[str], path: Path) -> None:
    """Draw and save."""
    figure = Figure(figsize=(4.1 * len(panels), 3.7), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for i, label in enumerate(labels):
            x = panel.x if panel.x.ndim == 1 else np.median(panel.x[i], axis=0)
            low, middle, high = np.quantile(panel.values[i], [0.25, 0.5, 0.75], axis=0)
            axis.fill_between(x, low, high, color=_COLORS[i], alpha=0.3, linewidth=0)
            axis.plot(x, middle, color=_COLORS[i], linestyle=_STYLES[i], linewidth=1.8, label=label)
        if panel.logarithmic:
            axis.set_yscale("log")
        if panel.x.ndim > 1:
            axis.set_xscale("log")
            axis.invert_xaxis()
        axis.set(title=panel.title, xlabel=panel.label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def smooth(curves: np.ndarray, width: int = 25) -> np.ndarray:
    """Mean over the last epochs: single ones at batch 1 are noise."""
    total = np.cumsum(np.concatenate([np.zeros((*curves.shape[:-1], 1)), curves], axis=-1), axis=-1)
    ends = np.arange(1, curves.shape[-1] + 1)
    starts = np.maximum(0, ends - width)
    return (total[..., ends] - total[..., starts]) / (ends - starts)
