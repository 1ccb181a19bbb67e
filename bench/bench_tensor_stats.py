"""TensorStats beside a training step: at every_steps=10, and against the same numbers by torch's operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import interleave, ratios, threads
from small_transformer import SmallTransformer
from torch import Tensor, nn

from lipcore import Monitor, TensorStats, functional
from lipcore.functional import reference

EVERY = 10


class Naive:
    """What one would write: hooks, and mean, std, min, max, zeros, kurtosis and histc of every tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.numbers: dict[tuple[str, str], list[Tensor]] = {}
        self.model, self.on, self.steps = model, False, 0
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, a, out, name=name: self.on and self.add("output", name, out))

    def add(self, quantity: str, name: str, x: Any) -> None:
        if not isinstance(x, Tensor):
            return
        x = x.detach().float()
        mean, sd = x.mean(), x.std(correction=0)
        kurtosis = ((x - mean) / sd).pow(4).mean()
        size = x.abs().clamp(min=1e-30).log2()
        numbers = [mean, sd, x.min(), x.max(), kurtosis, (x == 0).float().mean(), (~x.isfinite()).sum()]
        self.numbers[quantity, name] = [*numbers, torch.histc(size, 64, -32, 32)]

    def begin(self) -> None:
        self.steps += 1
        self.on = self.steps % EVERY == 0

    def end(self) -> None:
        if self.on:
            for name, parameter in self.model.named_parameters():
                self.add("parameter", name, parameter)
                self.add("gradient", name, parameter.grad)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(width, width) for _ in range(4))
        self.num_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).mT for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.mT.transpose(1, 2) for t in (q, k, v))
        y: Tensor = self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
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


def gpt() -> tuple[nn.Module, Tensor, int]:
    """Four layers of 256, 8 x 256 tokens, as in the table of per-sample norms."""
    model = nn.Sequential(
        nn.Embedding(1000, 256), *(Block(256, 4) for _ in range(4)), nn.LayerNorm(256), nn.Linear(256, 1000)
    )
    return model, torch.randint(1000, (8, 256)), 1000


def transformer() -> tuple[nn.Module, Tensor, int]:
    return SmallTransformer(), torch.randint(32, (16, 32)), 32


def mlp() -> tuple[nn.Module, Tensor, int]:
    return (
        nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
        torch.randn(256, 784),
        10,
    )


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, int]], str]] = {
    "gpt": (gpt, "GPT-like model (4 layers of 256), T=256, batch 8"),
    "transformer": (transformer, "small transformer, 16 x 32 tokens"),
    "mlp": (mlp, "MLP 784-1024-1024-10, batch 256"),
}


def steps_of(make: Callable[[], tuple[nn.Module, Tensor, int]], watch: str) -> tuple[Callable[[], None], Any]:
    torch.manual_seed(0)
    model, x, classes = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    y = torch.randint(classes, x.shape if x.dim() == 2 and not x.is_floating_point() else x.shape[:1])
    naive = Naive(model) if watch == "naive" else None
    wishes: dict[str, Any] = (
        {"every_steps": EVERY}
        if watch == "TensorStats"
        else {"every_steps": EVERY, "attention": "auto", "logits": True}
    )
    metric = TensorStats(**wishes) if watch.startswith("TensorStats") else None
    monitor = None if metric is None else Monitor(model, optimizer, metrics=[metric], window_steps=None)

    def step() -> None:
        if naive is not None:
            naive.begin()
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        if naive is not None:
            naive.end()
        optimizer.step()
        optimizer.zero_grad()

    return step, naive if metric is None else metric


def check(make: Callable[[], tuple[nn.Module, Tensor, int]]) -> float:
    """The numbers of one sampled step are those of the naive version; the largest relative difference. The naive one
    measures parameters before the step, hence outputs and gradients alone."""
    (one, metric), (other, naive) = steps_of(make, "TensorStats"), steps_of(make, "naive")
    for _ in range(EVERY):
        one()
        other()
    result, worst = metric.compute(), 0.0
    for (quantity, name), (mean, sd, low, high, kurtosis, zeros, nonfinite, _) in naive.numbers.items():
        place = name or "(model)"
        if quantity == "parameter" or place not in result.get(quantity, ()):
            continue
        found = result[quantity][place]
        for reducer, expected in (("sd", sd), ("min", low), ("max", high), ("zeros", zeros), ("nonfinite", nonfinite)):
            assert math.isclose(found[reducer].value, float(expected), rel_tol=1e-4, abs_tol=1e-9), (
                quantity,
                place,
                reducer,
            )
            worst = max(worst, abs(found[reducer].value - float(expected)) / (abs(float(expected)) + 1e-30))
        assert abs(found["mean"].value - float(mean)) <= 1e-4 * float(sd)
        assert math.isclose(found["kurtosis"].value, float(kurtosis), rel_tol=1e-2)
    assert result.details["sampled_steps"] == 1
    return worst


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2])
def bench_beside_a_step(benchmark: Any, report: Any, name: str, count: int) -> None:
    make, title = MODELS[name]
    with threads(count):
        difference = check(make)
        ways = ("plain", "control", "TensorStats", "with attention and logits", "naive")
        watches = {"with attention and logits": "TensorStats and more"}
        calls = {way: _ten(steps_of(make, watches.get(way, way))[0]) for way in ways}
        found = ratios(interleave(calls, seconds=40, rounds=15), "plain")
        benchmark.pedantic(calls["TensorStats"], rounds=1, iterations=1)
    where = f"TensorStats(every_steps={EVERY}), {title}, {count} thread{'s' * (count > 1)}"
    details = {"control": found["control"], "difference": difference}
    report.add(where, found["TensorStats"], "x plain", target=1.05, better="lower", **details)
    report.add(f"{where}: attention and logits too", found["with attention and logits"], "x plain", **details)
    report.add(f"{where}: the same by torch's operations", found["naive"], "x plain", **details)


def _ten(step: Callable[[], None]) -> Callable[[], None]:
    """Whole rounds of sampled and other steps."""

    def call() -> None:
        for _ in range(EVERY):
            step()

    return call


def naive_operator(tensors: list[Tensor]) -> list[Tensor]:
    numbers = []
    for x in tensors:
        mean, sd = x.mean(), x.std(correction=0)
        numbers.append(
            torch.stack([mean, sd, x.min(), x.max(), ((x - mean) / sd).pow(4).mean(), (x == 0).float().mean()])
        )
        numbers.append(torch.histc(x.abs().clamp(min=1e-30).log2(), 64, -32, 32))
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
        "torch": lambda: naive_operator([t.float() for t in tensors]),
    }
    with threads(1):
        times = interleave(calls, seconds=6)
        benchmark(calls["lipcore"])
    elements = sum(SIZES[case])
    title = f"tensor_stats, {case}, {str(dtype)[6:]}, 1 thread"
    nanoseconds = min(times["lipcore"]) / elements * 1e9
    report.add(
        f"{title}: against torch", ratios(times, "lipcore")["torch"], "x faster", nanoseconds_per_element=nanoseconds
    )
