"""How large updates were against the weights, and steps in which nothing moved or something was not finite."""

from __future__ import annotations

from lipcore.report.facts import Facts
from lipcore.report.html import Table, name_of, number
from lipcore.report.plots import Plots
from lipcore.report.remedies import remedy_of
from lipcore.report.section import Figure, Made, Missing, Section, with_metric

_REDUCERS = {"p50": "median of a window", "p99": "99 % quantile", "max": "greatest"}
_STEPS = {
    "unmoved_steps": "steps without a move",
    "nonfinite_steps": "steps with values that are not finite",
    "nonfinite_elements": "elements that were not finite",
}


def update_bands(facts: Facts, plots: Plots) -> Made:
    """Show the distribution of update over weight norm by window, and the counts of troubled steps."""
    windows = facts.windows
    lines = []
    for reducer, words in _REDUCERS.items():
        line = windows.get("trajectory", "update_ratio", reducer)
        if line is not None and "total" in line.places:
            lines.append((words, line, line.places.index("total")))
    if not lines:
        return Missing(
            "Update over weight norm by window",
            remedy_of(facts, "trajectory", ["update_ratio"], with_metric("Trajectory()", ", and let a window close")),
        )
    plots.lines("bands", lines, "update / weight")
    middle = lines[0][1].usual(lines[0][2])
    peak = lines[-1][1].span(lines[-1][2])[2]
    sentence = (
        f"In the middle of the run an update was {number(middle)} times the norm of the weights; the largest "
        f"{number(peak)} times. About 0.001 is a common rule of thumb, not a law: what matters is a change."
    )
    counts = {words: windows.sums.get(("trajectory", name, "sum"), {}) for name, words in _STEPS.items()}
    places = [place for place in dict.fromkeys(p for sums in counts.values() for p in sums) if place != "total"]
    rows = [
        (name_of(place), *(f"{int(sums.get(place, 0)):,}" for sums in counts.values()))
        for place in sorted(places, key=lambda place: -sum(sums.get(place, 0) for sums in counts.values()))
        if any(sums.get(place, 0) for sums in counts.values())
    ]
    said = (
        f"{len(rows)} places had steps without a move or with values that are not finite."
        if rows
        else "In every step every place moved, and everything was finite."
    )
    table = Table(("place", *counts), rows, "Counted over all windows")
    figure = Figure("bands", f"Update over weight norm of {windows.model(facts.covered.stage)}, by window", sentence)
    return Section(
        "updates", "Sizes of updates, and troubled steps", figures=[figure], sentences=[said], tables=[table]
    )
