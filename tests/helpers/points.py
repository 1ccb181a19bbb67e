"""Where parameters have been, in float64, and what that says by definition."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from lipcore.metric.results import MetricResult, Window
from lipcore.trajectory.groups import by_block


class Points:
    """Points of the trajectory by look(); a jump() is not a step but moves where the next one starts."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.tensors = dict(tensors)
        self.reference = self.last = self.now()
        self.steps: list[dict[str, Tensor]] = []

    def now(self) -> dict[str, Tensor]:
        return {name: t.detach().double().flatten().clone() for name, t in self.tensors.items()}

    def look(self) -> None:
        now = self.now()
        self.steps.append({name: now[name] - self.last[name] for name in now})
        self.last = now

    def jump(self) -> None:
        self.last = self.now()

    def norms(self, *names: str) -> Tensor:
        """Of every step, of these tensors taken together (default all)."""
        names = names or tuple(self.tensors)
        return torch.stack([torch.cat([step[n] for n in names]).norm() for step in self.steps])

    def distance(self, *names: str) -> float:
        names = names or tuple(self.tensors)
        return float(torch.cat([self.last[n] - self.reference[n] for n in names]).norm())

    def check(self, window: Window | MetricResult, rel: float = 1e-5, *, distance: bool = True) -> None:
        """Path length, last and largest update, and distance of every tensor and in total."""
        result = window["trajectory"] if isinstance(window, Window) else window
        for place, names in [*((n, (n,)) for n in self.tensors), ("total", tuple(self.tensors))]:
            norms = self.norms(*names)
            close = lambda truth: pytest.approx(float(truth), rel=rel, abs=1e-9)  # noqa: E731
            if "path_length" in result:
                assert result.path_length[place].sum.value == close(norms.sum()), place
            assert result.update_norm[place].last.value == close(norms[-1]), place
            assert result.update_norm[place].max.value == close(norms.max()), place
            assert result.update_norm[place].last.count == len(norms)
            if distance:
                assert result.distance[place].last.value == close(self.distance(*names)), place


def counted_hooks(model: nn.Module) -> int:
    """All hooks on modules and parameters."""
    count = 0
    for module in model.modules():
        count += sum(len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks") and hooks)
    for parameter in model.parameters():
        count += len(parameter._backward_hooks or ())
        count += len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
    return count


def gradient_norms(model: nn.Module, scale: float = 1.0) -> dict[str, float]:
    """Of what lies in .grad: per parameter, group and in total."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            gradient = gradient.to_dense()
        square = 0.0 if gradient is None else float((gradient.double() / scale).square().sum())
        for place in (name, by_block(name), "total"):
            squares[place] = squares.get(place, 0.0) + square
    return {place: math.sqrt(square) for place, square in squares.items()}


def check_gradients(result: MetricResult, stage: str, steps: list[dict[str, float]], rel: float = 1e-6) -> None:
    quantity = result[stage]
    assert set(quantity) == set(steps[0])
    for place in quantity:
        truth = [step[place] for step in steps]
        assert quantity[place].last.value == pytest.approx(truth[-1], rel=rel), f"{stage} of {place}"
        assert quantity[place].mean.value == pytest.approx(sum(truth) / len(truth), rel=rel), f"{stage} of {place}"
        assert quantity[place].max.value == pytest.approx(max(truth), rel=rel), f"{stage} of {place}"
        assert quantity[place].last.count == len(truth)
