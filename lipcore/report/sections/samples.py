"""Norms of single samples' gradients, and inner products of these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.facts import Facts
from lipcore.report.html import Table, count, name_of, number
from lipcore.report.plots import Plots
from lipcore.report.remedies import remedy_of
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
    if not lines and not facts.samples.by:
        remedy = with_metric('PerSampleGradNorms(loss_reduction="auto")')
        return Missing("Gradient norms of single samples", remedy_of(facts, _METRIC, ["norm"], remedy))
    figures = [_quantiles(facts, plots, lines)] if lines else []
    notes = []
    missing = facts.windows.get(_METRIC, "norm", "missing")
    if missing is not None and "total" in missing.places and missing.span(missing.places.index("total"))[2] > 0:
        notes.append("Of some samples the norm is not known; the windows' notes say why.")
    if not facts.samples.by:
        notes.append("Which samples they were is recorded where the loop calls monitor.log_batch().")
    said, tables = _largest(facts)
    return Section("samples", "Single samples", said, figures, [_dots(facts)], tables, notes)


def _quantiles(facts: Facts, plots: Plots, lines: Sequence[tuple[str, Binned, int]]) -> Figure:
    """Return the figure of the norms' quantiles by window."""
    plots.lines("samples", lines, "norm")
    middle, top = lines[0][1].usual(lines[0][2]), lines[-1][1]
    peak = top.span(lines[-1][2])[2]
    sentence = (
        f"A sample's gradient has norm {number(middle)} in the middle; the largest of all was {number(peak)}, "
        f"{number(peak / middle) if middle > 0 else 'many'} times that, in the window up to step "
        f"{int(top.ends[(top.high[:, lines[-1][2]] == peak).argmax()]):,}."
    )
    title = "Gradient norm of a sample: median, 99 % quantile and greatest of each window"
    return Figure("samples", title, sentence, _layers(facts))


def _largest(facts: Facts) -> tuple[list[str], list[Table]]:
    """Return which samples had the largest norms and losses, in the steps that are known."""
    found, tables = facts.samples, []
    for by, samples in found.by.items():
        usual = found.usual[by]
        rows = [
            (
                f"all {one.times:,} samples" if one.id is None else str(one.id),
                number(one.value) if np.isfinite(one.value) else "not finite",
                number(one.value / usual) if usual > 0 and np.isfinite(one.value) else "",
                f"{one.step:,}",
                "" if one.id is None else f"{one.times:,}",
            )
            for one in samples
        ]
        heads = ("sample", by, "times the median", "in step", "steps it was in")
        later = f"; {found.later[by]:,} more not finite later" if found.later.get(by) else ""
        tables.append(Table(heads, rows, f"Samples with the largest {by}, each where it was largest{later}"))
    if not tables:
        return [], []
    between = found.last - found.first + 1 > found.steps
    steps = f"{count(found.steps, 'step')} from {found.first:,} to {found.last:,}"
    kept = ", the last ones and those around alarms" if between else ""
    return [f"Samples are known by name in {steps}{kept}."], tables


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
