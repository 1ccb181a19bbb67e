"""The numbers of a Trajectory's open window, and the window itself."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from lipcore.metric.host_reads import OnDevice
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import PlanLine
from lipcore.metric.rank_part import RankPart
from lipcore.metric.results import MetricResult
from lipcore.trajectory.binding import ONLY_NUMBERS
from lipcore.trajectory.listening import Listened
from lipcore.trajectory.rank_part import part_of
from lipcore.trajectory.results import add_quantities, plan_lines
from lipcore.trajectory.sketch_history import SketchHistory
from lipcore.trajectory.sketch_tracker import SketchTracker
from lipcore.trajectory.step_ring import StepHistory
from lipcore.trajectory.table import points_of


class Reported(Listened):
    """A Trajectory's results."""

    def compute(self) -> MetricResult:
        self._raise_error()
        return super().compute()

    def plan(self) -> PlanLines:
        """Return what was chosen, the groups, and the bytes of every kind of state."""
        if self._numbers is not None:
            return PlanLines([PlanLine("copy", "holds numbers, and watches nothing")])
        self._require_bound()
        return PlanLines(plan_lines(self._built, self._watched, self._all))

    def on_device(self) -> list[OnDevice]:
        if self._numbers is not None:
            return []
        self._require_bound()
        return [part for tracker in self._built.all_trackers for part in tracker.on_device()]

    def finalize(self) -> MetricResult:
        """Return the open window's numbers; the class's docstring says what they are."""
        if self._numbers is not None:
            return self._numbers
        self._require_bound()
        result = self._empty_result()
        if self.keeps_parts:
            result.details["kept_by_other_ranks"] = len(self._all) - len(self._watched)
        add_quantities(result, self._built, self._stats, self.every_steps)
        self._trouble.look(self._model, self._all, self._tracker, self._built.gradients)
        return result

    def _empty_result(self) -> MetricResult:
        """Return the open window's details without its numbers."""
        result = MetricResult(self.name, every_steps=self.every_steps, mode=self._built.choice.mode)
        result.details["source"] = self._built.choice.source
        if self._rebased:
            result.details["rebased"] = self._rebased
        if skipped := sum(self._skipped):
            result.details["skipped_steps"] = skipped
        if self._jumps and any(0 < steps < self._tracker.window_steps for steps in self._jumps):
            result.details["jumped"] = True
        if self._late_moves:
            result.details["moved_after_steps"] = self._late_moves
        if self._apart:
            result.details["distance_apart_by"] = self._apart
        if self._built.gradients is not None:
            result.details.update({f"{stage}_off": why for stage, why in self._built.gradients.unknown.items()})
        if self._carried is not None:
            result.details["steps_of_other_parts"] = len(self._carried.steps)
        return result

    def rank_part(self) -> RankPart | str:
        """Return what the open window adds to that of all ranks, or why there is nothing to add."""
        if self._numbers is not None:
            return ONLY_NUMBERS
        return part_of(
            self._built, self._watched, self._stats, self.every_steps, self._holding, self._empty_result(),
            self._path_so_far, self._carried,
        )  # fmt: skip

    def element_variance(self) -> dict[str, Tensor]:
        """Return the variance of every element over the open window's points, 1 / (n + 1) sum (w_t - mean)^2, by
        parameter name (NaN before the first step). It needs ``stats=[..., "element_variance"]``, which keeps one
        more number per element, and two in long windows."""
        self._require_bound()
        copies = self._tracker.copies
        if copies is None or not copies.per_element:
            raise RuntimeError('element_variance: ask for it with stats=["element_variance", ...] in mode "exact"')
        counts = points_of(self._tracker.window_rows()).long().tolist()
        out = {}
        for i, parameter in enumerate(self._watched):
            m2 = self._tracker.merged(i)[1]
            assert m2 is not None
            points = counts[i]
            out[parameter.name] = (m2 / points).clamp(min=0) if points else torch.full_like(m2, torch.nan)
        return out

    def drain(self) -> StepHistory:
        """Return the norms of updates, weights and gradients of every single step since the last call, as far as the
        ring still has them; NaN where a step had no gradient. This waits for the device."""
        self._require_bound()
        self._raise_error()
        self._built.align()
        of_gradients = {stage: tracker.recent for stage, tracker in self._built.of_gradients.items()}
        return self._built.first.drain(of_gradients)

    @property
    def sketches(self) -> SketchHistory:
        """Sketches that were kept, for distances and angles between any two steps."""
        self._require_bound()
        tracker = self._built.trackers.get("sketch")
        if not isinstance(tracker, SketchTracker) or self._wanted.keep_every is None:
            raise RuntimeError('sketches: kept only with mode="sketch" and keep_every=')
        return tracker.history

    def reset(self) -> None:
        """Start a new window at the parameters' last observed values; cumulative path and reference stay."""
        self._require_bound()
        for tracker in self._built.all_trackers:
            tracker.reset()
        if self._built.gradients is not None:
            self._built.gradients.forget_unknown()
        self._carried = None
        self._jumps, self._late_moves = [], 0
        self._skipped = deque([0], maxlen=self._window_blocks)

    def advance(self) -> None:
        """Slide the window by a block."""
        self._require_bound()
        before = self._tracker.window_steps if self._jumps else 0
        for tracker in self._built.all_trackers:
            tracker.advance()
        if self._built.gradients is not None:
            self._built.gradients.forget_unknown()
        lost = before - self._tracker.window_steps if self._jumps else 0
        self._jumps = [steps - lost for steps in self._jumps if steps > lost]
        self._skipped.append(0)
