"""Time and memory of a trajectory step from 1e3 to 1e8 parameters; bench/plots.py draws these rows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contenders import CONTENDERS, check
from measure import interleave, needs_memory, threads
from memory import peak_growth
from stream import stream_3r2w

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_BYTES_PER_STEP = {"f32": 20, "bf16": 14}
# Previous and reference in the parameter's dtype, mean in float32; 5 % for the allocator and the interpreter.
_STATE_BYTES = {"f32": 12 * 1.05, "bf16": 8 * 1.05}


def _sizes(elements: int, tensors: int) -> list[int]:
    return [elements // tensors] * tensors


def _where(elements: int, tensors: int, dtype: str) -> str:
    return f"trajectory, {elements:.0e} in {tensors} tensor{'s' * (tensors > 1)}, {dtype}".replace("e+0", "e")


def _contenders(tensors: int) -> list[str]:
    # Each shape is compiled anew: a second for one tensor, 7 to 12 for ten, which bench_against_compile's 15 stand for.
    return ["lipcore", "eager", "eager with buffers", "foreach", *(["compile"] if tensors == 1 else [])]


def _cases() -> Iterator[Any]:
    for elements in (10**e for e in range(3, 9)):
        for tensors, count, dtype in itertools.product([1, 10], [1, 2], _DTYPES):
            # Half a minute each, of which the baselines take nine tenths; one of four stands for the rest.
            slow = elements >= 10**8 and (tensors, dtype) != (1, "f32")
            yield pytest.param(elements, tensors, count, dtype, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("elements", "tensors", "count", "dtype"), list(_cases()))
def bench_scaling(benchmark: Any, report: Any, elements: int, tensors: int, count: int, dtype: str) -> None:
    needs_memory(100 * elements)
    params = [torch.randn(size).to(_DTYPES[dtype]) for size in _sizes(elements, tensors)]
    check(params)
    with threads(count), torch.no_grad():
        calls = {name: CONTENDERS[name](params) for name in _contenders(tensors)}
        if count == 1 or elements >= 10**7:  # the stream starts threads at every call, which has to be lost in it
            calls["stream"] = stream_3r2w(elements * _BYTES_PER_STEP[dtype] // _BYTES_PER_STEP["f32"], count)
        large = elements >= 10**8
        times = interleave(calls, seconds=2 if large else 1.2, rounds=3 if large else 7)
        benchmark.pedantic(calls["lipcore"], rounds=3, iterations=1)
    medians = {name: statistics.median(found) for name, found in times.items()}
    details = {"elements": elements, "tensors": tensors, "threads": count, "dtype": dtype, "seconds": medians}
    title = f"{_where(elements, tensors, dtype)}, {count} thread{'s' * (count > 1)}: time per step"
    report.add(title, medians["lipcore"] * 1e6, "us", **details)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("tensors", [1, 10])
@pytest.mark.parametrize("elements", [4 * 10**7, pytest.param(10**8, marks=pytest.mark.slow)])
def bench_memory(benchmark: Any, report: Any, elements: int, tensors: int, dtype: str) -> None:
    """What each needs beyond the parameters at its peak, at sizes that hide the 32 MB which glibc may keep back."""
    needs_memory(60 * elements)
    names = _contenders(tensors)
    found = {name: peak_growth(name, elements, tensors, dtype) / elements for name in names[1:]}
    found["lipcore"] = benchmark.pedantic(peak_growth, ("lipcore", elements, tensors, dtype), rounds=1) / elements
    title = f"{_where(elements, tensors, dtype)}: peak memory beyond the parameters"
    details = {"elements": elements, "tensors": tensors, "dtype": dtype, "bytes_per_parameter": found}
    report.add(title, found["lipcore"], "B each", target=_STATE_BYTES[dtype], better="lower", **details)
