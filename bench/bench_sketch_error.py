"""What a sketch's numbers are off by on real trainings: the error over 20 seeds against exact copies."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from measure import threads
from small_transformer import train
from torch import Tensor

import lipcore
from lipcore.metric.results import MetricResult

if "mode" not in inspect.signature(lipcore.Trajectory).parameters:
    pytest.skip("this lipcore has no sketches", allow_module_level=True)

_STEPS, _SEEDS = 300, 20
# Relative, at 4096 buckets. The error goes with 1 / sqrt(buckets): a quarter at 65536.
_TARGETS = {"path_length": 0.012, "distance": 0.013, "variance": 0.025}


@cache
def _recorded(optimizer: str) -> tuple[list[str], list[list[Tensor]]]:
    """Names of the parameters and their values before the first step and after each."""
    points, names = [], []
    with threads(1):
        for model, _ in train(optimizer, _STEPS):
            names = [name for name, _ in model.named_parameters()]
            points.append([parameter.detach().clone() for parameter in model.parameters()])
    return names, points


def _replay(optimizer: str, buckets: int) -> tuple[MetricResult, list[MetricResult]]:
    """The exact result and one per seed, from one walk along the recorded points."""
    names, points = _recorded(optimizer)
    now = [tensor.clone() for tensor in points[0]]
    pairs = list(zip(names, now, strict=True))
    exact = lipcore.Trajectory(pairs)
    sketches = [lipcore.Trajectory(pairs, mode="sketch", buckets=buckets, seed=seed) for seed in range(_SEEDS)]
    for point in points[1:]:
        torch._foreach_copy_(now, point)
        for trajectory in (exact, *sketches):
            trajectory.update()
    return exact.compute(), [sketch.compute() for sketch in sketches]


def _value(result: MetricResult, quantity: str, place: str) -> float:
    series = getattr(result, quantity)[place]
    value: float = (series.sum if quantity == "path_length" else series.last).value
    return value


@pytest.mark.parametrize("buckets", [4096, 65536])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def bench_sketch_error(benchmark: Any, report: Any, optimizer: str, buckets: int) -> None:
    exact, sketches = benchmark.pedantic(_replay, (optimizer, buckets), rounds=1)

    def rms(quantity: str, place: str) -> float:
        true = _value(exact, quantity, place)
        errors = torch.tensor([_value(sketch, quantity, place) / true - 1 for sketch in sketches], dtype=torch.float64)
        return float(errors.square().mean().sqrt())

    groups = dict.fromkeys(lipcore.names.by_block(name) for name in _recorded(optimizer)[0])
    for quantity, target in _TARGETS.items():
        title = f"sketch, small transformer, {optimizer}, k = {buckets}: rms error of {quantity} over {_SEEDS} seeds"
        details = {"steps": _STEPS, "groups": {group: rms(quantity, group) for group in groups}}
        target *= (4096 / buckets) ** 0.5
        report.add(title, rms(quantity, "total"), "relative", target=target, better="lower", **details)
