"""Takes in the steps of a list of tensors: rows, blocks, windows and the reference point."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lipcore import _core
from lipcore.metric.columns import Numbers
from lipcore.metric.distribution import Distribution
from lipcore.metric.host_reads import OnDevice
from lipcore.metric.results import Level, Places
from lipcore.models.capturing import is_capturing
from lipcore.trajectory.copies import Copies, bytes_of, squared_distances
from lipcore.trajectory.describe import QUANTILES, quantiles_of
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.step_ring import Recent, StepHistory
from lipcore.trajectory.table import (
    COLUMN,
    FOLDED,
    M2,
    POINTS,
    STEPS,
    WINDOW_COLUMNS,
    Table,
    between,
    merge_rows,
    points_of,
)
from lipcore.trajectory.window_read import WindowRead


@dataclass
class Block:
    """A closed stretch of a sliding window."""

    rows: Tensor
    means: list[Tensor]
    m2: list[Tensor]  # per element, or none
    distributions: list[Distribution]


class TrackerBase:
    """Rows for tensors, groups and the total. With copies of the tensors it measures everything; without, a source
    brings every step's sums (:meth:`observe`), and offsets from a reference and variances are not known."""

    def __init__(
        self,
        watched: list[WatchedParameter],
        *,
        ring: int = 1024,
        window_blocks: int = 1,
        copies: bool = True,
        per_element: bool = False,
    ) -> None:
        self.watched = watched
        self.groups = list(dict.fromkeys(parameter.group for parameter in watched))
        tensors = [parameter.tensor for parameter in watched]
        self.shapes = [tensor.shape for tensor in tensors]  # the parameters' may change until rebind()
        group_of = [self.groups.index(parameter.group) for parameter in watched]
        self.table = Table(group_of, len(self.groups), ring, tensors[0].device)
        self.recent = Recent(self.table)
        self.closed: deque[Block] = deque(maxlen=window_blocks - 1)
        self.copies = Copies(tensors, per_element=per_element) if copies else None
        self._window_read = WindowRead(
            self.table, self.window_rows, lambda ring, cursor: self.recent.flush_from(ring, self._seen_at(cursor))
        )
        self._plan: _core.TrajectoryPlan | None = None
        self._settled = 0  # steps up to the last settle()
        self._observed = 0  # steps since then that were not the plan's
        self._captured = False  # one of those was captured in a CUDA graph
        if self.copies:
            entries = [
                (parameter.owner, parameter.key, parameter.name, *self.copies.entry(i))
                for i, parameter in enumerate(watched)
            ]
            self._plan = _core.TrajectoryPlan(entries, self.table.core)

    @cached_property
    def places(self) -> Places:
        """Names and levels of the rows: every tensor, every group, the total."""
        levels: list[Level] = [*["tensor"] * len(self.watched), *["group"] * len(self.groups), "total"]  # type: ignore[list-item]
        return Places([*(parameter.name for parameter in self.watched), *self.groups, "total"], levels)

    def named_rows(self) -> dict[tuple[str, Level], Tensor]:
        """Return every place's row of the open block."""
        places = zip(self.places.names, self.places.levels, strict=True)
        return dict(zip(places, self.table.rows[-len(self.places) :], strict=True))

    def bytes(self) -> dict[str, int]:
        """Return the bytes of persistent state by kind."""
        out: dict[str, int] = {}
        blocks = (self.closed.maxlen or 0) + 1
        for parameter in self.watched if self.copies else ():
            count, dtype, per_element = (
                parameter.tensor.numel(),
                parameter.tensor.dtype,
                bool(self.copies and self.copies.m2),
            )
            for kind, size in bytes_of(count, dtype, per_element=per_element, blocks=blocks).items():
                out[kind] = out.get(kind, 0) + size
        return out | {"scalars and recent steps": self.table.bytes}

    # ---- steps

    def before_step(self) -> None:
        """Copy what the step about to be made will change, where something needs it."""

    @property
    def step(self) -> Callable[[], bool]:
        """The compiled step: takes the tensors as they are now; True when settle() is due."""
        assert self._plan is not None
        return self._plan.step

    def step_with(self, check: _core.MovementCheck) -> bool:
        """Take that step, and make a check of movement in the same pass over memory."""
        assert self._plan is not None
        try:
            return self._plan.step_with(check)
        finally:
            check.drop()  # a step that is refused lets go of gradients and states too

    def observe(self, sums: Tensor) -> bool:
        """Count a step from sums made elsewhere, float64 [tensors, 5] as `trajectory_step` returns them; True when
        settle() is due."""
        self.table.core.observe(sums)
        self._captured = self._captured or is_capturing(sums)
        self._observed += 1
        return bool(self._observed == _core.BLOCK_STEPS)

    @property
    def open_steps(self) -> int:
        """Steps since the last settle()."""
        return self._plan.block if self._plan else self._observed

    @open_steps.setter
    def open_steps(self, count: int) -> None:
        if self._plan:
            self._plan.block = count
        self._observed = count

    @property
    def seen(self) -> int:
        """Number of all steps so far; those in a replayed CUDA graph are known after count_replays()."""
        return self._settled + self.open_steps

    @property
    def _has_replays(self) -> bool:
        """True where there may be steps of which nobody tells: those of a CUDA graph."""
        return self._captured or (self._plan is not None and self._plan.captured)

    def count_replays(self) -> None:
        """Count the steps that replays of CUDA graphs have made too, for which the device is waited for; one that was
        captured was none."""
        if self._has_replays:
            self._seen_at(int(self.table.cursor[0]))

    def _seen_at(self, cursor: int) -> int:
        """Return the number of steps when the table's cursor was here."""
        if self._has_replays:
            self._settled += cursor - self.seen
        return self.seen

    @property
    def window_steps(self) -> int:
        """Steps in the window, those included in which something was left out. Waits for a device."""
        return sum(map(self._steps_of, [*(block.rows for block in self.closed), self.table.rows]))

    def _steps_of(self, rows: Tensor) -> int:
        """Return how many steps the tensors' rows have: groups count a step with finite and other members twice."""
        rows = rows[: len(self.watched)]
        return int((rows[:, STEPS] + rows[:, COLUMN["nonfinite_steps"]]).max())

    def settle(self) -> None:
        """Close the open block: its mean joins that of the earlier ones, its distance from it joins M2, its steps the
        quantiles. Nothing waits for a device."""
        self._end_block()
        if not self._has_replays:  # else the ring may be further than is known here
            self.recent.absorb(self._settled)
        if not self.copies:
            return
        rows = self.table.rows
        points, folded = rows[: len(self.watched), POINTS].clamp(min=0), rows[: len(self.watched), FOLDED]
        rows[:, M2] += self.table.with_groups(between(points, folded, self.copies.fold(points, folded)))
        rows[:, FOLDED] += rows[:, POINTS].clamp(min=0)
        rows[:, POINTS].clamp_(max=0)  # a window that continues another stays one until its first step

    def _end_block(self) -> None:
        self._settled, self.open_steps = self.seen, 0

    # ---- the window

    def reset(self) -> None:
        """Start a new window at the tensors' last observed values."""
        self.count_replays()
        self._end_block()
        self.recent.restart(self._settled)
        self.closed.clear()
        self.table.rows[:, :WINDOW_COLUMNS] = 0
        for m2 in self.copies.earlier_m2 if self.copies else ():
            m2.zero_()  # sums; the means beside them are overwritten by the first block

    def advance(self) -> None:
        """Slide the window by a block: the open one is closed, and the oldest goes when there are too many."""
        if self.closed.maxlen == 0:
            self.reset()
            return
        self.count_replays()
        self.settle()
        self.recent.flush(self._settled)
        means, m2 = self.copies.take_earlier() if self.copies else ([], [])
        self.closed.append(Block(self.measured().clone(), means, m2, self.recent.take_distributions()))
        self.table.rows[:, :WINDOW_COLUMNS] = 0
        self.table.rows[:, POINTS] = _core.CONTINUES

    def measured(self) -> Tensor:
        """Return the open block's rows, with the distances from the reference as they are now, which no step measures.
        Elements that are not finite count as what they last were. Nothing waits for a device."""
        if self.copies:
            squares = squared_distances(self.copies.prev, self.copies.ref)
            self.table.rows[:, COLUMN["distance"]] = self.table.with_groups(squares).sqrt()
        return self.table.rows

    def window_rows(self) -> Tensor:
        """Return the rows of the whole window."""
        rows = self.measured().clone()
        for block in reversed(self.closed):
            rows = merge_rows(block.rows, rows)
        if self.copies and (self.closed or self.copies.earlier):
            rows[:, M2] += self.table.with_groups(torch.stack([self.merged(i)[0] for i in range(len(self.watched))]))
        return rows

    def on_device(self) -> list[OnDevice]:
        """Return what described_rows() reads, where it lies on a device."""
        return [] if self.table.rows.is_cpu else [self._window_read]

    def known_rows(self) -> Tensor:
        """Return window_rows(); those on the host, while they are there."""
        known = self._window_read.rows
        return self.window_rows() if known is None else known

    def window_quantiles(self) -> Numbers:
        """Return median and 99 % quantile of update norm and ratio of every row over the window, [2, 2 * rows]."""
        found = None if self.closed else self.recent.quantiles(self.seen, QUANTILES)
        if found is None:
            found = quantiles_of(self.window_distributions())
        return np.full_like(found, np.nan) if self.recent.lost else found

    def window_distributions(self) -> list[Distribution]:
        """Return the distributions of update norm and ratio of every row over the whole window."""
        self.count_replays()
        self.recent.flush(self.seen)
        if not self.closed:
            return self.recent.distributions
        merged = [Distribution() for _ in self.recent.distributions]
        for block in (*(closed.distributions for closed in self.closed), self.recent.distributions):
            for into, distribution in zip(merged, block, strict=True):
                into.merge(distribution)
        return merged

    def merged(self, i: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return all blocks of tensor i merged by Chan's formula: what that adds to M2, M2 per element (where it is
        kept), and the mean. One tensor's at a time, so that memory stays bounded."""
        assert self.copies
        row, added = self.table.rows[i], self.table.rows.new_zeros(())
        blocks = [
            (points_of(b.rows[i : i + 1])[0], b.means[i].double(), b.m2[i] if b.m2 else None) for b in self.closed
        ]
        if self.copies.earlier:
            m2 = self.copies.earlier_m2[i] if self.copies.per_element else None
            blocks.append((row[FOLDED], self.copies.earlier[i], m2))
        open_points = row[POINTS].clamp(min=0)
        open_m2 = self.copies.m2[i] * (open_points > 0) if self.copies.per_element else None
        blocks.append((open_points, self.copies.mean(i), open_m2))
        points, mean, elements = blocks[0]
        for other_points, other, other_elements in blocks[1:]:
            added = added + between(points, other_points, squared_distances([mean], [other])[0])
            share = other_points / (points + other_points).clamp(min=1)
            if elements is not None and other_elements is not None:
                apart = (other - mean).square_().mul_(points * share)
                elements = elements + other_elements + apart.to(elements.dtype)
            mean = torch.lerp(mean, other, share)
            points = points + other_points
        return added, elements, mean

    def drain(self, gradients: Mapping[str, Recent]) -> StepHistory:
        """Return single steps that were not drained yet, beside those of `gradients` by quantity."""
        return self.recent.drain(list(self.places.names), gradients)

    # ---- reference

    def rebase(self) -> bool:
        """Start the next step from the tensors as they are now, which something else than a step has changed, and
        return whether that changed any."""
        jumped = False
        if self.copies:
            for i, (parameter, prev) in enumerate(zip(self.watched, self.copies.prev, strict=True)):
                if (
                    not parameter.there
                    or parameter.tensor.shape != prev.shape
                    or parameter.tensor.device != prev.device
                ):
                    continue  # the next step will say so
                values = parameter.tensor.detach()
                jumped |= not torch.equal(values, prev)
                # Of values that are not finite the difference never would be either.
                self.copies.jump(i, torch.where(values.isfinite().all(), values, prev))
        return jumped

    def set_reference(self, reference: list[Tensor]) -> None:
        """Measure distances, and the path since the reference, from these values."""
        assert self.copies
        copies, rows = self.copies, self.table.rows
        for means in (copies.earlier, *(block.means for block in self.closed)):
            if means:
                copies.shift(means, reference)
        for mine, new in zip(copies.ref, reference, strict=True):
            mine.copy_(new)
        rows[:, COLUMN["total_steps"]] = 0
        rows[:, COLUMN["total_path"]] = 0

    def inherit(self, before: TrackerBase) -> None:
        """Go on after a change of the model: in every row that was there, the path since the reference goes on, and so
        does the reference of tensors of the same shape."""
        rows, totals = before.named_rows(), slice(WINDOW_COLUMNS, COLUMN["group"])
        shapes = {parameter.name: parameter.tensor.shape for parameter in self.watched}
        resized = {
            (parameter.name, "tensor")
            for parameter, shape in zip(before.watched, before.shapes, strict=True)
            if shapes.get(parameter.name, shape) != shape
        }
        for place, row in self.named_rows().items():
            if place in rows and place not in resized:
                row[totals] = rows[place][totals]
        if not self.copies or not before.copies:
            return
        places = {parameter.name: i for i, parameter in enumerate(before.watched)}
        for i, parameter in enumerate(self.watched):
            j = places.get(parameter.name)
            if j is None or before.copies.ref[j].shape != parameter.tensor.shape:
                continue
            self.copies.ref[i].copy_(before.copies.ref[j])

    def forget_path(self) -> None:
        """Say that the path of all tensors together since the reference is not known, until there is another one."""
        self.table.rows[-1, COLUMN["total_path"]] = torch.nan

    def measure(self) -> None:
        """Take the norms of the weights from the copies as they are."""
        assert self.copies
        nothing: list[Tensor] = [torch.zeros_like(prev) for prev in self.copies.prev]
        squares = squared_distances(self.copies.prev, nothing)
        self.table.rows[:, COLUMN["weight"]] = self.table.with_groups(squares).sqrt()
