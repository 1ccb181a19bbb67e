"""Norms of the batch's gradient, before and after clipping, per tensor, group and in total."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lipcore import _core, functional
from lipcore.metric.results import MetricResult
from lipcore.trajectory.describe import GRADIENTS
from lipcore.trajectory.parameters import Part
from lipcore.trajectory.tracker import Tracker


class Gradients:
    """What backward left in `.grad`, and what the optimizer finds there. A backward pass overwrites what the one before
    it left: under gradient accumulation the step counts the last, which holds the sum."""

    def __init__(self, parts: list[Part], ring: int) -> None:
        self._parts = parts
        self.trackers = {stage: Tracker(parts, ring=ring, copies=False) for stage in GRADIENTS}
        self._before: Tensor | None = None  # what the last backward pass left
        self._used: Tensor | None = None  # what the optimizers found
        self.missed = 0  #: steps with gradients of which nobody said that backward had ended

    def observe_before_clipping(self, scale: Tensor | float = 1.0) -> None:
        """After backward; `scale` is what the loss was multiplied by."""
        self._before = self._sums(scale)

    def observe_used(self, optimizer: Optimizer | None = None) -> None:
        """Right before the optimizer's step. Without one: what all of them use."""
        # A fused optimizer takes the scale out of the gradients itself.
        scale = getattr(optimizer, "grad_scale", None)
        sums = self._sums(1.0 if scale is None else scale)
        if self._used is None or optimizer is None:
            self._used = sums  # others' parameters too, until their own call
            return
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        rows = [i for i, part in enumerate(self._parts) if id(part.tensor) in own or id(part.shadow) in own]
        self._used[rows] = sums[rows]

    def observe_step(self) -> None:
        """The step was made."""
        before, used, self._before, self._used = self._before, self._used, None, None
        stages = []
        if used is not None:
            stages.append((self.trackers["clipped_grad_norm"], used))
        if before is not None:
            stages.append((self.trackers["grad_norm"], before))
        elif any(_gradient(part) is not None for part in self._parts):
            self.missed += 1
        for tracker, sums in stages:
            if tracker.observe(sums):
                tracker.settle()

    def _sums(self, scale: Tensor | float) -> Tensor:
        gradients = [_gradient(part) for part in self._parts]
        sums = torch.zeros(len(gradients), _core.STEP_COLUMNS, dtype=torch.float64, device="cpu")
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        dense = [_dense(gradients[i]) for i in there]  # type: ignore[arg-type]
        if dense and not dense[0].is_cpu:
            sums = sums.to(dense[0].device)
            norms = torch.cat([functional.sample_norms(g.reshape(1, g.numel())) for g in dense])
            sums[there, 0] = sums[there, 4] = torch.where(norms.isfinite(), norms.square(), torch.nan)
            sums[there, 5] = (~norms.isfinite()).double()
        elif dense:
            found = torch.empty(len(dense), _core.STEP_COLUMNS, dtype=torch.float64, device="cpu")
            _core.square_sums(dense, found)
            sums[there] = found
        if isinstance(scale, Tensor) or scale != 1.0:
            sums[:, [0, 4]] /= torch.as_tensor(scale, dtype=torch.float64, device=sums.device) ** 2
        return sums

    def describe(self, result: MetricResult, wanted: frozenset[str]) -> None:
        """grad_norm and clipped_grad_norm."""
        for stage, tracker in self.trackers.items():
            if stage not in wanted or not tracker.seen:
                continue
            tracker.described_rows().add_norms_to(result, stage)

    def state_dict(self) -> dict[str, Any]:
        """Both stages'."""
        return {stage: tracker.state_dict() for stage, tracker in self.trackers.items()}


def _gradient(part: Part) -> Tensor | None:
    return (part.tensor if part.shadow is None else part.shadow).grad


def _dense(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return (
        gradient.detach() if torch.ops.aten.is_non_overlapping_and_dense(gradient) else gradient.detach().contiguous()
    )
