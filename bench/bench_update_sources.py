"""Updates from the optimizer's state against the difference to a stored copy, against torch, and the memory limit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import interleave, ratios, threads
from stream import stream_3r
from torch import Tensor, nn

from lipcore import functional
from lipcore.functional import reference
from lipcore.functional.update_rules import UpdateRule
from lipcore.trajectory import Trajectory
from lipcore.trajectory.sources import OptimizerSource

_BYTES = 12  # per float32 element and step: the parameter and two moments
_LR, _BETAS, _EPS, _DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


def _stepped(sizes: list[int]) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    """Parameters after a step with random gradients."""
    params = [nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = torch.optim.AdamW(params, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, fused=True)
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    return params, optimizer


def _source(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> OptimizerSource:
    owner: dict[str, Any] = {str(i): p for i, p in enumerate(params)}
    return OptimizerSource([optimizer], [(name, owner, name) for name in owner])


def _eager(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """The same numbers with torch's own operations; float32 sums, as they are written everywhere."""

    @torch.no_grad()
    def call() -> Tensor:
        rows = []
        for p in params:
            state = optimizer.state[p]
            step = float(state["step"])
            root = (1 - _BETAS[1] ** step) ** 0.5
            u = (state["exp_avg"] / (1 - _BETAS[0] ** step)) / (state["exp_avg_sq"].sqrt() / root + _EPS)
            dw = (_LR * u + _LR * _DECAY * p) / (1 - _LR * _DECAY)
            norms = [dw.norm().square(), dw.abs().max(), p.norm().square(), u.norm().square(), (~dw.isfinite()).sum()]
            rows.append(torch.stack(norms))
        return torch.stack(rows)

    return call


def _check(source: OptimizerSource, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    rule = UpdateRule.of_step(
        _LR, shrink=_LR * _DECAY, adaptive=True, first_scale=10.0, second_scale=(1 - _BETAS[1]) ** -0.5, eps=_EPS
    )
    few = params[:3]
    states = [optimizer.state[p] for p in few]
    lists = [[s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]
    expected, expected_squares = reference.update_sums(few, *lists, [rule] * len(few))
    rows, squares = source.sums()
    torch.testing.assert_close(rows[: len(few)], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares[:, : len(few)], expected_squares, rtol=1e-6, atol=0, equal_nan=True)


def _tensors() -> int:
    gc.collect()
    return sum(x.numel() * x.element_size() for x in gc.get_objects() if issubclass(type(x), Tensor))


@pytest.mark.parametrize("count", [1, 2])
def bench_against_differences(benchmark: Any, report: Any, count: int) -> None:
    sizes = [166_667] * 150
    params, optimizer = _stepped(sizes)
    before = _tensors()
    source = _source(params, optimizer)
    source.sums()
    kept = _tensors() - before
    assert kept == 88 * len(params), "something is kept per element"
    _check(source, params, optimizer)
    # Half the bytes; but its copies lie in huge pages, and the optimizer's tensors where torch put them.
    trajectory = Trajectory((str(i), p) for i, p in enumerate(params))
    with threads(count):
        calls = {
            "state": source.sums,
            "difference": trajectory.update,
            "eager": _eager(params, optimizer),
            "stream": stream_3r(sum(sizes), count),
        }
        times = interleave(calls, seconds=10, rounds=11)
        benchmark.pedantic(source.sums, rounds=3, iterations=1)
    found = ratios(times, "state")
    seconds = sorted(times["state"])[len(times["state"]) // 2]
    where = f"updates from AdamW's state, 25e6 in 150 tensors, {count} thread{'s' * (count > 1)}"
    details = {"milliseconds": 1e3 * seconds, "gigabytes_per_second": _BYTES * sum(sizes) / seconds / 1e9}
    report.add(f"{where}: against the trajectory step", found["difference"], "x faster", target=1.3, better="higher")
    report.add(f"{where}: against the eager loop", found["eager"], "x faster", target=10, better="higher")
    share = f"{where}: share of the stream limit"
    report.add(share, found["stream"], "of limit", target=0.85, better="higher", **details)
    report.add(f"{where}: persistent bytes per tensor", kept / len(params), "B", target=88, better="lower")


def bench_small(benchmark: Any, report: Any) -> None:
    """What looking everything up afresh costs: 150 tensors of 16 elements."""
    params, optimizer = _stepped([16] * 150)
    source = _source(params, optimizer)
    lists: list[Any] = [[p.detach() for p in params]]
    lists += [[optimizer.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")]
    rules = [UpdateRule(_LR, adaptive=True)] * len(params)
    with threads(1):
        times = interleave({"source": source.sums, "op": lambda: functional.update_sums(*lists, rules)}, seconds=2)
        benchmark.pedantic(source.sums, rounds=3, iterations=10)
    microseconds = 1e6 * sorted(times["source"])[len(times["source"]) // 2]
    report.add("updates from AdamW's state, 150 x 16", microseconds, "us", target=300, better="lower")
