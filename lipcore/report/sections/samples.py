"""Norms of single samples' gradients, and inner products of these."""

from __future__ import annotations

from lipcore.report.facts import Facts
from lipcore.report.html import Table, name_of, number
from lipcore.report.plots import Plots
from lipcore.report.section import Figure, Made, Missing, Section, with_metric

_METRIC = "per_sample_grad_norm"
_REDUCERS = {"p50": "median", "p99": "99 % quantile", "max": "greatest"}


def sample_norms(facts: Facts, plots: Plots) -> Made:
    """Show quantiles of the samples' gradient norms by window."""
    lines = []
    for reducer, words in _REDUCERS.items():
        line = facts.windows.get(_METRIC, "norm", reducer)
        if line is not None and "total" in line.places:
            lines.append((words, line, line.places.index("total")))
    if not lines:
        return Missing(
            "Gradient norms of single samples",
            with_metric('PerSampleGradNorms(loss_reduction="auto")'),
        )
    plots.lines("samples", lines, "norm")
    middle, top = lines[0][1].usual(lines[0][2]), lines[-1][1]
    peak = top.span(lines[-1][2])[2]
    sentence = (
        f"A sample's gradient has norm {number(middle)} in the middle; the largest of all was {number(peak)}, "
        f"{number(peak / middle) if middle > 0 else 'many'} times that, in the window up to step "
        f"{int(top.ends[(top.high[:, lines[-1][2]] == peak).argmax()]):,}."
    )
    table = _layers(facts)
    missing = facts.windows.get(_METRIC, "norm", "missing")
    notes = [
        "Which samples they were stands in the metric's .scores while the process lives; of the last steps and around "
        "alarms lipcore postmortem names them, where the loop calls monitor.log_batch()."
    ]
    if missing is not None and "total" in missing.places and missing.span(missing.places.index("total"))[2] > 0:
        notes.append("Of some samples the norm is not known; the windows' notes say why.")
    figure = Figure(
        "samples", "Gradient norm of a sample: median, 99 % quantile and greatest of each window", sentence, table
    )
    dots = _dots(facts)
    return Section("samples", "Single samples", figures=[figure], tables=[dots], notes=notes)


def _layers(facts: Facts) -> Table:
    """Return what each layer has of a sample's gradient."""
    middle, top = (facts.windows.get(_METRIC, "norm", reducer) for reducer in ("p50", "max"))
    if middle is None or top is None:
        return Table((), ())
    rows = []
    for column, place in enumerate(middle.places):
        if place in top.places and place != "total":
            at = top.places.index(place)
            rows.append((middle.usual(column), place, top.span(at)[2], top.step_of_greatest(at)))
    rows.sort(key=lambda row: -row[0] if row[0] == row[0] else 1.0)
    cells = [(name_of(place), number(usual), number(most), f"{step:,}") for usual, place, most, step in rows]
    return Table(("layer", "median", "greatest", "in the window to step"), cells)


def _dots(facts: Facts) -> Table:
    """Return the inner products with gradients that were given, in total."""
    rows = []
    for quantity in facts.windows.metrics.get("per_sample_grad_dot", []):
        found = [facts.windows.get("per_sample_grad_dot", quantity, reducer) for reducer in ("mean", "min", "max")]
        if all(one is not None and "total" in one.places for one in found):
            spans = [one.span(one.places.index("total")) for one in found if one is not None]
            rows.append((quantity, number(spans[0][1]), number(spans[1][0]), number(spans[2][2])))
    return Table(("reference", "mean", "least", "greatest"), rows, "Inner products with the gradients that were given")
