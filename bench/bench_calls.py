"""What one call costs from Python when the tensors are small."""

from __future__ import annotations

from typing import Any

import torch
from measure import fastest, threads
from torch import nn

import lipcore
from lipcore import _core, functional
from lipcore.functional import reference


def bench_core_call(benchmark: Any, report: Any) -> None:
    x, out = torch.randn(4, 16), torch.empty(4, dtype=torch.float64)
    _core.sample_norms(x, out)
    torch.testing.assert_close(out, reference.sample_norms(x), rtol=1e-12, atol=0)
    seconds = fastest(lambda: _core.sample_norms(x, out))
    overhead = fastest(lambda: None)
    benchmark(_core.sample_norms, x, out)
    report.add("_core.sample_norms, [4, 16], out given", (seconds - overhead) * 1e6, "us", target=0.25, better="lower")


def bench_functional_call(benchmark: Any, report: Any) -> None:
    x = torch.randn(4, 16)
    torch.testing.assert_close(functional.sample_norms(x), reference.sample_norms(x), rtol=1e-12, atol=0)
    seconds = fastest(lambda: functional.sample_norms(x))
    eager = fastest(lambda: torch.linalg.vector_norm(x, dim=1))
    benchmark(functional.sample_norms, x)
    report.add(
        "functional.sample_norms, [4, 16]", seconds * 1e6, "us", target=2.5, better="lower", vector_norm=eager * 1e6
    )


def bench_normalized_norms_call(benchmark: Any, report: Any) -> None:
    delta, grad = torch.randn(4, 16), torch.randn(4)
    torch.testing.assert_close(
        functional.normalized_norms(delta, grad), reference.normalized_norms(delta, grad), rtol=1e-12, atol=0
    )
    seconds = fastest(lambda: functional.normalized_norms(delta, grad))
    benchmark(functional.normalized_norms, delta, grad)
    report.add("functional.normalized_norms, [4, 16]", seconds * 1e6, "us", target=2.5, better="lower")


def _step_of(sizes: list[int]) -> lipcore.Trajectory:
    trajectory = lipcore.Trajectory(nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes]))
    trajectory.update()
    return trajectory


def bench_trajectory_10_tensors(benchmark: Any, report: Any) -> None:
    trajectory = _step_of([100, 10, 320, 32, 16, 32, 16, 32, 32, 1])
    benchmark(trajectory.update)
    report.add("Trajectory.update, 10 tensors", fastest(trajectory.update) * 1e6, "us", target=5, better="lower")


def bench_trajectory_150_tensors(benchmark: Any, report: Any) -> None:
    trajectory = _step_of([16] * 150)
    with threads(1):
        seconds = fastest(trajectory.update, number=5000)
    benchmark(trajectory.update)
    report.add("Trajectory.update, 150 tensors of 16", seconds * 1e6, "us", target=12, better="lower")
