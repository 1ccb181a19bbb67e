"""Norms of single samples' gradients, and inner products of these."""

from __future__ import annotations

from lipcore.report.facts import Facts
from lipcore.report.html import number
from lipcore.report.plots import Plots
from lipcore.report.section import Figure, Made, Missing, Section

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
            "Gradient norms of single samples", 'lipcore.PerSampleGradNorms(loss_reduction="auto") in metrics'
        )
    plots.lines("samples", lines, "norm")
    middle, top = lines[0][1].usual(lines[0][2]), lines[-1][1]
    peak = top.span(lines[-1][2])[2]
    sentence = (
        f"A sample's gradient has norm {number(middle)} in the middle; the largest of all was {number(peak)}, "
        f"{number(peak / middle) if middle > 0 else 'many'} times that, in the window up to step "
        f"{int(top.ends[(top.high[:, lines[-1][2]] == peak).argmax()]):,}."
    )
    missing = facts.windows.get(_METRIC, "norm", "missing")
    notes = ["Which samples they were stands in the metric's .scores while the process lives, not in the record."]
    if missing is not None and "total" in missing.places and missing.span(missing.places.index("total"))[2] > 0:
        notes.append("Of some samples the norm is not known; the windows' notes say why.")
    figure = Figure("samples", "Gradient norm of a sample: median, 99 % quantile and greatest of each window", sentence)
    return Section("samples", "Single samples", figures=[figure], notes=notes)
