"""The trajectory step against what one would write with torch, and against the memory limit of the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import interleave, ratios, threads
from stream import stream_4r2w
from torch import Tensor

from lipcore import _core, reference
from lipcore.trajectory import Trajectory

_BYTES = 24  # per float32 element and step


class _Baseline:
    """The same statistics with torch's own operations; float32 sums, as they are written everywhere."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.prev = [p.clone() for p in params]
        self.ref = [p.clone() for p in params]
        self.mean = [torch.zeros_like(p) for p in params]
        self.count = 1

    def eager(self) -> Tensor:
        self.count += 1
        rows = []
        for w, p, z, m in zip(self.params, self.prev, self.ref, self.mean, strict=True):
            step, offset = w - p, w - z
            before = offset - m
            m.add_(before, alpha=1 / self.count)
            after = offset - m
            norms = torch.stack(
                [step.norm().square(), offset.norm().square(), torch.dot(before.view(-1), after.view(-1))]
            )
            rows.append(torch.cat([norms, torch.stack([step.abs().max(), w.norm().square(), (~w.isfinite()).sum()])]))
            p.copy_(w)
        return torch.stack(rows)

    def foreach(self) -> Tensor:
        self.count += 1
        step = torch._foreach_sub(self.params, self.prev)
        offset = torch._foreach_sub(self.params, self.ref)
        before = torch._foreach_sub(offset, self.mean)
        torch._foreach_add_(self.mean, before, alpha=1 / self.count)
        after = torch._foreach_sub(offset, self.mean)
        increments = [product.sum() for product in torch._foreach_mul(before, after)]
        columns = [torch._foreach_norm(step), torch._foreach_norm(offset), increments]
        columns += [torch._foreach_norm(step, float("inf")), torch._foreach_norm(self.params)]
        torch._foreach_copy_(self.prev, self.params)
        return torch.stack([torch.stack(list(column)) for column in columns])


def _lipcore(params: list[Tensor]) -> Callable[[], None]:
    trajectory = Trajectory((str(i), p) for i, p in enumerate(params))
    return trajectory.update


def _check(params: list[Tensor]) -> None:
    small = [p.flatten()[:5000].clone() for p in params[:3]]
    prev, ref = [[torch.randn_like(p) for p in small] for _ in range(2)]
    state = [prev, ref, [torch.randn(p.shape) for p in small]]
    expected, *_ = reference.trajectory_step(small, *state, count=3)
    out = torch.empty(len(small), 6, dtype=torch.float64)
    _core.trajectory_step(small, *state, 3, out)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("name", "sizes"), [("1e7 in 1 tensor", [10**7]), ("1e8 in 1 tensor", [10**8])])
def bench_stream_share(benchmark: Any, report: Any, name: str, sizes: list[int], count: int) -> None:
    params = [torch.randn(size) for size in sizes]
    _check(params)
    with threads(count):
        calls = {"lipcore": _lipcore(params), "stream": stream_4r2w(sum(sizes), count)}
        times = interleave(calls, seconds=6, rounds=15)
        share = ratios(times, "lipcore")["stream"]
        benchmark.pedantic(calls["lipcore"], rounds=3, iterations=1)
    speed = _BYTES * sum(sizes) / sorted(times["lipcore"])[len(times["lipcore"]) // 2] / 1e9
    title = f"trajectory, {name}, f32, {count} thread{'s' * (count > 1)}: share of the stream limit"
    report.add(title, share, "of limit", target=0.9, better="higher", gigabytes_per_second=speed)


@pytest.mark.parametrize("count", [1, 2])
def bench_bfloat16(benchmark: Any, report: Any, count: int) -> None:
    elements = 2 * 10**7
    params = [torch.randn(elements).bfloat16()]
    _check(params)
    with threads(count):
        # 16 bytes per bfloat16 element against 24 per float32: as many bytes in two thirds of the elements
        calls = {"lipcore": _lipcore(params), "stream": stream_4r2w(elements * 2 // 3, count)}
        times = interleave(calls, seconds=6, rounds=15)
        benchmark.pedantic(calls["lipcore"], rounds=3, iterations=1)
    title = f"trajectory, 2e7, bf16, {count} thread{'s' * (count > 1)}: share of the stream limit"
    report.add(title, ratios(times, "lipcore")["stream"], "of limit", target=0.85, better="higher")


@pytest.mark.parametrize("count", [1, 2])
def bench_against_torch(benchmark: Any, report: Any, count: int) -> None:
    params = [torch.randn(166_667) for _ in range(150)]
    _check(params)
    with threads(count), torch.no_grad():
        ours, baseline, other = _lipcore(params), _Baseline(params), _Baseline(params)
        times = interleave({"lipcore": ours, "eager": baseline.eager, "foreach": other.foreach}, seconds=12, rounds=11)
        benchmark.pedantic(ours, rounds=3, iterations=1)
    found = ratios(times, "lipcore")
    where = f"trajectory, 25e6 in 150 tensors, {count} thread{'s' * (count > 1)}"
    report.add(f"{where}: against the eager loop", found["eager"], "x faster", target=6, better="higher")
    report.add(f"{where}: against _foreach", found["foreach"], "x faster", target=10, better="higher")


def bench_against_compile(benchmark: Any, report: Any) -> None:
    # 15 of the 150 tensors: compiling all of them takes minutes, and the ratio is that of memory traffic.
    params = [torch.randn(1_666_667) for _ in range(15)]
    with threads(2), torch.no_grad():
        ours, baseline = _lipcore(params), _Baseline(params)
        compiled = torch.compile(_compilable(baseline))
        compiled(baseline.params, baseline.prev, baseline.ref, baseline.mean, torch.tensor(0.5))
        count = torch.tensor(0.5)

        def call() -> None:
            compiled(baseline.params, baseline.prev, baseline.ref, baseline.mean, count)

        times = interleave({"lipcore": ours, "compile": call}, seconds=6, rounds=11)
        benchmark.pedantic(ours, rounds=3, iterations=1)
    title = "trajectory, 25e6 in 15 tensors, 2 threads: against torch.compile"
    report.add(title, ratios(times, "lipcore")["compile"], "x faster", target=1.8, better="higher")


def _compilable(_: _Baseline) -> Callable[..., Tensor]:
    def step(params: list[Tensor], prev: list[Tensor], ref: list[Tensor], mean: list[Tensor], inv: Tensor) -> Tensor:
        rows = []
        for w, p, z, m in zip(params, prev, ref, mean, strict=True):
            step, offset = w - p, w - z
            before = offset - m
            new = m + before * inv
            after = offset - new
            sums = [(step * step).sum(), (offset * offset).sum(), (before * after).sum(), step.abs().amax()]
            rows.append(torch.stack([*sums, (w * w).sum(), (~w.isfinite()).sum().float()]))
            m.copy_(new)
            p.copy_(w)
        return torch.stack(rows)

    return step
