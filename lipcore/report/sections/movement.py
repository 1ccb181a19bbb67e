"""Where the parameters went: the places that changed most, and how straight the way was."""

from __future__ import annotations

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.facts import Facts
from lipcore.report.html import Html, Table, name_of, number, tag
from lipcore.report.plots import Plots
from lipcore.report.remedies import remedy_of
from lipcore.report.section import Figure, Made, Missing, Section, with_metric

_MOST = 10
_PATHS = ("path_length", "chord_length")


def most_changed(facts: Facts, plots: Plots) -> Made:
    """Show the ten places that changed most, against their own size."""
    windows = facts.windows
    weights = windows.get("trajectory", "weight_norm", "last")
    distance = windows.get("trajectory", "distance", "last")
    path = next((found for name in _PATHS if (found := windows.get("trajectory", name, "cumulative"))), None)
    moved, what = (distance, "distance from the start") if distance is not None else (path, "length of the way")
    if weights is None or moved is None:
        remedy = with_metric("Trajectory()", ", and let a window close")
        needed = ["weight_norm"] * (weights is None) + ["path_length"] * (moved is None)
        return Missing("Places that changed most", remedy_of(facts, "trajectory", needed, remedy))
    rows = []
    ratios = facts.ratios
    for place, column in _places(moved):
        if place not in weights.places:
            continue
        first, last = weights.first_and_last(weights.places.index(place))
        _, far = moved.first_and_last(column)
        at = ratios.step_of_greatest(ratios.places.index(place)) if ratios and place in ratios.places else -1
        rows.append((far / first if first > 0 else np.nan, place, far, first, last, at))
    rows.sort(key=lambda row: -row[0] if np.isfinite(row[0]) else np.inf)
    most = max((row[0] for row in rows if np.isfinite(row[0])), default=1.0)
    cells = [
        (name_of(place), _bar(share, most), number(far), number(first), number(last), f"{at:,}" if at >= 0 else "")
        for share, place, far, first, last, at in rows
    ]
    heads = (
        "place",
        f"{what} over first weight norm",
        what,
        "first weight norm",
        "last weight norm",
        "largest update at step",
    )
    said: list[object] = []
    if rows and np.isfinite(rows[0][0]):
        top, low = rows[0], rows[-1]
        said = [
            name_of(top[1]),
            f" changed most: its {what} is {number(top[0])} times its weight norm in the first window",
        ]
        said += (
            [", ", name_of(low[1]), f" least ({number(low[0])})."] if len(rows) > 1 and np.isfinite(low[0]) else ["."]
        )
    return Section(
        "changed", "The ten places that changed most", [tag("span", *said)], tables=[Table(heads, cells, most=_MOST)]
    )


def way(facts: Facts, plots: Plots) -> Made:
    """Show distance, path length and directness of all parameters together."""
    windows = facts.windows
    path = next((found for name in _PATHS if (found := windows.get("trajectory", name, "cumulative"))), None)
    distance, directness = (windows.get("trajectory", name, "last") for name in ("distance", "directness"))
    lines = [(name, line) for name, line in (("distance", distance), ("path length", path)) if line is not None]
    lines = [(name, line) for name, line in lines if "total" in line.places]
    if not lines:
        remedy = with_metric('Trajectory(mode="exact")', ', or mode="sketch"')
        return Missing("Distance and path", remedy_of(facts, "trajectory", ["path_length"], remedy))
    figures = []
    plots.lines("way", [(name, line, line.places.index("total")) for name, line in lines], "norm")
    said = "; ".join(
        f"{name} {number(line.first_and_last(line.places.index('total'))[1])} at the end" for name, line in lines
    )
    figures.append(Figure("way", "Distance from the start, and length of the way", f"All parameters: {said}."))
    if directness is not None and "total" in directness.places:
        column = directness.places.index("total")
        plots.lines("directness", [("directness", directness, column)], "directness", height=110, log=False)
        end = directness.first_and_last(column)[1]
        said = "still on its way" if end > 0.5 else "parameters go back and forth more than on" if end < 0.1 else ""
        what = "Distance over path length: near 1 on a straight way, near 0 where parameters jitter"
        figures.append(
            Figure("directness", "Directness", f"{what}. At the end {number(end)}{': ' + said if said else ''}.")
        )
    return Section("way", "Distance, path and directness", figures=figures)


def _places(numbers: Binned) -> list[tuple[str, int]]:
    level = "tensor" if "tensor" in numbers.levels else "group"
    where = numbers.where(level) or numbers.where("total")
    return [(numbers.places[i], i) for i in where]


def _bar(share: float, most: float) -> Html:
    width = 100 * share / most if np.isfinite(share) and most > 0 else 0
    return tag(
        "span", tag("span", style=f"width:{width:.1f}%", class_="bar"), tag("span", number(share)), class_="barred"
    )
