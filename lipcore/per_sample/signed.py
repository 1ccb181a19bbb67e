"""Numbers of any sign whose distributions are kept apart by sign, as the metric's results."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lipcore.metric.columns import Column, Columns, Numbers, one_if_same, words_of
from lipcore.metric.distribution import Distribution, described
from lipcore.metric.results import Label, MetricResult
from lipcore.metric.values import Value
from lipcore.per_sample.results import places_of

_REDUCERS = ("mean", "min", "max", "negative")


def joined(distributions: Sequence[Distribution]) -> Numbers:
    """Return [columns, n]: count, mean, min, max, share below 0, and number of missing values, of distributions
    that stand in pairs: values >= 0, and what is below 0 with its sign changed."""
    both = described(distributions)
    plus, minus = both[:, 0::2], both[:, 1::2]
    count = plus[0] + minus[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.nan_to_num(plus[1]) * plus[0] - np.nan_to_num(minus[1]) * minus[0]
        mean, negative = total / count, minus[0] / count
    low = np.where(minus[0] > 0, -minus[3], plus[2])
    high = np.where(plus[0] > 0, plus[3], -minus[2])
    # A number below 0 is missing among the others.
    missing = plus[4] - minus[0] + plus[5]
    return np.stack([count, mean, low, high, negative, missing])


def quantities(columns: int, single: bool) -> list[str]:
    """Return the names of the quantities, one per reference."""
    return ["dot"] if single else [f"dot_{k}" for k in range(columns)]


def add_dots(
    result: MetricResult,
    layers: Sequence[str],
    total: str,
    distributions: Sequence[Distribution],
    names: Sequence[str],
    note: str,
    doubt: str,
) -> None:
    """Add quantities with these names, per layer and, with the note, in total, at the place of that name ("": none);
    `doubt`: why it is not proved that they are single samples'."""
    if not distributions:
        return  # before the layers are known
    found, places = joined(distributions), places_of(tuple(layers), total)
    label: Label = "heuristic" if doubt else "exact"
    notes = [f"not proved: {doubt}" if doubt else ""] * len(places)
    if total:
        notes[-1] = "; ".join(said for said in (note, notes[-1]) if said)

    def add(into: MetricResult) -> None:
        for k, name in enumerate(names):
            count, *rows, missing = found[:, k :: len(names)]
            counted = count > 0
            told = [said if any_ else "nothing recorded" for said, any_ in zip(notes, counted.tolist(), strict=True)]
            worth = one_if_same(count.astype(np.int64)), label, one_if_same(counted), words_of(told)
            columns = {reducer: Column(row, *worth) for reducer, row in zip(_REDUCERS, rows, strict=True)}
            columns["missing"] = Column(missing, one_if_same((count + missing).astype(np.int64)))
            into.add_columns(name, Columns(places, columns))

    result.leave(add, found.nbytes)


def shown_dots(
    layers: Sequence[str],
    total: str,
    distributions: Sequence[Distribution],
    names: Sequence[str],
    measured: Collection[str],
) -> list[tuple[str, dict[str, Value]]]:
    """Return the reducers by place, of measured layers, and reference where there are several, the total last."""
    result = MetricResult("")
    add_dots(result, layers, total, distributions, names, "", "")
    places = [*(layer for layer in layers if layer in measured), total] if distributions else []
    told = {(place, name): result[name][place] for place in places for name in names}
    rows = [(place if len(names) == 1 else f"{place} {name}", reducers) for (place, name), reducers in told.items()]
    return [(name, {r: v for r, v in reducers.items() if r in _REDUCERS}) for name, reducers in rows]
