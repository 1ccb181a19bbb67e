"""Pictures of a recorded run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lipcore.recording.series import Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by colour-blind people too (Okabe and Ito), and by the line's style where there are more.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_MOST = 28  # lines with a colour and style of their own
_WIDE = 600  # columns of a heat map
_UNITS = {"loss": "loss", "lr": "learning rate", "update_ratio": "update / weight", "distance": "norm"}


def line_plot(series: Series, title: str, *, log: bool = True) -> Figure:
    """Draw a series, a line per place; where older steps were folded, with least and greatest value as a band."""
    figure, axis = _figure()
    for i, place in enumerate(series.places):
        color, style = _COLORS[i % len(_COLORS)], _STYLES[i // len(_COLORS) % len(_STYLES)]
        axis.plot(series.steps, series.values[:, i], color=color, linestyle=style, linewidth=1.1, label=place)
        if (series.low[:, i] < series.high[:, i]).any():
            axis.fill_between(series.steps, series.low[:, i], series.high[:, i], color=color, alpha=0.2, linewidth=0)
    _label(axis, series, log=log)
    axis.set_title(title)
    return figure


def heat_map(series: Series, title: str) -> Figure:
    """Draw a series as a map, a row per place and the steps from left to right, on a logarithmic scale of colours;
    several steps in one column are their greatest value."""
    from matplotlib.colors import LogNorm

    keep = [i for i, place in enumerate(series.places) if place != "total" or len(series.places) == 1]
    values = np.where(series.high[:, keep] > 0, series.high[:, keep], np.nan)
    figure, axis = _figure(height=1.2 + 0.28 * max(len(keep), 6))
    if len(series):
        edges = np.unique(np.linspace(0, len(series), min(_WIDE, len(series)) + 1).astype(int))
        cells = np.array([_greatest(values[begin:end]) for begin, end in itertools.pairwise(edges)]).T
        finite = cells[np.isfinite(cells)]
        scale = LogNorm(finite.min(), finite.max()) if len(finite) and finite.min() < finite.max() else None
        # A number is of the steps up to its own: of one, or of a window's.
        before = series.steps[0] - (series.steps[1] - series.steps[0] if len(series) > 1 else 1)
        times = np.append(before, series.steps[edges[1:] - 1])
        drawn = axis.pcolormesh(times, np.arange(len(keep) + 1), cells, norm=scale, cmap="cividis", rasterized=True)
        figure.colorbar(drawn, ax=axis, label=_unit(series.name))
    axis.set_yticks(np.arange(len(keep)) + 0.5, [series.places[i] for i in keep])
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", title=title)
    return figure


def compare_plot(series: Mapping[str, Series], title: str, *, log: bool = True) -> Figure:
    """Draw series of several runs, by the runs' names, in their first place."""
    figure, axis = _figure()
    for number, (run, one) in enumerate(series.items()):
        color, style = _COLORS[number % len(_COLORS)], _STYLES[number % len(_STYLES)]
        axis.plot(one.steps, one.values[:, 0], color=color, linestyle=style, label=run)
        _label(axis, one, log=log)
    axis.set_title(title)
    return figure


def _figure(height: float = 4.0) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9.0, height), layout="constrained")
    return figure, figure.add_subplot()


def _label(axis: Any, series: Series, *, log: bool) -> None:
    axis.set(xlabel="optimizer step", ylabel=_unit(series.name))
    if log and (series.values > 0).any():
        axis.set_yscale("log")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    lines, labels = axis.get_legend_handles_labels()
    if lines:
        axis.legend(
            lines[:_MOST], labels[:_MOST], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8
        )


def _unit(name: str) -> str:
    quantity = name.rpartition("/")[2].partition(".")[0]
    return _UNITS.get(quantity, "norm" if quantity.endswith("norm") else quantity)


def _greatest(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the greatest number of each column, NaN where there is none."""
    found: np.ndarray[Any, Any] = np.where(np.isnan(rows), -np.inf, rows).max(axis=0)
    return np.where(np.isinf(found), np.nan, found)
