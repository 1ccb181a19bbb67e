"""Sketches in place of the parameters: everything exact mode measures, from a few thousand numbers per group.

The sketch is linear, so the sketch of an update is the difference of two sketches, and norms, means and angles of
sketches estimate those of the parameters. A Tracker therefore tracks the sketches as if they were parameters, each in
eight slices of its buckets: their sums are the group's, and their spread is its standard error.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipcore import _core, functional
from lipcore.functional.ordered_sums import sum_by_index
from lipcore.metric.columns import Column, Columns, Places, one_if_same, rows_of, words_of
from lipcore.metric.results import Level, MetricResult
from lipcore.metric.state import checked_tensor
from lipcore.trajectory.describe import MOVES, OFFSETS, Rows
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.sketch_errors import relative_errors
from lipcore.trajectory.sketch_history import SketchHistory
from lipcore.trajectory.sketch_places import first_indices, holders_of
from lipcore.trajectory.tracker import Tracker
from lipcore.trajectory.tracker_base import TrackerBase

ANGLES = ("update_cosine",)
SPLIT = 8  # slices of a sketch, for the standard error


class SketchTracker(Tracker):
    """Tracker of the sketch of every group."""

    quantities = tuple(q for q in (*MOVES, *OFFSETS, *ANGLES) if q not in ("max_abs_update",))

    def __init__(
        self,
        watched: list[WatchedParameter],
        buckets: int,
        seed: int,
        *,
        keep_every: int | None,
        keep_limit: int,
        **settings: Any,
    ) -> None:
        self.buckets, self.seed, self._keep_every = buckets, seed, keep_every
        groups = list(dict.fromkeys(parameter.group for parameter in watched))
        device = watched[0].tensor.device
        # Ranks count copies once and parts each, so a sketch is of the ones or of the others.
        holders = [holders_of(parameter) for parameter in watched]
        of_rows = sorted(
            dict.fromkeys(zip((parameter.group for parameter in watched), holders, strict=True)),
            key=lambda row: groups.index(row[0]),
        )
        kinds = list(dict.fromkeys(holders))
        self.sketch_groups = [group for group, _ in of_rows]
        self.kinds = [kinds.index(held) for _, held in of_rows]
        self._group_of = [groups.index(group) for group in self.sketch_groups]
        self._row_of = [of_rows.index((p.group, held)) for p, held in zip(watched, holders, strict=True)]
        self.members = [[p.name for p, of in zip(watched, self._row_of, strict=True) if of == row]
                        for row in range(len(of_rows))]  # fmt: skip
        self._group_index, self._kind_index = (
            torch.tensor(each, dtype=torch.int64, device=device) for each in (self._group_of, self.kinds)
        )
        self._first = first_indices(watched)
        self._parts = [(p.name, p.group, tuple(p.tensor.shape), held) for p, held in zip(watched, holders, strict=True)]
        self._now = torch.zeros(len(of_rows), buckets, dtype=torch.float64, device=device)
        self._weights = torch.zeros(len(watched), 2, dtype=torch.float64, device=device)
        entries = [
            (parameter.owner, parameter.key, parameter.name, first, row)
            for parameter, first, row in zip(watched, self._first, self._row_of, strict=True)
        ]
        self._sketch = _core.SketchPlan(entries, self._now, self._weights, seed)
        self._sketch.step()
        owner: dict[str, Tensor] = {}
        pieces = []
        for i, (group, row) in enumerate(zip(self.sketch_groups, self._now, strict=True)):
            first = self.sketch_groups.index(group)
            name = group if i == first else f"{group}#{i - first}"
            for j, piece in enumerate(row.view(SPLIT, -1)):
                owner[f"{name}#{j}"] = piece
                pieces.append(WatchedParameter(owner, f"{name}#{j}", f"{name}#{j}", group))
        super().__init__(pieces, **settings)
        # Angles: this update and the last one, [groups + total], and what is remembered of their cosine.
        self._update, self._last_update = torch.zeros_like(self._now), torch.zeros_like(self._now)
        self._before = self._now.clone()
        self._cosine = self.table.rows.new_zeros(3, len(groups) + 1)  # last, sum, count
        self.nonfinite = self._now.new_zeros(len(watched))
        self.weight_sq = self._weights[:, 0].clone()
        self.history = SketchHistory(buckets, keep_limit)
        if keep_every is not None:
            self.history.keep(0, self._by_kind(self._now))

    @cached_property
    def places(self) -> Places:
        levels: list[Level] = [*["group"] * len(self.groups), "total"]  # type: ignore[list-item]
        return Places([*self.groups, "total"], levels)

    @cached_property
    def agreed(self) -> dict[str, Any]:
        """Settings that ranks have to have alike so that their sketches add up, JSON-ready."""
        of_sketches = json.dumps([self.sketch_groups, self.members, self.kinds])
        digest = hashlib.sha256(of_sketches.encode()).hexdigest()[:16]
        return {"sketch": [self.buckets, self.seed], "parameters of sketches, hashed": digest}

    # ---- steps

    def step(self) -> bool:
        """Sketch the parameters and take the sketches for the next point; True when settle() is due."""
        self._sketch.step()
        finite = self._weights[:, 0].isfinite()
        self.weight_sq = torch.where(finite, self._weights[:, 0], self.weight_sq)
        self.nonfinite += self._weights[:, 1]
        self._observe_angles()
        due = super().step()
        if self._keep_every is not None and self.seen % self._keep_every == 0:
            self.history.keep(self.seen, self._by_kind(self._before))
        return due

    def _of_groups(self, of_sketches: Tensor) -> Tensor:
        if len(self._group_of) == len(self.groups):
            return of_sketches
        return sum_by_index(of_sketches, self._group_index, len(self.groups))

    def _by_kind(self, sketches: Tensor) -> Tensor:
        """Return the sum of all sketches, or the sums by which ranks hold copies where these differ."""
        if not any(self.kinds):
            return sketches.sum(dim=0)
        return sum_by_index(sketches, self._kind_index, max(self.kinds) + 1)

    def _observe_angles(self) -> None:
        usable = self._now.isfinite().all(dim=1, keepdim=True)
        now = torch.where(usable, self._now, self._before)
        self._update, self._last_update = self._last_update, self._update
        torch.sub(now, self._before, out=self._update)
        self._before.copy_(now)
        pairs = ((self._update, self._last_update), (self._update, self._update), (self._last_update,) * 2)
        dot, norm_sq, last_sq = (torch.linalg.vecdot(a, b) for a, b in pairs)
        dot, norm_sq, last_sq = (torch.cat([self._of_groups(x), x.sum().reshape(1)]) for x in (dot, norm_sq, last_sq))
        norms = (norm_sq * last_sq).sqrt()
        counted = norms > 0
        cosine = torch.where(counted, dot / norms, 0.0).clamp(-1, 1)
        self._cosine[0] = torch.where(counted, cosine, self._cosine[0])
        self._cosine[1] += cosine
        self._cosine[2] += counted

    def rebase(self) -> bool:
        self._sketch.step()
        jumped = not torch.equal(self._before, self._now)
        self._before.copy_(self._now)
        self._last_update.zero_()
        self._update.zero_()
        return super().rebase() or jumped

    def reset(self) -> None:
        super().reset()
        self._cosine[1:].zero_()
        self.nonfinite.zero_()

    def inherit(self, before: TrackerBase) -> None:
        """Go on from another tracker, if no parameter has come, gone, changed its size or what ranks hold of it: else
        the hash of the elements is another one, or a sketch is of others."""
        assert isinstance(before, SketchTracker)
        if (before._parts, before._first) == (self._parts, self._first):
            super().inherit(before)

    def set_reference(self, reference: list[Tensor]) -> None:
        """Sketch the parameters' values, and measure distances from there."""
        sketches = torch.zeros_like(self._now)
        for value, first, row in zip(reference, self._first, self._row_of, strict=True):
            dense = value.detach().contiguous() if not value.is_contiguous() else value.detach()
            sketches[row] += functional.sketch([dense], [first], buckets=self.buckets, seed=self.seed)
        super().set_reference(list(sketches.view(len(self._now) * SPLIT, -1)))

    # ---- results

    def bytes(self) -> dict[str, int]:
        out = {f"sketches: {kind}": size for kind, size in super().bytes().items()}
        out["sketches: present, and the last two updates'"] = 4 * 8 * self._now.numel()
        if self._keep_every is not None:
            out["sketches kept, at most"] = 8 * self.buckets * (max(self.kinds) + 1) * (self.history._rows.maxlen or 0)
        return out

    def describe(self, result: MetricResult, wanted: frozenset[str], *, length: str) -> None:
        """Add the numbers per group and in total; each with its standard error."""
        window, pieces = self.window_rows().cpu(), len(self.watched)
        errors = relative_errors(window[:pieces].numpy(), window[pieces:-1].numpy(), SPLIT, self._group_of)
        rows = Rows(self.places, window[pieces:], self.window_quantiles()[:, 2 * pieces :])
        rows["weight"][:] = self._grouped(self.weight_sq).sqrt().cpu().numpy()
        rows["nonfinite_elements"][:] = self._grouped(self.nonfinite).cpu().numpy()
        rows.add_to(result, wanted, length=length, relative_errors=errors)
        if "update_cosine" in wanted:
            self._describe_angles(result)

    def _grouped(self, of_parameters: Tensor) -> Tensor:
        return torch.cat([self._of_groups(self.by_sketch(of_parameters)), of_parameters.sum().reshape(1)])

    def by_sketch(self, of_parameters: Tensor) -> Tensor:
        """Return the sums of the parameters' numbers over those of each sketch."""
        index = torch.tensor(self._row_of, device=of_parameters.device)
        return sum_by_index(of_parameters, index, len(self._now))

    def _describe_angles(self, result: MetricResult) -> None:
        last, total, counts = self._cosine.cpu().numpy()
        moved = counts > 0
        with np.errstate(all="ignore"):
            numbers = {"last": last, "mean": total / counts}
        if self.closed.maxlen:  # the mean is kept for the open block alone
            del numbers["mean"]
        rows = rows_of(np.where(moved, np.stack(list(numbers.values())), math.nan))
        notes = words_of(["" if any_ else "fewer than two steps that moved" for any_ in moved.tolist()])
        count, valid, error = one_if_same(counts.astype(np.int64)), one_if_same(moved), 1 / math.sqrt(self.buckets)
        columns = {
            reducer: Column(row, count, "estimate", valid, notes, error)
            for reducer, row in zip(numbers, rows, strict=True)
        }
        result.add_columns("update_cosine", Columns(self.places, columns))

    def _merge_next(self, other: Tracker, continues: bool) -> bool:
        assert isinstance(other, SketchTracker)
        before = int(self.table.cursor[0])
        super()._merge_next(other, continues)
        moved = other._cosine[2] > 0
        self._cosine[0] = torch.where(moved, other._cosine[0], self._cosine[0])
        self._cosine[1:] += other._cosine[1:]
        self.nonfinite += other.nonfinite
        for name in ("weight_sq", "_before", "_update"):
            getattr(self, name).copy_(getattr(other, name))
        for step, sketch in other.history.rows():
            number = step if continues else before + step
            if number > before:
                self.history.keep(number, sketch)
        return continues

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        mine = {
            "before": self._before,
            "update": self._update,
            "cosine": self._cosine,
            "nonfinite": self.nonfinite,
            "weight_sq": self.weight_sq,
        }
        return super().state_dict() | {
            "angles": {key: tensor.clone() for key, tensor in mine.items()},
            "kept": self.history.state_dict(),
        }

    def _kept_shape(self, steps: int) -> tuple[int, ...]:
        return (steps, max(self.kinds) + 1, self.buckets) if steps and any(self.kinds) else (steps, self.buckets)

    def prepare(self, state: Any) -> Any:
        kept = state.get("kept") if isinstance(state, dict) else None
        if not isinstance(kept, dict):
            raise ValueError(f"kept: expected a dict of steps and matrix, got {type(kept).__name__}")
        steps = checked_tensor("kept.steps", kept.get("steps"), torch.int64, (None,))
        matrix = checked_tensor("kept.matrix", kept.get("matrix"), torch.float64, self._kept_shape(len(steps)))
        load = super().prepare({**state, "kept": self.history.state_dict()})

        def load_all() -> None:
            load()
            angles = state["angles"]
            self._before.copy_(angles["before"])
            self._update.copy_(angles["update"])
            self._cosine.copy_(angles["cosine"])
            self.nonfinite.copy_(angles["nonfinite"])
            self.weight_sq.copy_(angles["weight_sq"])
            self.history.load(steps, matrix)

        return load_all
