"""A window's numbers as the metric's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from torch import nn

from lipcore.capture.layers.passes import STRAYED
from lipcore.metric.columns import Column, Columns, Numbers, Places, one_if_same, rows_of, words_of
from lipcore.metric.distribution import Distribution, described
from lipcore.metric.results import Label, MetricResult
from lipcore.models.averaging import GONE, is_of_a_gone_group
from lipcore.per_sample.noise.estimates import QUANTITIES
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.noise.noise_sums import NoiseSums

_REDUCERS = ("mean", "min", "max", "p50", "p99")
_QUANTILES = (0.5, 0.99)


def add_norms(
    result: MetricResult,
    layers: Sequence[str],
    total: str,
    distributions: Sequence[Distribution],
    estimated: Sequence[str],
    note: str,
    doubt: str = "",
) -> None:
    """Add the distributions of the norms per layer and, with the note, in total, at the place of that name (""; none);
    `estimated`: layers that are no exact ones; `doubt`: why it is not proved that they are single samples'."""
    if not distributions:
        return  # before the layers are known
    found = described(distributions, _QUANTILES)
    places = places_of(tuple(layers), total)
    result.leave(lambda into: _add_described(into, found, places, frozenset(estimated), note, doubt), found.nbytes)


def _add_described(
    result: MetricResult, found: Numbers, places: Places, estimated: frozenset[str], note: str, doubt: str
) -> None:
    count, missing = found[0], found[4] + found[5]
    plain: Label = "heuristic" if doubt else "exact"
    labels: list[Label] = ["estimate" if layer in estimated else plain for layer in places.names]
    notes = [f"not proved: {doubt}" if doubt else ""] * len(places)
    if places.levels[-1] == "total":
        labels[-1] = "estimate" if estimated else labels[-1]
        notes[-1] = "; ".join(said for said in (note, notes[-1]) if said)
    counted = count > 0
    notes = [said if any_ else "nothing recorded" for said, any_ in zip(notes, counted.tolist(), strict=True)]
    worth = one_if_same(count.astype(np.int64)), words_of(labels), one_if_same(counted), words_of(notes)
    *rows, lost = rows_of(np.stack([*found[1:4], *found[6:], missing]))
    columns = {reducer: Column(row, *worth) for reducer, row in zip(_REDUCERS, rows, strict=True)}  # type: ignore[arg-type]
    columns["missing"] = Column(lost, one_if_same((count + missing).astype(np.int64)))
    result.add_columns("norm", Columns(places, columns))


@lru_cache(maxsize=8)
def places_of(layers: tuple[str, ...], total: str) -> Places:
    """Return the layers and the total, where it has a name; the same object for all windows of a metric."""
    if not total:
        return Places(layers, ["group"] * len(layers))
    return Places([*layers, total], [*["group"] * len(layers), "total"])  # type: ignore[list-item]


def add_noise(
    result: MetricResult, layers: Sequence[str], total: str, noise: NoiseScale, sums: NoiseSums | None
) -> None:
    """Add the gradient noise scale and its two estimators, and why steps were left out; where it is off, only why:
    averages that came with a state are not those of this window."""
    off = "" if sums is None else sums.off
    found, places = (NoiseScale(noise.places) if off else noise).condensed(), places_of(tuple(layers), total)

    def add(into: MetricResult) -> None:
        for quantity, columns in found.get().items():
            if off and quantity in QUANTITIES:
                columns = {reducer: replace(column, notes=off) for reducer, column in columns.items()}
            into.add_columns(quantity, Columns(places, columns))

    result.leave(add, found.nbytes)
    if sums is not None:
        result.details["noise_scale_skipped"] = sums.skipped()
        if off:
            result.details["noise_scale_off"] = off


def passes_unrecorded(counts: Mapping[str, int], model: nn.Module | None) -> dict[str, int]:
    """Return how many passes were not recorded, by reason: layers that stray from a wrapper whose process group is gone
    are called by another one in its place."""
    gone = STRAYED in counts and is_of_a_gone_group(model)
    return {GONE if gone and reason == STRAYED else reason: count for reason, count in counts.items()}
