"""Pictures of slice maps. Colours are told apart by lightness too (viridis, cividis, and grey to orange for the
status)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lipcore.regions.coverage_result import CoverageResult

_STATUS = ("train", "combination", "uncovered")
_STATUS_COLORS = ("#003f5c", "#56b4e9", "#f5e6c8")


class Drawable(Protocol):
    """Numbers to draw: those of a SliceMap, which knows how to draw itself and so stands above this file."""

    @property
    def s(self) -> NDArray[np.float64]: ...
    @property
    def t(self) -> NDArray[np.float64]: ...
    @property
    def output(self) -> NDArray[np.float64]: ...
    @property
    def local_lipschitz(self) -> NDArray[np.float64]: ...
    @property
    def regions(self) -> NDArray[np.int64] | None: ...
    @property
    def target(self) -> NDArray[np.float64] | None: ...
    @property
    def coverage(self) -> CoverageResult | None: ...
    @property
    def points(self) -> NDArray[np.float64] | None: ...


def draw(found: Drawable, path: str | Path | None, title: str) -> Any:
    """Draw one row of panels, in the order of the paper's Figure 6."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawing needs matplotlib; run: pip install matplotlib") from None
    panels = _panels(found)
    figure = Figure(figsize=(3.6 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    box = (*_edges(found.s), *_edges(found.t))
    for axis, (name, values, options, note) in zip(axes, panels, strict=True):
        image = axis.imshow(values, origin="lower", extent=box, aspect="auto", interpolation="nearest", **options)
        if note == "bar":
            figure.colorbar(image, ax=axis, shrink=0.85)
        elif note:
            axis.set_xlabel(note)
        if found.points is not None:
            axis.scatter(*found.points.T, s=7, c="white", edgecolors="black", linewidths=0.5)
        axis.set_title(name, fontsize=10)
        axis.set(xlim=box[:2], ylim=box[2:])
    if title:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _edges(centres: NDArray[np.float64]) -> tuple[float, float]:
    """Compute the edges of pixels whose centres are the grid points: half a step is left beyond the first and the
    last."""
    half = (centres[1] - centres[0]) / 2
    return float(centres[0] - half), float(centres[-1] + half)


def _panels(found: Drawable) -> list[tuple[str, Any, dict[str, Any], str]]:
    panels: list[tuple[str, Any, dict[str, Any], str]] = []
    scale = [values for values in (found.target, found.output) if values is not None]
    same = {"vmin": min(v.min() for v in scale), "vmax": max(v.max() for v in scale), "cmap": "cividis"}
    if found.target is not None:
        panels.append(("target", found.target, same, "bar"))
    panels.append(("output", found.output, same, "bar"))
    if found.regions is not None:
        order = np.random.default_rng(0).permutation(int(found.regions.max()) + 1)
        count = f"{len(order)} regions seen"
        panels.append(("linear regions", order[found.regions], {"cmap": "cividis"}, count))
    top = float(found.local_lipschitz.max())
    shown: dict[str, Any] = {"cmap": "viridis", "vmin": 0.0, "vmax": top}
    panels.append(("local Lipschitz constant (exact)", found.local_lipschitz, shown, "bar"))
    if found.coverage is not None:
        from matplotlib.colors import ListedColormap

        square = found.local_lipschitz.shape
        number = np.select([found.coverage.status == name for name in _STATUS], range(3)).reshape(square)
        colors = {"cmap": ListedColormap(_STATUS_COLORS), "vmin": -0.5, "vmax": 2.5}
        shares = ", ".join(f"{name} {np.mean(found.coverage.status == name):.0%}" for name in _STATUS)
        panels.append(("coverage (dark to light)", number, colors, shares))
        bound = np.where(np.isfinite(found.coverage.bound), found.coverage.bound, np.nan).reshape(square)
        if np.isfinite(bound).any():
            panels.append(("bound of Theorem 2 (white: none)", bound, shown | {"vmax": np.nanmax(bound)}, "bar"))
    return panels
