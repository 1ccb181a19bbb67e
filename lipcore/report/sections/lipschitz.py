"""Local Lipschitz constants at the training samples and at fixed points."""

from __future__ import annotations

from lipcore.report.facts import Facts
from lipcore.report.html import Table, name_of, number
from lipcore.report.plots import Plots
from lipcore.report.remedies import remedy_of
from lipcore.report.section import Figure, Made, Missing, Section, with_metric

_REDUCERS = {"mean": "mean", "p99": "99 % quantile", "max": "greatest"}
_OTHERS = {
    ("normalized_gradient_norm", "sum"): "normalised gradient length of a window",
    ("steadiness", "max"): "steadiness (largest normalised gradient norm)",
}


def lipschitz(facts: Facts, plots: Plots) -> Made:
    """Show the local Lipschitz constant by window, with what the numbers are worth."""
    figures = []
    label = ""
    for metric, title in (("lipschitz", "at the training samples"), ("probes", "at fixed points")):
        mean = facts.windows.get(metric, "local_lipschitz", "mean")
        if mean is None:
            continue
        label = label or facts.windows.labels.get((metric, "local_lipschitz", "mean"), "")
        for column, place in enumerate(mean.places[:4]):
            key = f"{metric}-{column}"
            lines = []
            for reducer, words in _REDUCERS.items():
                line = facts.windows.get(metric, "local_lipschitz", reducer)
                if line is not None and place in line.places:
                    lines.append((words, line, line.places.index(place)))
            plots.lines(key, lines, "slope")
            first, last = mean.first_and_last(column)
            worth = facts.windows.labels.get((metric, "local_lipschitz", "mean"), "exact")
            said = f"The mean over the samples of a window went from {number(first)} to {number(last)} ({worth})."
            figures.append(Figure(key, f"Local Lipschitz constant of {place} {title}", said))
    rows: list[tuple[object, ...]] = []
    for (quantity, reducer), words in _OTHERS.items():
        line = facts.windows.get("lipschitz", quantity, reducer)
        worth = facts.windows.labels.get(("lipschitz", quantity, reducer), "")
        for column, place in enumerate(line.places if line is not None else []):
            assert line is not None
            rows.append((words, name_of(place), *map(number, line.first_and_last(column)), worth))
    if not figures and not rows:
        remedy = with_metric("Lipschitz()", ", for a model that returns a tensor")
        return Missing("Local Lipschitz constants", remedy_of(facts, "lipschitz", ["local_lipschitz"], remedy))
    notes = []
    if label == "one-sided":
        notes.append("One-sided: at most the true constant. It is exact for a model with one output per sample.")
    table = Table(("quantity", "of", "first window", "last", "worth"), rows, of_numbers=False)
    return Section("lipschitz", "Local Lipschitz constants", figures=figures, tables=[table], notes=notes)
