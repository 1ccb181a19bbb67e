"""Weighted sums of samples' gradients, their Gram matrix and inner products, against the plain step and what is done
without lipcore: a second forward and backward pass with weighted losses, vmap(grad), and one sample at a time."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import interleave, threads
from per_sample_models import MODELS, Task
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lipcore

_TITLES = {
    "mlp": "MLP 784-1024-1024-10, batch 256",
    "cnn": "CNN with GroupNorm, 3x32x32, batch 64",
    "gpt": "GPT-like, 4 layers of 256, T=256, batch 8",
}
_MODULES_OF_VMAP = ("cnn", "gpt")  # of the MLP it takes a hundred plain steps
_LEAST = 1e-4  # relative error of sums and products in float32


def _clipped(norms: Tensor) -> Tensor:
    return lipcore.clip_factors(norms, 1.0)


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double()


class Ways:
    """The ways for one model, each on a copy of its own, so that no tap is in another's step."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.names = [name for name, _ in task.model.named_parameters()]
        self.reference = {name: torch.randn_like(p) for name, p in task.model.named_parameters()}

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self._task.model)

    def _step(self, model: nn.Module) -> None:
        model.zero_grad()
        self._task.losses(model(self._task.x), self._task.y).mean().backward()

    def plain(self) -> Callable[[], object]:
        model = self._copy()
        return lambda: self._step(model)

    def norms(self, use: Callable[[Any], Any], **options: Any) -> Callable[[], Any]:
        model = self._copy()
        metric = lipcore.PerSampleGradNorms(model, loss_reduction="mean", noise_scale=False, **options)
        return lambda: (self._step(model), use(metric))[1]

    def dots(self, count: int) -> Callable[[], Tensor]:
        model = self._copy()
        reference: Any = self.reference if count == 1 else [self.reference] * count
        metric = lipcore.PerSampleGradDots(model, reference=reference, loss_reduction="mean")
        return lambda: (self._step(model), metric.per_sample)[1]

    def second_pass(self) -> Callable[[], dict[str, Tensor]]:
        model, plain = self._copy(), self._copy()
        metric = lipcore.PerSampleGradNorms(model, loss_reduction="mean", noise_scale=False)

        def step() -> dict[str, Tensor]:
            self._step(model)
            factors = _clipped(metric.per_sample)
            plain.zero_grad()
            (self._task.losses(plain(self._task.x), self._task.y) * factors).sum().backward()
            return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}

        return step

    def by_vmap(self) -> Callable[[], Tensor]:
        model = self._copy()
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss_of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self._task.losses(functional_call(model, values, (x[None],)), y[None]).sum()

        per_sample = vmap(grad(loss_of), in_dims=(None, 0, 0))

        def step() -> Tensor:
            self._step(model)
            found = per_sample(parameters, self._task.x, self._task.y)
            return torch.stack([found[n].flatten(1) @ self.reference[n].flatten() for n in self.names]).sum(0)

        return step

    def one_at_a_time(self, sample: int) -> Tensor:
        model, task = self._copy(), self._task
        loss = task.losses(model(task.x[sample : sample + 1]), task.y[sample : sample + 1]).sum()
        return _flat(dict(zip(self.names, torch.autograd.grad(loss, list(model.parameters())), strict=True)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap says so of attention
@pytest.mark.parametrize("model", _TITLES)
def bench_sums_and_dots(benchmark: Any, report: Any, model: str) -> None:
    torch.manual_seed(0)
    ways = Ways(MODELS[model]())
    calls: dict[str, Callable[[], Any]] = {
        "plain": ways.plain(),
        "control": ways.plain(),
        "norms": ways.norms(lambda m: m.per_sample),
        "norms, factors kept": ways.norms(lambda m: m.per_sample, keep_factors=True),
        "clipped sum": ways.norms(lambda m: m.weighted_sum(_clipped, set_grad=True), keep_factors=True),
        "clipped sum by a second pass": ways.second_pass(),
        "Gram matrix": ways.norms(lambda m: m.gram()["total"], keep_factors=True),
        "inner products": ways.dots(1),
        "inner products with 4": ways.dots(4),
    }
    if model in _MODULES_OF_VMAP:
        calls["inner products by vmap"] = ways.by_vmap()
    with threads(1):
        first, second = _flat(calls["clipped sum"]()), _flat(calls["clipped sum by a second pass"]())
        errors = {"clipped sum": float((first - second).norm() / second.norm())}
        alone, reference = ways.one_at_a_time(1), _flat(ways.reference)
        length = float(alone.norm() * reference.norm())
        errors["inner products"] = abs(float(calls["inner products"]()[1] - alone @ reference)) / length
        errors["Gram matrix"] = abs(float(calls["Gram matrix"]()[1, 1] / alone.square().sum()) - 1)
        assert max(errors.values()) <= _LEAST
        times = interleave(calls, seconds=20, rounds=5)
        benchmark.pedantic(calls["plain"], rounds=1)
    for name, each in times.items():
        if name == "plain":
            continue
        ratio = statistics.median(t / p for t, p in zip(each, times["plain"], strict=True))
        details = {"error": errors[name]} if name in errors else {}
        report.add(f"per-sample {name}: {_TITLES[model]}", ratio, "x plain", **details)
