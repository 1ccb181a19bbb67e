"""Statistics of parameters, gradients and outputs, where TensorStats has recorded them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.facts import Facts
from lipcore.report.html import Table, name_of, number
from lipcore.report.plots import Plots
from lipcore.report.remedies import remedy_of
from lipcore.report.section import Made, Missing, Section, with_metric

_KINDS = {"parameter": "Parameters", "gradient": "Gradients", "output": "Outputs of modules"}
_COLUMNS = {"sd": "standard deviation", "max": "greatest element", "zeros": "share of zeros", "nonfinite": "not finite"}
_OTHERS = {
    "attention_bound": "Bound of attention logits",
    "logsumexp": "Log-sum-exp of logits",
    "router_entropy": "Entropy of routers",
}


def tensor_statistics(facts: Facts, plots: Plots) -> Made:
    """Show first and last statistics of each place, those that grew or shrank most first."""
    tables = []
    for quantity, title in _KINDS.items():
        by_reducer = {reducer: facts.windows.get("tensor_stats", quantity, reducer) for reducer in _COLUMNS}
        spread = by_reducer["sd"]
        if spread is None:
            continue
        rows = sorted(_rows(spread, by_reducer), key=lambda row: -row[0])
        heads = ("place", "sd, first window", "sd, last", "last over first", *list(_COLUMNS.values())[1:])
        tables.append(Table(heads, [cells for _, cells in rows], f"{title}: those whose sd changed most come first"))
    for quantity, title in _OTHERS.items():
        line = facts.windows.get("tensor_stats", quantity, "max") or facts.windows.get("tensor_stats", quantity, "mean")
        if line is not None:
            rows_ = [(name_of(place), *map(number, line.first_and_last(i))) for i, place in enumerate(line.places)]
            tables.append(Table(("place", "first window", "last"), rows_, title))
    if not tables:
        remedy = remedy_of(facts, "tensor_stats", list(_KINDS), with_metric("TensorStats()"))
        return Missing("Statistics of parameters, gradients and outputs", remedy)
    return Section(
        "tensors", "What is in the tensors", ["From sampled steps; shares of zeros are of all elements."], tables=tables
    )


def _rows(spread: Binned, by_reducer: dict[str, Binned | None]) -> list[tuple[float, Sequence[object]]]:
    rows: list[tuple[float, Sequence[object]]] = []
    for i, place in enumerate(spread.places):
        first, last = spread.first_and_last(i)
        times = last / first if first > 0 else np.nan
        others = [_last(by_reducer[reducer], place) for reducer in list(_COLUMNS)[1:]]
        change = abs(np.log(times)) if np.isfinite(times) and times > 0 else -1.0
        cells = (name_of(place), number(first), number(last), number(times), *map(number, others))
        rows.append((float(change), cells))
    return rows


def _last(numbers: Binned | None, place: str) -> float:
    return (
        np.nan
        if numbers is None or place not in numbers.places
        else numbers.first_and_last(numbers.places.index(place))[1]
    )
