"""What a Tracker says, saves and merges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipcore import functional
from lipcore.metric.distribution import loaded_distributions
from lipcore.metric.results import MetricResult
from lipcore.metric.state import check_like
from lipcore.trajectory.checkpoint import check_counters
from lipcore.trajectory.copies import squared_distances
from lipcore.trajectory.describe import MOVES, OFFSETS, Rows
from lipcore.trajectory.table import (
    COLUMN,
    FOLDED,
    M2,
    POINTS,
    STEPS,
    WINDOW_COLUMNS,
    between,
    merge_rows,
    points_of,
)
from lipcore.trajectory.tracker_base import Block, TrackerBase


class Tracker(TrackerBase):
    """Tracker of the numbers of a list of tensors over the open window."""

    quantities: tuple[str, ...] = (*MOVES, *OFFSETS, "element_variance")

    # ---- results

    def describe(self, result: MetricResult, wanted: frozenset[str], *, length: str) -> None:
        """Leave all wanted quantities of every row to who reads the result."""
        rows = self.described_rows()
        result.leave(lambda into: rows.add_to(into, wanted, length=length), rows.nbytes)

    def described_rows(self) -> Rows:
        """Return the window's rows with their quantiles."""
        return Rows(self.places, self.known_rows(), self.window_quantiles())

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on bit for bit."""
        self.count_replays()
        self.recent.flush(self.seen)
        state: dict[str, Any] = {
            "rows": self.measured().clone(),
            "cursor": self.table.cursor.clone(),
            "settled": self._settled,
            "open_steps": self.open_steps,
            "recent": self.recent.state_dict(),
            "distributions": [d.state_dict() for d in self.recent.distributions],
            "closed": [self._block_state(block) for block in self.closed],
        }
        if self.copies:
            copies = self.copies
            state["tensors"] = {
                parameter.name: {kind: t.clone() for kind, t in copies.state(i).items()}
                for i, parameter in enumerate(self.watched)
            }
        return state

    def _block_state(self, block: Block) -> dict[str, Any]:
        names = [parameter.name for parameter in self.watched]
        return {
            "rows": block.rows.clone(),
            "means": {name: mean.clone() for name, mean in zip(names, block.means, strict=bool(block.means))},
            "m2": {name: m2.clone() for name, m2 in zip(names, block.m2, strict=bool(block.m2))},
            "distributions": [d.state_dict() for d in block.distributions],
        }

    def prepare(self, state: Any) -> Callable[[], None]:
        """Check a state wholly, naming the first bad key in a ValueError; the function returned takes the state
        over."""
        mine = self.state_dict()
        theirs = dict(state) if isinstance(state, dict) else state
        before = None
        if isinstance(theirs, dict) and isinstance(theirs.get("recent"), dict):
            before = self.recent.checked_before(theirs["recent"])
            theirs["recent"] = {key: value for key, value in theirs["recent"].items() if key != "before"}
        del mine["recent"]["before"]
        loose = ("distributions", "closed", "tensors")  # checked below
        check_like("", {k: v for k, v in theirs.items() if k not in loose} if isinstance(theirs, dict) else theirs,
                   {k: v for k, v in mine.items() if k not in loose})  # fmt: skip
        check_counters(theirs, self.table.rows, COLUMN["group"])
        count = len(self.recent.distributions)
        distributions = loaded_distributions("distributions", theirs.get("distributions"), count)
        has_earlier = self._check_tensors(theirs.get("tensors"), mine.get("tensors"))
        closed = theirs.get("closed")
        if not isinstance(closed, list) or len(closed) > (self.closed.maxlen or 0):
            raise ValueError(f"closed: expected a list of at most {self.closed.maxlen} blocks")
        blocks = [self._loaded_block(f"closed[{i}]", block) for i, block in enumerate(closed)]

        def load() -> None:
            self.table.rows.copy_(theirs["rows"])
            self.table.cursor.copy_(theirs["cursor"])
            self._settled, self.open_steps = theirs["settled"], theirs["open_steps"]
            self.recent.load(theirs["recent"], before)
            self.recent.distributions = distributions
            self.closed.clear()
            self.closed.extend(blocks)
            if self.copies:
                self.copies.take_earlier()
                if has_earlier:
                    self.copies.make_earlier()
                for i, parameter in enumerate(self.watched):
                    for kind, tensor in self.copies.state(i).items():
                        tensor.copy_(theirs["tensors"][parameter.name][kind])

        return load

    def _check_tensors(self, theirs: Any, mine: dict[str, dict[str, Tensor]] | None) -> bool:
        """Check the copies of a state, and return whether it has means of earlier blocks."""
        if mine is None or not self.copies:
            check_like("tensors", theirs, None)
            return False
        first = theirs.get(self.watched[0].name) if isinstance(theirs, dict) else None
        has_earlier = isinstance(first, dict) and "earlier" in first
        for kinds in mine.values():
            kinds.pop("earlier", None)
            kinds.pop("earlier_m2", None)
            if has_earlier:
                kinds["earlier"] = kinds["deviation"].double()
                if self.copies.per_element:
                    kinds["earlier_m2"] = kinds["deviation"]
        check_like("tensors", theirs, mine)
        return has_earlier

    def _loaded_block(self, path: str, state: Any) -> Block:
        names = [parameter.name for parameter in self.watched]
        means = dict(zip(names, self.copies.deviation, strict=True)) if self.copies else {}  # of their kind
        like = {"rows": self.table.rows, "means": means}
        like["m2"] = means if self.copies and self.copies.per_element else {}
        given = {k: v for k, v in state.items() if k != "distributions"} if isinstance(state, dict) else state
        check_like(path, given, like)
        loaded = loaded_distributions(
            f"{path}.distributions", state.get("distributions"), len(self.recent.distributions)
        )
        device = self.table.rows.device
        tensors = [[state[kind][n].to(device, copy=True) for n in names if like[kind]] for kind in ("means", "m2")]
        return Block(state["rows"].to(device, copy=True), tensors[0], tensors[1], loaded)

    # ---- merging

    def prepare_merge(self, other: Tracker) -> Callable[[], bool]:
        """Check that the other tracker's window comes right after this one's (ValueError otherwise). The function
        returned adds it, and says whether the other's numbers since the reference contain this one's."""
        if self.closed or other.closed:
            raise ValueError("merge: sliding windows cannot be merged; use window_blocks=1")
        steps, mine, theirs = (t[-1] for t in (other.table.rows[:, STEPS], self._totals(), other._totals()))
        continues = bool(theirs == mine + steps) and self._same(other.copies, "ref", self.copies, "ref")
        anew = bool(theirs == steps) and self._same(other.copies, "ref", self.copies, "prev")
        if not continues and not anew:
            raise ValueError(
                f"merge: not the next interval: this one has {int(mine)} steps since its reference, the other one "
                f"{int(theirs)}, of which {int(steps)} in its window, and it does not start where this one ended"
            )
        return lambda: self._merge_next(other, continues)

    def _totals(self) -> Tensor:
        return self.table.rows[:, COLUMN["total_steps"]]

    @staticmethod
    def _same(copies: Any, kind: str, others: Any, other_kind: str) -> bool:
        if copies is None:
            return True
        pairs = zip(getattr(copies, kind), getattr(others, other_kind), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def _merge_next(self, other: Tracker, continues: bool) -> bool:
        self.settle()
        other.settle()
        rows, theirs = self.table.rows, other.table.rows
        if self.copies and other.copies:
            if not continues:
                other.copies.shift(other.copies.earlier, self.copies.ref)
            other._leave_out_start(self.copies.prev, self.copies.ref, points_of(rows) > 0)
            points, more = points_of(rows)[: len(self.watched)], points_of(theirs)[: len(self.watched)]
            apart = squared_distances(other.copies.earlier, self.copies.earlier)
            added = self.table.with_groups(between(points, more, apart))
            for i, prev in enumerate(self.copies.prev):
                share = (more[i] / (points[i] + more[i]).clamp(min=1)).to(self.copies.earlier[i].dtype)
                if self.copies.per_element:
                    gap = (other.copies.earlier[i] - self.copies.earlier[i]).square_().mul_(points[i].to(share) * share)
                    self.copies.earlier_m2[i].add_(other.copies.earlier_m2[i]).add_(gap)
                self.copies.earlier[i].lerp_(other.copies.earlier[i], share)
                prev.copy_(other.copies.prev[i])
        before = rows[:, WINDOW_COLUMNS : WINDOW_COLUMNS + 2].clone()
        merged = merge_rows(rows, theirs)
        weight = COLUMN["weight"]  # one that was started anew and made no step knows none
        merged[:, weight] = torch.where(theirs[:, STEPS] == 0, rows[:, weight], theirs[:, weight])
        rows.copy_(merged)
        if not continues:
            rows[:, WINDOW_COLUMNS : WINDOW_COLUMNS + 2] += before
        if self.copies:
            rows[:, M2] += added
        for into, distribution in zip(self.recent.distributions, other.recent.distributions, strict=True):
            into.merge(distribution)
        self._append_recent(other)
        return continues

    def _leave_out_start(self, start: list[Tensor], reference: list[Tensor], had_points: Tensor) -> None:
        """Take the point it starts from out of M2 and the mean, where it is among them and (`had_points`) the last
        point of the interval before. A merged M2 is larger than what goes, so nothing cancels in it."""
        assert self.copies
        rows = self.table.rows
        counted = had_points & (points_of(rows) == self._steps_of(rows) + 1) & (points_of(rows) > 1)
        left = (points_of(rows) - 1).clamp(min=1)
        removed = rows.new_zeros(len(self.watched))
        for i, mean in enumerate(self.copies.earlier):
            if not counted[i]:
                continue
            deviation = (start[i].to(mean.dtype) - reference[i].to(mean.dtype)) - mean
            scale = (left[i] + 1) / left[i]
            removed[i] = functional.sample_norms(deviation.reshape(1, deviation.numel()))[0].square() * scale
            if self.copies.per_element:
                self.copies.earlier_m2[i].sub_(deviation.square() * scale.to(mean.dtype)).clamp_(min=0)
            mean.sub_(deviation / left[i].to(mean.dtype))
        rows[:, M2] = (rows[:, M2] - self.table.with_groups(removed)).clamp(min=0)
        rows[:, FOLDED] -= counted.to(rows.dtype)
        rows[:, POINTS] = 0

    def _append_recent(self, other: Tracker) -> None:
        """Append the steps of the other tracker's window."""
        ring = self.table.recent.shape[0]
        theirs = other._window_steps()  # its ring goes back further where it was continued from this one's state
        kept = min(theirs, ring)
        end = int(self.table.cursor[0]) + theirs
        index = torch.arange(end - kept, end, device="cpu") % ring
        self.table.recent[index] = other.recent.steps(kept).to(self.table.recent.device)
        self._skip(theirs)

    def _skip(self, steps: int) -> None:
        """Keep the next `steps` entries of the ring, which were written already, out of the quantiles."""
        self.table.cursor += steps
        self._settled += steps
        self.recent.skip_to(self._settled)

    def _window_steps(self) -> int:
        """Return the number of steps in the open block."""
        return self._steps_of(self.table.rows)

    def summary(self, every_steps: int) -> dict[str, Any]:
        """Return the window's rows, and its steps one by one."""
        rows = self.window_rows().cpu()
        count, ring = self._window_steps(), self.table.recent.shape[0]
        if count > ring:
            raise ValueError(
                f"ring: the window has {count} steps, the ring keeps {ring}; path lengths of shards do not add up, "
                f"only the squares of single steps do. Use ring={count} or more, or shorter windows"
            )
        return {
            "version": 1,
            "every_steps": every_steps,
            "quantities": [q for q in self.quantities if q in (*MOVES, *OFFSETS)],
            "names": [parameter.name for parameter in self.watched],
            "groups": [parameter.group for parameter in self.watched],
            "rows": rows[: len(self.watched)],
            "steps": self.recent.steps(count)[:, : len(self.watched)],
        }
