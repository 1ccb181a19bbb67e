"""Times calls on a GPU in turns, and says by how much they differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROUNDS = 9
MIN_MS = 3.0  # of one measurement
LIMIT_BYTES = 1 << 32  # limits are timed on at most so much memory, and longer ones are that in proportion

Call = Callable[[], Any]


def time_together(calls: dict[str, Call]) -> dict[str, float]:
    """Median milliseconds per call; the calls take turns, so that a change of clocks meets them all."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(1000, int(MIN_MS / max(events_ms(call, 3), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(events_ms(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def events_ms(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def host_us(call: Call, repeats: int = 200) -> float:
    """Microseconds the host spends on a call that it does not wait for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repeats * 1e6


def extra_mib(call: Call) -> float:
    """Memory of torch's allocator that a call takes beside what was there, its results too."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def assert_close(got: Tensor, want: Tensor, error: float) -> None:
    difference = ((got.double() - want.double()).abs() / want.double().abs().clamp_min(1e-300)).max()
    assert bool(difference <= error), f"wrong result: relative error {float(difference):.2e}, allowed {error:.0e}"


def copy_limit(bytes_moved: int) -> Call:
    """Half of the bytes are read, half are written."""
    halves = torch.zeros(2, max(bytes_moved // 16, 1), dtype=torch.float64, device="cuda")
    return lambda: halves[0].copy_(halves[1])


def measure(calls: dict[str, Call], bytes_moved: int = 0, part: float = 1.0) -> dict[str, Any]:
    """`part` of the bytes is what the limits move. The first of the calls is ours."""
    ours = next(iter(calls))
    times = time_together(calls)
    times = {name: ms / part if name.endswith("_limit") else ms for name, ms in times.items()}
    result: dict[str, Any] = {"ms": {name: round(ms, 5) for name, ms in times.items()}}
    if bytes_moved:
        result["GB_per_s"] = round(bytes_moved / times[ours] / 1e6, 1)
    for name, ms in times.items():
        if name.endswith("_limit"):
            result[f"share_of_{name}"] = round(ms / times[ours], 3)
        elif name != ours:
            result[f"times_faster_than_{name}"] = round(ms / times[ours], 2)
    return result
