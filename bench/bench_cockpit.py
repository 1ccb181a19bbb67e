"""The step against cockpit 1.0.2 (Schneider, Dangel, Hennig, NeurIPS 2021), the closest published tool that runs.

Both get the same parameters at every step. cockpit's UpdateSize and Distance give two of lipcore's numbers per
parameter, as Python floats from float32 sums; lipcore's step also does path length, variance, largest update, weight
norm and non-finite counts, per group and in total. No backward pass is timed: these quantities need nothing from it.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import pytest
import torch
from contenders import cockpit, lipcore
from measure import interleave, needs_memory, ratios, threads
from memory import peak_growth
from torch import Tensor

from lipcore import Trajectory

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pkg_resources is deprecated
    pytest.importorskip("cockpit", reason="no cockpit here; `make bench-peers` installs it", exc_type=ImportError)


def _check(params: list[Tensor], call: Any, trajectory: Trajectory) -> dict[str, float]:
    """Both see one update; each number within its precision of float64. Returns cockpit's largest relative errors."""
    before = [p.double() for p in params]
    call()
    for p in params:
        p.add_(torch.randn_like(p), alpha=1e-3)
    update_size, distance = call()
    trajectory.update()
    result = trajectory.compute()
    errors: dict[str, float] = {"UpdateSize": 0.0, "Distance": 0.0}
    for i, (p, start) in enumerate(zip(params, before, strict=True)):
        true = float(torch.linalg.vector_norm(p.double() - start))
        assert result.update_norm[str(i)].last.value == pytest.approx(true, rel=1e-6)
        assert result.distance[str(i)].last.value == pytest.approx(true, rel=1e-6)
        theirs = {"UpdateSize": update_size.output[0][i], "Distance": distance.output[1][i]}
        errors = {name: max(error, abs(theirs[name] / true - 1)) for name, error in errors.items()}
    assert max(errors.values()) < 0.05, errors
    return errors


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tensors", [1, 10])
@pytest.mark.parametrize("elements", [10**e for e in range(3, 9)], ids="{:.0e}".format)
def bench_cockpit(benchmark: Any, report: Any, elements: int, tensors: int, count: int) -> None:
    needs_memory(60 * elements)
    params = [torch.randn(elements // tensors, requires_grad=True) for _ in range(tensors)]
    with threads(count), torch.no_grad():
        errors = _check(params, cockpit(params), Trajectory((str(i), p) for i, p in enumerate(params)))
        calls = {"lipcore": lipcore(params), "cockpit": cockpit(params)}
        times = interleave(calls, seconds=3 if elements >= 10**8 else 1, rounds=7)
        benchmark.pedantic(calls["lipcore"], rounds=3, iterations=1)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    details = {"elements": elements, "tensors": tensors, "threads": count, "dtype": "f32", "seconds": seconds}
    where = f"{elements:.0e} in {tensors} tensor{'s' * (tensors > 1)}, f32".replace("e+0", "e")
    title = f"trajectory, {where}, {count} thread{'s' * (count > 1)}: against cockpit's UpdateSize and Distance"
    found = ratios(times, "lipcore")["cockpit"]
    report.add(title, found, "x faster", target=1.0, better="higher", **details, relative_error=errors)


@pytest.mark.parametrize("tensors", [1, 10])
def bench_cockpit_memory(benchmark: Any, report: Any, tensors: int) -> None:
    elements = 4 * 10**7
    ours = peak_growth("lipcore", elements, tensors, "f32") / elements
    theirs = benchmark.pedantic(peak_growth, ("cockpit", elements, tensors, "f32"), rounds=1) / elements
    title = (
        f"trajectory, 4e7 in {tensors} tensor{'s' * (tensors > 1)}, f32: cockpit's peak memory beyond the parameters"
    )
    report.add(title, theirs, "B each", bytes_per_parameter={"cockpit": theirs, "lipcore": ours})
