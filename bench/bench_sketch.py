"""The sketch against one plain read of the parameters, and against the textbook CountSketch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import interleave, ratios, threads
from stream import read_once, textbook_sketch

from lipcore import _core, functional
from lipcore.functional import reference

_BUCKETS = 4096


def _check(x: torch.Tensor, baseline: Any) -> None:
    part = x[:5000]
    expected = reference.sketch([part], [0], buckets=_BUCKETS, seed=0)
    torch.testing.assert_close(
        functional.sketch([part], [0], buckets=_BUCKETS, seed=0), expected, rtol=1e-12, atol=1e-12
    )
    # Both baselines do what they are said to do.
    assert abs(read_once(x, 1)() / float(x.double().square().sum()) - 1) < 1e-4
    assert abs(float(baseline().square().sum()) / float(x.double().square().sum()) - 1) < 0.2


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("name", "elements", "dtype"),
    [
        ("1e7, f32", 10**7, torch.float32),
        ("1e8, f32", 10**8, torch.float32),
        ("1e8, bf16", 10**8, torch.bfloat16),
    ],
)
def bench_sketch(benchmark: Any, report: Any, name: str, elements: int, dtype: torch.dtype, count: int) -> None:
    x = torch.randn(elements).to(dtype)
    _core.advise_huge_pages(x)
    textbook = textbook_sketch(x, _BUCKETS, count)
    _check(x, textbook)
    sketches, weights = torch.zeros(1, _BUCKETS, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    plan = _core.SketchPlan([({"x": x}, "x", "x", 0, 0)], sketches, weights, 0)
    with threads(count):
        calls = {"lipcore": plan.step, "read": read_once(x, count), "textbook": textbook}
        times = interleave(calls, seconds=5, rounds=9)
        benchmark.pedantic(plan.step, rounds=3, iterations=1)
    found = ratios(times, "lipcore")
    where = f"sketch, {name}, k = {_BUCKETS}, {count} thread{'s' * (count > 1)}"
    target = 1.35 if count == 1 else 1.5
    report.add(f"{where}: time over that of a plain read", 1 / found["read"], "x", target=target, better="lower")
    report.add(f"{where}: against the textbook scatter", found["textbook"], "x faster", target=3, better="higher")
