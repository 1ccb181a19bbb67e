"""Distribution of a stream of values >= 0: moments and quantiles, merged without loss, in a few KiB."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipcore import _core
from lipcore.metric.columns import Numbers
from lipcore.metric.device_rows import DeviceRows
from lipcore.metric.host_reads import OnDevice, fetch
from lipcore.metric.state import check_version, checked_count, checked_tensor
from lipcore.metric.values import LABELS, Label, Value
from lipcore.models.arguments import check_choice


class Distribution:
    """Distribution of a stream of values >= 0: count, mean, variance, minimum, maximum, and quantiles to 0.4 %.

    It keeps a histogram with logarithmic bins in a few KiB, never the values. Merging two distributions gives exactly
    the counts, minima, maxima and quantiles of observing everything in one.

    A NaN stands for "no value": it is counted in `missing` and enters nothing else. Infinite and negative values are
    counted in `invalid`. Values on a CUDA device are binned there and fetched when a number is asked for, so
    :meth:`observe` never waits for the device.

    >>> d = Distribution()
    >>> d.observe(torch.tensor([1.0, 2.0, 3.0]))
    >>> d.count, d.mean, d.quantile(1.0)
    (3, 2.0, 3.0)
    """

    _version = 1

    def __init__(self) -> None:
        self._core = _core.Distribution()
        self._device: list[tuple[DeviceRows, int]] = []  # what holds values on a device, and this one's place there

    def observe(self, values: Tensor) -> None:
        """Add the values of a tensor of any shape."""
        values = values.detach().reshape(-1)
        if values.is_cpu:
            self._core.observe_all(values.to(torch.float64))
        else:
            observe_rows(values.unsqueeze(0), [self])

    def merge(self, other: Distribution) -> None:
        """Add everything that another distribution has observed."""
        self._core.merge(other.core)

    def reset(self) -> None:
        """Forget everything."""
        reset_all([self])

    @property
    def core(self) -> Any:
        """Compiled object, with everything observed so far in it."""
        if self._device:
            fetch(rows for rows, _ in self._device)
            for rows, place in self._device:
                rows.drain_into(self._core, place)
        return self._core

    count = property(lambda self: self.core.count, doc="Number of finite values.")
    mean = property(lambda self: self.core.mean if self.core.count else math.nan, doc="Mean; NaN when empty.")
    min = property(lambda self: self.core.min if self.core.count else math.nan, doc="Minimum; NaN when empty.")
    max = property(lambda self: self.core.max if self.core.count else math.nan, doc="Maximum; NaN when empty.")
    missing = property(lambda self: self.core.missing, doc="Number of NaN values.")
    invalid = property(lambda self: self.core.invalid, doc="Number of infinite or negative values.")

    @property
    def variance(self) -> float:
        """Population variance; NaN when empty."""
        return float(self.core.m2 / self.core.count) if self.core.count else math.nan

    @property
    def sum(self) -> float:
        """Sum of the values; 0 when empty."""
        return float(self.core.mean * self.core.count)

    def quantile(self, q: float) -> float:
        """Return the value at rank q (count - 1), to 0.4 % of itself; NaN when empty."""
        if not 0 <= q <= 1:
            raise ValueError(f"q: expected a number between 0 and 1, got {q}")
        return float(self.core.quantile(q))

    def reduced(self, label: Label, *, total: bool = False, note: str = "") -> dict[str, Value]:
        """Return the usual reducers as values: mean, min, max, p50, p99, and the sum when asked for."""
        check_choice("label", label, LABELS)
        count = self.count
        numbers = {"mean": self.mean, "min": self.min, "max": self.max}
        numbers |= {"p50": self.quantile(0.5), "p99": self.quantile(0.99)}
        if total:
            numbers["sum"] = self.sum
        valid = count > 0
        return {k: Value(v, count, label, valid, note if valid else "nothing recorded") for k, v in numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return version, moments and bins; small, because only used bins are in it."""
        c = self.core
        moments = torch.tensor([c.count, c.mean, c.m2, c.min, c.max], dtype=torch.float64, device="cpu")
        bins = torch.tensor(c.bins(), dtype=torch.int64, device="cpu")
        return {"version": self._version, "moments": moments, "missing": c.missing, "invalid": c.invalid, "bins": bins}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state. Where it is not one, raise a ValueError that names what is wrong, and change nothing."""
        check_version(state, self._version, "one")
        moments = checked_tensor("moments", state.get("moments"), torch.float64, (5,))
        bins = checked_tensor("bins", state.get("bins"), torch.int64, (None,))
        count, mean, m2, low, high = moments.tolist()
        if not (
            count >= 0 and 0 <= m2 < math.inf and 0 <= low <= mean * (1 + 1e-9) and mean <= high * (1 + 1e-9) < math.inf
        ):
            raise ValueError(
                f"moments: count {count}, mean {mean}, m2 {m2}, min {low}, max {high} are not those of values"
            )
        missing, invalid = checked_count(state, "missing"), checked_count(state, "invalid")
        if len(bins[::2].unique()) != len(bins[::2]):
            raise ValueError("bins: a bin stands there twice")
        self._core.set_state(count, mean, m2, low, high, missing, invalid, bins.tolist())
        self._device = []

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()  # the compiled object cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._core, self._device = _core.Distribution(), []
        self.load_state_dict(state)


def loaded_distributions(path: str, states: Any, count: int) -> list[Distribution]:
    """Return distributions from their states; ValueError naming the first bad one."""
    if not isinstance(states, list) or len(states) != count:
        what = len(states) if isinstance(states, list) else type(states).__name__
        raise ValueError(f"{path}: expected a list of {count}, got {what}")
    loaded = []
    for i, state in enumerate(states):
        distribution = Distribution()
        try:
            distribution.load_state_dict(state)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}[{i}]: {error}") from None
        loaded.append(distribution)
    return loaded


def observe_roots(squares: Tensor, distributions: Sequence[Distribution]) -> None:
    """Add the square roots of row k of squares, float64 [K, B], to distribution k."""
    if squares.is_cpu:
        _core.observe_roots(squares, [distribution._core for distribution in distributions])
        return
    if distributions:
        _rows_of(distributions, squares.device).observe(squares.detach(), _core.OBSERVE_ROOTS)


def observe_ratios(
    numerators: Tensor, gradient: Tensor, smallest: float, distributions: Sequence[Distribution]
) -> None:
    """Add numerators[k] / |gradient|, float64 [K, B] and [B] on a device, to distribution k; a ratio is missing where
    the gradient is 0, not finite or below `smallest`."""
    _rows_of(distributions, numerators.device).observe(numerators, _core.OBSERVE_RATIOS, gradient, smallest)


def observe_rows(values: Tensor, distributions: Sequence[Distribution]) -> None:
    """Add row k of values, [K, B], to distribution k: on a device by one kernel for all of them."""
    values = values.detach()
    if values.is_cpu:
        for distribution, row in zip(distributions, values, strict=True):
            distribution.observe(row)
    elif distributions:
        _rows_of(distributions, values.device).observe(values)


def _rows_of(distributions: Sequence[Distribution], device: torch.device) -> DeviceRows:
    """Return what holds the values of exactly these distributions on a device."""
    for rows, _ in distributions[0]._device:
        if (
            rows.device == device
            and rows.places == len(distributions)
            and all((rows, k) in distribution._device for k, distribution in enumerate(distributions))
        ):
            return rows
    made = DeviceRows(len(distributions), device)
    for k, distribution in enumerate(distributions):
        distribution._device.append((made, k))  # beside those that it has: a captured graph goes on writing into them
    return made


def on_device(distributions: Iterable[Distribution]) -> list[OnDevice]:
    """Return what these distributions have on devices."""
    return [rows for distribution in distributions for rows, _ in distribution._device]


def described(distributions: Sequence[Distribution], quantiles: Sequence[float] = ()) -> Numbers:
    """Return count, mean, min, max (NaN where nothing was observed), missing, invalid and quantiles of each, float64
    [columns, distributions]. One compiled call for all of them."""
    out = np.empty((len(distributions), 6 + len(quantiles)))
    fetch(on_device(distributions))
    cores = [distribution.core for distribution in distributions]
    _core.describe_distributions(cores, list(quantiles), torch.from_numpy(out))
    return np.ascontiguousarray(out.T)


def reset_all(distributions: Sequence[Distribution]) -> None:
    """Reset all of these distributions."""
    _core.reset_distributions([distribution._core for distribution in distributions])
    places: dict[DeviceRows, list[int]] = {}
    for distribution in distributions:
        for rows, place in distribution._device:
            places.setdefault(rows, []).append(place)
    for rows, theirs in places.items():
        rows.forget(theirs)  # and kept: a captured graph goes on writing into it
