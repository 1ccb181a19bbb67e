"""TensorStats beside a training step: at every_steps=10, and against the same numbers by torch's operations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import watched_models
from measure import interleave, ratios, threads
from torch import Tensor, nn
from watched_models import Made

from lipcore import Monitor, TensorStats, functional
from lipcore.functional import reference

EVERY = 10


class Naive:
    """What one would write: hooks, and mean, std, min, max, kurtosis, zeros and histc of every tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.numbers: dict[tuple[str, str], list[Tensor]] = {}
        self.model, self.on, self.steps = model, False, 0
        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(self.came, name))

    def came(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        if self.on and isinstance(output, Tensor) and not (name and isinstance(module, nn.Sequential)):
            self.add("output", name, output)

    def add(self, quantity: str, name: str, x: Tensor) -> None:
        x = x.detach().float()
        mean, sd = x.mean(), x.std(correction=0)
        kurtosis = ((x - mean) / sd).pow(4).mean()
        numbers = [mean, sd, x.min(), x.max(), kurtosis, (x == 0).float().mean(), (~x.isfinite()).sum()]
        self.numbers[quantity, name] = [*numbers, magnitudes(x)]

    def begin(self) -> None:
        self.steps += 1
        self.on = self.steps % EVERY == 0

    def end(self) -> None:
        for name, parameter in self.model.named_parameters() if self.on else ():
            self.add("parameter", name, parameter)
            if parameter.grad is not None:
                self.add("gradient", name, parameter.grad)


def magnitudes(x: Tensor) -> Tensor:
    return torch.histc(x.abs().clamp(min=1e-30).log2(), 64, -32, 32)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(width, width) for _ in range(4))
        self.num_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        heads = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.transpose(1, 2) for t in heads)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


def gpt() -> Made:
    """Two layers of 256, 4 x 128 tokens: of the larger one in the table of per-sample norms all ways together take a
    quarter of an hour."""
    blocks = [Block(256, 4) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(1000, 256), *blocks, nn.LayerNorm(256), nn.Linear(256, 1000))
    return model, torch.randint(1000, (4, 128)), 1000


GPT = "GPT-like model (2 layers of 256), T=128, batch 4"
MODELS: dict[str, tuple[Callable[[], Made], str]] = {"gpt": (gpt, GPT), **watched_models.MODELS}
WISHES: dict[str, dict[str, Any]] = {
    "TensorStats": {},
    "with attention and logits": {"attention": "auto", "logits": True},
}


class Training:
    """A training that is watched in one of the ways."""

    def __init__(self, make: Callable[[], Made], way: str) -> None:
        torch.manual_seed(0)
        self.model, self.x, classes = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.y = torch.randint(classes, self.x.shape[:1] if self.x.is_floating_point() else self.x.shape).flatten()
        self.naive = Naive(self.model) if way == "naive" else None
        if way in WISHES:
            self.metric = TensorStats(every_steps=EVERY, **WISHES[way])
            self.monitor = Monitor(self.model, self.optimizer, metrics=[self.metric], window_steps=None)

    def step(self) -> None:
        if self.naive is not None:
            self.naive.begin()
        nn.functional.cross_entropy(self.model(self.x).flatten(0, -2), self.y).backward()
        if self.naive is not None:
            self.naive.end()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ten(self) -> None:
        """Whole rounds of sampled and other steps."""
        for _ in range(EVERY):
            self.step()


def check(make: Callable[[], Made]) -> float:
    """The numbers of one sampled step are those of the naive version; the largest relative difference of a standard
    deviation. That one measures parameters before the step, hence outputs and gradients alone."""
    ours, theirs = Training(make, "TensorStats"), Training(make, "naive")
    ours.ten()
    theirs.ten()
    assert theirs.naive is not None
    result, worst, places = ours.metric.compute(), 0.0, 0
    for (quantity, name), (mean, sd, *others, _) in theirs.naive.numbers.items():
        if quantity == "parameter":
            continue
        found = result[quantity][name or "(model)"]
        if float(sd) < 1e-6 * float(mean.abs()):
            continue  # torch's float32 says nothing there
        for reducer, expected in zip(("min", "max", "kurtosis", "zeros", "nonfinite"), others, strict=True):
            close = math.isclose(found[reducer].value, float(expected), rel_tol=1e-2, abs_tol=1e-7)
            assert close, (quantity, name, reducer, found[reducer].value, float(expected))
        assert abs(found["mean"].value - float(mean)) <= 1e-3 * float(sd)
        worst, places = max(worst, abs(found["sd"].value / float(sd) - 1)), places + 1
    assert worst <= 1e-3
    assert places > 10
    assert result.details["sampled_steps"] == 1
    return worst


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2])
def bench_beside_a_step(benchmark: Any, report: Any, name: str, count: int) -> None:
    make, title = MODELS[name]
    with threads(count):
        difference = check(make)
        ways = ("plain", "control", *WISHES, "naive")
        calls = {way: Training(make, way).ten for way in ways}
        found = ratios(interleave(calls, seconds=40, rounds=7), "plain")
        benchmark.pedantic(calls["TensorStats"], rounds=1, iterations=1)
    where = f"TensorStats(every_steps={EVERY}), {title}, {count} thread{'s' * (count > 1)}"
    details = {"control": found["control"], "difference": difference}
    report.add(where, found["TensorStats"], "x plain", target=1.05, better="lower", **details)
    report.add(f"{where}: attention and logits too", found["with attention and logits"], "x plain", **details)
    report.add(f"{where}: the same by torch's operations", found["naive"], "x plain", **details)


def naive_operator(tensors: list[Tensor]) -> list[Tensor]:
    numbers = []
    for x in tensors:
        mean, sd = x.mean(), x.std(correction=0)
        kurtosis, zeros = ((x - mean) / sd).pow(4).mean(), (x == 0).float().mean()
        numbers.append(torch.stack([mean, sd, x.min(), x.max(), kurtosis, zeros]))
        numbers.append(magnitudes(x))
    return numbers


SIZES = {"one of 2^24": [1 << 24], "150 of 2^16": [1 << 16] * 150, "150 of 256": [256] * 150}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SIZES)
def bench_operator(benchmark: Any, report: Any, case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size).to(dtype) for size in SIZES[case]]
    for got, truth in zip(functional.tensor_stats(tensors[:3]), reference.tensor_stats(tensors[:3]), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-6)
    calls = {
        "lipcore": lambda: functional.tensor_stats(tensors),
        "torch": lambda: naive_operator([tensor.float() for tensor in tensors]),
    }
    with threads(1):
        times = interleave(calls, seconds=6)
        benchmark(calls["lipcore"])
    title = f"tensor_stats, {case}, {str(dtype)[6:]}, 1 thread"
    details = {"nanoseconds_per_element": min(times["lipcore"]) / sum(SIZES[case]) * 1e9}
    report.add(f"{title}: against torch", ratios(times, "lipcore")["torch"], "x faster", **details)
