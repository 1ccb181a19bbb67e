"""Updates that do not come from stored copies: from the optimizer's state, a passing snapshot, or the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lipcore import _core
from lipcore.functional.update_sums import MOMENTUM, NORMALIZED, RATIO, SECOND_MOMENT
from lipcore.metric.columns import Column, Columns, Numbers, Places, one_if_same, rows_of, words_of
from lipcore.metric.host_reads import OnDevice, TensorRead
from lipcore.metric.results import MetricResult
from lipcore.trajectory.describe import MOVES
from lipcore.trajectory.mean_ring import MeanRing
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.sources import GivenSource, OptimizerSource, SnapshotSource, supported_here
from lipcore.trajectory.tracker import Tracker

#: From the optimizer's state, by the row of their squares in what update_sums() returns.
ROOTS = {
    "normalized_update_rms": NORMALIZED,
    "rms_t": RATIO,
    "momentum_norm": MOMENTUM,
    "second_moment_norm": SECOND_MOMENT,
}
_KEPT = 1 + max(ROOTS.values())  # rows of squares


def closed_form_everywhere(optimizers: Sequence[Optimizer], watched: list[WatchedParameter]) -> bool:
    """Return whether the state of these optimizers gives every watched parameter's update."""
    if not optimizers or any(supported_here(optimizer) for optimizer in optimizers):
        return False
    theirs = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return all(id(parameter.tensor) in theirs for parameter in watched)


def why_no_root(quantity: str, kind: str) -> str:
    """Return why a window has no number of :data:`ROOTS` of a parameter, given what its optimizer is.

    >>> why_no_root("rms_t", "SGD")
    'SGD has no second moment'
    """
    if quantity != "momentum_norm" and _is_sgd(kind):
        return "SGD has no second moment"
    if kind == "SGD without momentum":
        return "SGD without momentum keeps no past gradients"
    if kind == "SGD":
        return "no step in this window, or Nesterov's, which reads no buffer of momentum"
    return "no step of its optimizer in this window"


def _is_sgd(kind: str) -> bool:
    return kind.partition(" ")[0] == "SGD"


class UpdateTracker(Tracker):
    """A Tracker without copies.

    Args:
        ratios: read the gradients as well, for rms_t.
        normalized: keep the RMS of normalised updates of each step.
    """

    def __init__(
        self,
        watched: list[WatchedParameter],
        source: str,
        optimizers: Sequence[Optimizer],
        *,
        ratios: bool = False,
        normalized: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(watched, copies=False, **settings)
        named = [(parameter.name, parameter.owner, parameter.key) for parameter in watched]
        self.source: OptimizerSource | SnapshotSource | GivenSource
        self._given: Mapping[str, Tensor] | None = None
        if source == "optimizer":
            if not optimizers:
                raise ValueError(
                    "optimizer: source 'optimizer' needs the torch.optim.SGD, Adam or AdamW that makes the whole step; "
                    "pass it here or to the Monitor. A wrapper changes the step: choose source='snapshot', or none"
                )
            for i, optimizer in enumerate(optimizers):
                if (reason := supported_here(optimizer)) is not None:
                    raise ValueError(f"optimizers[{i}]: {reason}; use snapshots or pass the updates yourself")
            self.source = OptimizerSource(list(optimizers), named, ratios=ratios)
        else:
            self.source = SnapshotSource(named) if source == "snapshot" else GivenSource(named)
        # Of the roots of each row of squares, tensor by tensor: last, sum, largest, steps.
        self._roots = self.table.rows.new_zeros(4, _KEPT * len(watched)) if source == "optimizer" else None
        self._roots_read = TensorRead(lambda: self._roots)  # type: ignore[arg-type, return-value]
        self.ratios = MeanRing(self.table) if ratios and source == "optimizer" else None
        self.normalized = MeanRing(self.table) if normalized and source == "optimizer" else None
        self._elements = self.table.rows.new_tensor([parameter.tensor.numel() for parameter in watched])
        known = [name for name, row in ROOTS.items() if ratios or row != RATIO]
        self.quantities = (*MOVES, *(known if source == "optimizer" else ()))

    def give(self, updates: Mapping[str, Tensor]) -> None:
        """Take what the next step has added to every parameter."""
        self._given = updates

    def before_step(self) -> None:
        """Copy the parameters, where the source is a snapshot."""
        if isinstance(self.source, SnapshotSource):
            self.source.before()

    def after_step_of(self, optimizer: Optimizer) -> None:
        """Take the update of one of several optimizers that step in turn: its own state, gradients and skipped steps
        are there in its hook alone."""
        if isinstance(self.source, OptimizerSource):
            self.source.sums(only=optimizer)

    def step(self) -> bool:
        """Take in what the source says; True when settle() is due."""
        if isinstance(self.source, GivenSource):
            given, self._given = self._given, None
            sums, squares = self.source.sums(given)  # type: ignore[arg-type]
        elif isinstance(self.source, OptimizerSource):
            sums, squares = self.source.finish()
        else:
            sums, squares = self.source.sums()
        if self._roots is not None:
            _core.observe_squares(squares[:_KEPT].view(-1), self._roots)
        for ring, row in ((self.ratios, RATIO), (self.normalized, NORMALIZED)):
            if ring is not None:
                ring.take(torch.stack([squares[row] * self._elements, self._elements], dim=1))
        return self.observe(sums)

    def on_device(self) -> list[OnDevice]:
        found = super().on_device()
        return [*found, self._roots_read] if found and self._roots is not None else found

    def bytes(self) -> dict[str, int]:
        """Return the bytes of persistent state: nothing per parameter."""
        return {"scalars and recent steps": self.table.bytes, "nothing per parameter": 0}

    def reset(self) -> None:
        super().reset()
        if self._roots is not None:
            self._roots.zero_()

    def describe(self, result: MetricResult, wanted: frozenset[str], *, length: str) -> None:
        super().describe(result, wanted, length=length)
        names = [name for name in ROOTS if name in wanted]
        if self._roots is None or not names:
            return
        roots = self._roots_read.on_host().numpy().reshape(4, _KEPT, len(self.watched))
        for name in names:
            self._describe_roots(result, name, roots[:, ROOTS[name]])

    def _describe_roots(self, result: MetricResult, quantity: str, roots: Numbers) -> None:
        last, total, largest, counts = roots
        counted = counts > 0
        with np.errstate(all="ignore"):
            numbers = {"last": last, "mean": total / counts, "max": largest}
        if self.closed.maxlen:  # kept for the open block alone
            numbers = {"last": last}
        rows = rows_of(np.where(counted, np.stack(list(numbers.values())), math.nan))
        count, valid = one_if_same(counts.astype(np.int64)), one_if_same(counted)
        notes = words_of(self._why_none(quantity, counted.tolist()))
        columns = {
            reducer: Column(row, count, "exact", valid, notes) for reducer, row in zip(numbers, rows, strict=True)
        }
        result.add_columns(quantity, Columns(self._tensors, columns))

    def _why_none(self, quantity: str, counted: Sequence[bool]) -> list[str]:
        """Return, per parameter, why it has no such number; "" where it has."""
        if all(counted) or not isinstance(self.source, OptimizerSource):
            return [""] * len(counted)
        return [
            "" if has else why_no_root(quantity, kind) for has, kind in zip(counted, self.source.kinds(), strict=True)
        ]

    @property
    def has_second_moments(self) -> bool:
        """True where some parameter's optimizer keeps a second moment."""
        return isinstance(self.source, OptimizerSource) and not all(map(_is_sgd, self.source.kinds()))

    @cached_property
    def _tensors(self) -> Places:
        return self.places.at(range(len(self.watched)))

    def _merge_next(self, other: Tracker, continues: bool) -> bool:
        if self._roots is not None:
            assert isinstance(other, UpdateTracker)
            assert other._roots is not None
            mine, theirs = self._roots, other._roots
            last = torch.where(theirs[3] > 0, theirs[0], mine[0])
            mine.copy_(torch.stack([last, mine[1] + theirs[1], torch.maximum(mine[2], theirs[2]), mine[3] + theirs[3]]))
        return super()._merge_next(other, continues)

    def state_dict(self) -> dict[str, Any]:
        extra = {} if self._roots is None else {"roots": self._roots.clone()}
        return super().state_dict() | extra

    def prepare(self, state: Any) -> Any:
        if self._roots is None:
            return super().prepare(state)
        roots = self._roots
        load = super().prepare(state)

        def load_all() -> None:
            load()
            roots.copy_(state["roots"])

        return load_all
