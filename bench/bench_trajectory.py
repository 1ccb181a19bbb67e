"""The trajectory step against what one would write with torch, and against the memory limit of the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contenders import check, compiled, eager, foreach, lipcore, reusing
from measure import interleave, ratios, threads
from stream import stream_3r2w

_BYTES = 20  # per float32 element and step


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("name", "sizes"), [("1e7 in 1 tensor", [10**7]), ("1e8 in 1 tensor", [10**8])])
def bench_stream_share(benchmark: Any, report: Any, name: str, sizes: list[int], count: int) -> None:
    params = [torch.randn(size) for size in sizes]
    check(params)
    with threads(count):
        calls = {"lipcore": lipcore(params), "stream": stream_3r2w(sum(sizes), count)}
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
    check(params)
    with threads(count):
        # 14 bytes per bfloat16 element against 20 per float32: as many bytes in 7 of 10 elements
        calls = {"lipcore": lipcore(params), "stream": stream_3r2w(elements * 7 // 10, count)}
        times = interleave(calls, seconds=6, rounds=15)
        benchmark.pedantic(calls["lipcore"], rounds=3, iterations=1)
    title = f"trajectory, 2e7, bf16, {count} thread{'s' * (count > 1)}: share of the stream limit"
    report.add(title, ratios(times, "lipcore")["stream"], "of limit", target=0.85, better="higher")


@pytest.mark.parametrize("count", [1, 2])
def bench_against_torch(benchmark: Any, report: Any, count: int) -> None:
    params = [torch.randn(166_667) for _ in range(150)]
    check(params)
    with threads(count), torch.no_grad():
        calls = {"lipcore": lipcore(params), "eager": eager(params), "foreach": foreach(params)}
        calls["buffers"] = reusing(params)
        times = interleave(calls, seconds=14, rounds=11)
        benchmark.pedantic(calls["lipcore"], rounds=3, iterations=1)
    found = ratios(times, "lipcore")
    where = f"trajectory, 25e6 in 150 tensors, {count} thread{'s' * (count > 1)}"
    report.add(f"{where}: against the eager loop", found["eager"], "x faster", target=6, better="higher")
    buffers = f"{where}: against the eager loop with buffers of its own"
    report.add(buffers, found["buffers"], "x faster", target=6, better="higher")
    report.add(f"{where}: against _foreach", found["foreach"], "x faster", target=10, better="higher")


def bench_against_compile(benchmark: Any, report: Any) -> None:
    # 15 of the 150 tensors: compiling all of them takes minutes, and the ratio is that of memory traffic.
    params = [torch.randn(1_666_667) for _ in range(15)]
    with threads(2), torch.no_grad():
        calls = {"lipcore": lipcore(params), "compile": compiled(params)}
        times = interleave(calls, seconds=6, rounds=11)
        benchmark.pedantic(calls["lipcore"], rounds=3, iterations=1)
    title = "trajectory, 25e6 in 15 tensors, 2 threads: against torch.compile"
    report.add(title, ratios(times, "lipcore")["compile"], "x faster", target=1.8, better="higher")
