"""Count, mean, variance and maximum of a value per sample of the data set, by sample id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lipcore.functional.dtypes import INTEGERS
from lipcore.metric.state import check_version, checked_count, checked_tensor
from lipcore.models.arguments import check_choice, check_count
from lipcore.per_sample.scores.id_index import IdIndex, grown

Score = Literal["mean", "max", "variance", "count"]
Array = np.ndarray[Any, Any]
_PENDING_BATCHES, _PENDING_VALUES = 64, 1 << 16  # then they are folded in, so that numpy's overhead is shared
_MOST = 4  # times as many, before a device that has not finished is waited for


@dataclass(frozen=True)
class SampleStatistics:
    """Statistics of the samples that were asked for, in their order; tensors [n] on the CPU."""

    count: Tensor  #: int64; 0 for an id without values
    mean: Tensor  #: float64; NaN for an id without values, as the others
    variance: Tensor  #: population variance, M2 / count
    max: Tensor


class TopSamples(NamedTuple):
    """Sample ids in the order of their scores, the first one first; tensors on the CPU."""

    ids: Tensor
    values: Tensor


class SampleScores:
    """Statistics, over epochs, of one value per sample of the data set (its gradient norm, say), by sample id.

    For every id it keeps count, mean, variance and maximum in 48 bytes. Ids may be any int64 numbers.

    :meth:`observe` never waits for the device. Batches are copied to the host in the background and folded in later: at
    the latest when a number is asked for, or when the device is 256 batches behind. A NaN stands for "no value" and is
    counted in `missing`; infinite values are counted in `invalid`. Neither enters anything else.

    >>> scores = SampleScores()
    >>> scores.observe(torch.tensor([7, -1, 7]), torch.tensor([1.0, 5.0, 3.0]))
    >>> scores.lookup([7, 8]).mean
    tensor([2., nan], dtype=torch.float64)
    >>> scores.top(1)
    TopSamples(ids=tensor([-1]), values=tensor([5.], dtype=torch.float64))
    """

    _version = 1

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._index = IdIndex()
        self._count = np.zeros(0, np.int64)
        self._moments = np.zeros((0, 3))  # mean, M2, max
        self._missing = self._invalid = 0
        self._pending: list[tuple[Tensor, Tensor, list[Any]]] = []
        self._pending_values = 0
        self.mark()

    def mark(self) -> None:
        """Note that everything so far is right, so that :meth:`take_back` comes back to here. From here on the
        statistics that an id had are kept when they change for the first time: 40 bytes per id that is seen again."""
        self._fold()
        self._before: list[tuple[Array, Array, Array]] = []  # slots, their counts and moments
        self._kept = np.zeros(len(self._index), np.bool_)  # by slot: whether they are among these
        self._left_out = self._missing, self._invalid

    def take_back(self) -> None:
        """Forget what was observed since the last mark."""
        self._fold()
        for slots, count, moments in self._before:
            self._count[slots], self._moments[slots] = count, moments
        used = len(self._kept)
        if len(self._index) > used:
            self._index.keep(used)
        self._count, self._moments = self._count[:used].copy(), self._moments[:used].copy()
        self._missing, self._invalid = self._left_out
        self.mark()

    def observe(self, ids: Tensor, values: Tensor) -> None:
        """Add a value for each of these samples; an id may stand there more than once.

        Args:
            ids: [B], integers of any kind, also negative.
            values: [B].
        """
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype not in INTEGERS:
            raise ValueError(f"ids: expected an integer tensor of shape [B], got {_what(ids)}")
        if not isinstance(values, Tensor) or values.dim() != 1 or not values.is_floating_point():
            raise ValueError(f"values: expected a floating-point tensor of shape [B], got {_what(values)}")
        if len(ids) != len(values):
            raise ValueError(f"ids: expected one per value, got {len(ids)} ids for {len(values)} values")
        events: list[Any] = []
        self._pending.append((_on_host(ids, torch.int64, events), _on_host(values, torch.float64, events), events))
        self._pending_values += len(ids)
        if len(self._pending) >= _PENDING_BATCHES or self._pending_values >= _PENDING_VALUES:
            late = len(self._pending) >= _MOST * _PENDING_BATCHES or self._pending_values >= _MOST * _PENDING_VALUES
            self._fold(wait=late)

    def _fold(self, wait: bool = True) -> None:
        """Take in the pending batches; without `wait` those that have arrived on the host."""
        arrived = 0
        for _, _, events in self._pending:
            if wait:
                for event in events:
                    event.synchronize()
            elif not all(event.query() for event in events):
                break
            arrived += 1
        if not arrived:
            return
        ids = torch.cat([pending[0] for pending in self._pending[:arrived]]).numpy()
        values = torch.cat([pending[1] for pending in self._pending[:arrived]]).numpy()
        del self._pending[:arrived]
        self._pending_values -= len(ids)
        finite, missing = np.isfinite(values), int(np.isnan(values).sum())
        self._missing += missing
        self._invalid += len(values) - int(finite.sum()) - missing
        if not finite.all():
            ids, values = ids[finite], values[finite]
        self._merge(*_grouped(ids, values))

    def _merge(self, ids: Array, count: Array, moments: Array) -> None:
        """Merge statistics by Chan's formula, for ids that are all different."""
        if not len(ids):
            return
        slots = self._index.add(ids)
        self._keep(slots[slots < len(self._kept)])
        self._count = grown(self._count, len(self._index))
        self._moments = grown(self._moments, len(self._index))
        had, (mean, m2, high) = self._count[slots], self._moments[slots].T
        both = had + count
        difference = np.where(had > 0, moments[:, 0] - mean, 0.0)
        share = count / both
        # Where there was nothing before, exactly the new numbers.
        mean = np.where(had > 0, mean + difference * share, moments[:, 0])
        with np.errstate(over="ignore"):  # above 1e154 a variance may be infinite
            m2 = m2 + moments[:, 1] + difference**2 * had * share
        high = np.where(had > 0, np.maximum(high, moments[:, 2]), moments[:, 2])
        self._count[slots] = both
        self._moments[slots] = np.stack([mean, m2, high], axis=1)

    def _keep(self, slots: Array) -> None:
        """Keep what these slots hold, which is about to change, where that is not kept yet."""
        slots = slots[~self._kept[slots]]
        if len(slots):
            self._kept[slots] = True
            self._before.append((slots, self._count[slots], self._moments[slots]))

    def __len__(self) -> int:
        """Return how many samples have a value."""
        self._fold()
        return len(self._index)

    @property
    def missing(self) -> int:
        """Number of NaN values."""
        self._fold()
        return self._missing

    @property
    def invalid(self) -> int:
        """Number of infinite values."""
        self._fold()
        return self._invalid

    def lookup(self, ids: Tensor | Sequence[int]) -> SampleStatistics:
        """Return the statistics [n] of these samples [n]."""
        wanted = ids
        if not isinstance(wanted, Tensor):
            wanted = torch.tensor(ids, dtype=None if len(ids) else torch.int64, device="cpu")
        if wanted.dim() != 1 or wanted.dtype not in INTEGERS:
            raise ValueError(f"ids: expected integers of shape [n], got {_what(wanted)}")
        self._fold()
        slots = self._index.find(wanted.to("cpu", torch.int64).numpy())
        known = slots >= 0
        count, numbers = np.zeros(len(slots), np.int64), np.full((3, len(slots)), np.nan)
        count[known] = self._count[slots[known]]
        numbers[:, known] = _statistics(count[known], self._moments[slots[known]])
        return SampleStatistics(*(torch.from_numpy(array) for array in (count, *numbers)))

    def top(self, k: int, by: Score = "mean", *, largest: bool = True) -> TopSamples:
        """Return the k samples with the largest (or smallest) score, fewer when there are not so many. Of equal
        scores the smaller ids come first."""
        check_count("k", k, 0)
        check_choice("by", by, get_args(Score))
        arrays = self.to_numpy()
        ids, values = arrays["ids"], arrays[by]
        key = -values if largest else values
        if k < len(ids):  # sort only what can be among them
            kept = key <= np.partition(key, max(k - 1, 0))[max(k - 1, 0)]
            ids, values, key = ids[kept], values[kept], key[kept]
        order = np.argsort(key, kind="stable")[:k]  # ids are in ascending order
        return TopSamples(torch.from_numpy(ids[order]), torch.from_numpy(values[order]))

    def to_numpy(self) -> dict[str, Array]:
        """Return arrays ids, count, mean, variance and max of all samples, by ascending id."""
        ids, count, moments = self._sorted()
        mean, variance, high = _statistics(count, moments)
        return {"ids": ids, "count": count, "mean": mean, "variance": variance, "max": high}

    def _sorted(self) -> tuple[Array, Array, Array]:
        """Return copies of what is kept, by ascending id."""
        self._fold()
        used = len(self._index)
        order = np.argsort(self._index.ids[:used])
        return self._index.ids[order], self._count[order], self._moments[order]

    def merge(self, other: SampleScores) -> None:
        """Add everything that other scores have observed."""
        missing, invalid = other.missing, other.invalid
        self._merge(*other._sorted())
        self._missing += missing
        self._invalid += invalid

    def state_dict(self) -> dict[str, Any]:
        """Return version, ids in ascending order with their counts and moments, and what was left out."""
        ids, count, moments = self._sorted()
        mean, m2, high = (np.ascontiguousarray(column) for column in moments.T)
        arrays = {"ids": ids, "count": count, "mean": mean, "m2": m2, "max": high}
        state = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return {"version": self._version, **state, "missing": self._missing, "invalid": self._invalid}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state. Where it is not one, raise a ValueError that names what is wrong, and change nothing."""
        check_version(state, self._version, "one")
        ids, count = (_column(state, key, torch.int64) for key in ("ids", "count"))
        mean, m2, high = (_column(state, key, torch.float64) for key in ("mean", "m2", "max"))
        for key, column in (("count", count), ("mean", mean), ("m2", m2), ("max", high)):
            if len(column) != len(ids):
                raise ValueError(f"{key}: expected {len(ids)} numbers, one per id, got {len(column)}")
        if len(np.unique(ids)) != len(ids):
            raise ValueError("ids: an id stands there twice")
        if not (count > 0).all():
            raise ValueError("count: expected at least 1 value per id")
        slack = 1e-9 * np.abs(mean)
        if not (np.isfinite(mean) & np.isfinite(high) & (m2 >= 0) & (mean <= high + slack)).all():
            raise ValueError("mean, m2, max: these are not the moments of finite values")
        missing, invalid = checked_count(state, "missing"), checked_count(state, "invalid")
        self.reset()
        self._merge(ids, count, np.stack([mean, m2, high], axis=1))
        self._missing, self._invalid = missing, invalid
        self.mark()

    def __repr__(self) -> str:
        left_out = "".join(
            f"; {count} {what} values left out"
            for count, what in ((self.missing, "missing"), (self.invalid, "infinite"))
            if count
        )
        return f"{type(self).__name__}: count, mean, variance and max of a value for each of {len(self)} ids{left_out}"

    def __getstate__(self) -> dict[str, Any]:
        self._fold()  # events of a device cannot be copied
        return self.__dict__.copy()


def _what(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _on_host(tensor: Tensor, dtype: torch.dtype, events: list[Any]) -> Tensor:
    """Return a copy on the CPU; of a CUDA tensor one that is there when the event added has passed (in pinned memory,
    which torch allocates for such copies)."""
    tensor = tensor.detach().to(dtype)
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    copied = tensor.to("cpu", non_blocking=True)
    events.append(torch.cuda.current_stream(tensor.device).record_event())
    return copied


def _column(state: dict[str, Any], key: str, dtype: torch.dtype) -> Array:
    return checked_tensor(key, state.get(key), dtype, (None,)).numpy()


def _grouped(ids: Array, values: Array) -> tuple[Array, Array, Array]:
    """Return the different ids, how many values each has, and their mean, M2 and maximum [ids, 3]."""
    if not len(ids):
        return ids, ids, np.empty((0, 3))
    order = np.argsort(ids, kind="stable")
    ids, values = ids[order], values[order]
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    count = np.diff(starts, append=len(ids))
    # Divided before they are summed: the sum of finite values may not be finite.
    mean = np.add.reduceat(values / np.repeat(count, count), starts)
    with np.errstate(over="ignore"):  # above 1e154 a variance may be infinite
        m2 = np.add.reduceat((values - np.repeat(mean, count)) ** 2, starts)
    return ids[starts], count, np.stack([mean, m2, np.maximum.reduceat(values, starts)], axis=1)


def _statistics(count: Array, moments: Array) -> tuple[Array, Array, Array]:
    """Return mean, variance and maximum of samples that have values."""
    return np.ascontiguousarray(moments[:, 0]), moments[:, 1] / count, np.ascontiguousarray(moments[:, 2])
