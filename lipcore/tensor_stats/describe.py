"""Numbers that people read, from rows and histograms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional.tensor_stats import empty_tensor_stats, merge_tensor_stats
from lipcore.metric.columns import Column, Columns, Numbers, one_if_same, words_of
from lipcore.metric.results import MetricResult
from lipcore.metric.values import Level
from lipcore.tensor_stats.extra import Extra
from lipcore.tensor_stats.watched import Watched, with_groups

_CONSTANT = "all elements are the same"
_RANGE = "powers of deviations leave the range of float64"
_BETWEEN = "to 1/16 of itself"
_LEAST, _MOST = 1e-150, 1e140  # of a variance whose square, and fourth powers, float64 holds


def add_statistics(
    result: MetricResult,
    quantity: str,
    names: Sequence[str],
    groups: Sequence[str],
    level: Level,
    rows: Tensor,
    bins: Tensor,
    untrue: str = "",
) -> None:
    """Add the statistics of the rows of one quantity, of their groups and of all together; `untrue`: why the numbers
    are not what their key says."""
    places, members = with_groups(names, groups, level)
    rows, bins = _with_members(rows, bins, members)
    there = np.flatnonzero((rows[:, 0] + rows[:, 8] > 0).numpy())
    if not len(there):
        return
    reducers = described(rows.numpy()[there], bins.numpy()[there], untrue)
    result.add_columns(quantity, Columns(places.at(there.tolist()), reducers))


def add_rows(
    result: MetricResult, rows: Sequence[tuple[str, str, str, Level]], table: Tensor, bins: Tensor, untrue: str
) -> None:
    """Add the statistics of rows with these quantities, places, groups and levels; `untrue` is of gradients alone."""
    begin = 0
    for quantity, some in itertools.groupby(rows, lambda row: row[0]):
        own = list(some)
        end = begin + len(own)
        names, groups = [name for _, name, _, _ in own], [group for _, _, group, _ in own]
        why = untrue if quantity == "gradient" else ""
        add_statistics(result, quantity, names, groups, own[0][3], table[begin:end], bins[begin:end], why)
        begin = end


def add_extras(
    result: MetricResult,
    watched: Watched,
    extras: Sequence[tuple[Extra, slice, slice]],
    sums: Tensor,
    most: Tensor,
) -> None:
    """Add what is watched beside statistics, and why some of it is not here."""
    for extra, in_sums, in_most in extras:
        extra.add_to(result, sums[in_sums], most[in_most])
    off = {kind: dict(reasons) for kind, reasons in watched.refused.items()}
    for extra in watched.extras:
        if extra.problem:
            off.setdefault(extra.kind, {})[extra.place] = extra.problem
    for kind, reasons in off.items():
        result.details[f"{kind}_unseen"] = reasons


def _with_members(rows: Tensor, bins: Tensor, members: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the rows, and behind them one for each list of their numbers, merged."""
    count = len(rows)
    all_rows, all_bins = empty_tensor_stats(count + len(members), torch.device("cpu"))
    all_rows[:count], all_bins[:count] = rows, bins
    for i, some in enumerate(members):
        index = torch.tensor(some, dtype=torch.int64, device="cpu")
        into = all_rows[count + i : count + i + 1], all_bins[count + i : count + i + 1]
        merge_tensor_stats(into, (rows[index], bins[index]), [0] * len(some))
    return all_rows, all_bins


def described(rows: Numbers, bins: np.ndarray[Any, Any], untrue: str = "") -> dict[str, Column]:
    """Return the reducers of rows as columns."""
    n, mean, m2, _, m4, low, high, zeros, nonfinite = rows.T
    counts = one_if_same(n.astype(np.int64))
    any_finite = n > 0
    valid = any_finite & (not untrue)
    notes = [untrue or ("" if finite else "no element is finite") for finite in any_finite.tolist()]

    def column(numbers: Numbers, label: str = "exact", good: Any = valid, said: Sequence[str] = notes) -> Column:
        numbers = np.where(any_finite, numbers, np.nan)
        return Column(one_if_same(numbers), counts, label, one_if_same(good), words_of(said))  # type: ignore[arg-type]

    with np.errstate(all="ignore"):
        variance = m2 / n
        kurtosis = np.where(variance > 0, (m4 / n) / variance**2, np.nan)
    in_range = (variance >= _LEAST) & (variance <= _MOST) & np.isfinite(m4)
    why = np.where(low == high, _CONSTANT, np.where(in_range, "", _RANGE))
    said = [note or str(reason) for note, reason in zip(notes, why.tolist(), strict=True)]
    # Sums of finite elements may leave the range themselves: what is made of them is no number then.
    near, spread = np.isfinite(mean), np.isfinite(variance)

    def in_reach(there: Any) -> list[str]:
        return [note or ("" if one else _RANGE) for note, one in zip(notes, there.tolist(), strict=True)]

    elements = n + nonfinite
    columns = {
        "mean": column(np.where(near, mean, np.nan), good=valid & near, said=in_reach(near)),
        "sd": column(np.where(spread, np.sqrt(variance), np.nan), good=valid & spread, said=in_reach(spread)),
        "min": column(low),
        "max": column(high),
        "kurtosis": column(np.where(in_range, kurtosis, np.nan), good=valid & in_range, said=said),
        "zeros": column(zeros / np.maximum(elements, 1)),
    }
    for name, q in (("abs_p50", 0.5), ("abs_p99", 0.99)):
        largest = np.maximum(np.abs(low), np.abs(high))
        found = np.minimum(quantiles(bins, q), largest)
        columns[name] = column(found, "estimate", said=[note or _BETWEEN for note in notes])
    columns["nonfinite"] = Column(one_if_same(nonfinite), one_if_same(elements.astype(np.int64)), "exact", True, "")
    return columns


_LOWS = np.array([_core.tensor_bin_low(b) for b in range(_core.TENSOR_BINS)] + [np.inf])
_LOWS[2040:] = np.float64(2.0**128)  # what is above float32's range shares a page
_MIDDLES = np.concatenate([[0.0], (_LOWS[1:2040] + _LOWS[2:2041]) / 2, _LOWS[2040:2048]])


def quantiles(bins: np.ndarray[Any, Any], q: float) -> Numbers:
    """Return the magnitude below which a share q of the elements lies, to half a bin; of rows of counts."""
    cumulative = bins.cumsum(axis=1)
    rank = np.floor(q * np.maximum(cumulative[:, -1] - 1, 0) + 0.5)
    found: Numbers = _MIDDLES[(cumulative <= rank[:, None]).sum(axis=1).clip(max=_core.TENSOR_BINS - 1)]
    return found


def histogram_of(bins: Tensor) -> dict[str, list[float] | list[int]]:
    """Return the edges and counts of a histogram of magnitudes, from the first bin that is used to the last."""
    used = bins.nonzero().flatten()
    if not len(used):
        return {"edges": [], "counts": []}
    first, last = int(used[0]), int(used[-1])
    return {"edges": _LOWS[first : last + 2].tolist(), "counts": bins[first : last + 1].tolist()}
