"""Timing by ratio: ours and the baselines interleaved in one process, medians of many rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import psutil
import pytest
import torch

Call = Callable[[], object]
Clock = Callable[[], float]


def _time(call: Call, repeats: int, clock: Clock = time.perf_counter) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def interleave(
    calls: Mapping[str, Call], *, seconds: float = 2.0, rounds: int = 7, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per call of each, measured in turns so that a slow spell of the machine hits all of them. With
    `clock=time.process_time` those of the processor, of all threads: what else the machine does hardly changes them."""
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        once = max(_time(call, 1, clock), 1e-7)
        repeats[name] = max(1, int(seconds / rounds / len(calls) / once))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_time(call, repeats[name], clock))
    return times


def ratios(times: Mapping[str, list[float]], ours: str) -> dict[str, float]:
    """Median over rounds of baseline time / our time in the same round."""
    mine = times[ours]
    return {n: statistics.median(t / m for t, m in zip(ts, mine, strict=True)) for n, ts in times.items() if n != ours}


def fastest(call: Call, *, number: int = 20000, repeats: int = 7) -> float:
    """Seconds per call of a call too short for a ratio: the least of several means, as timeit does."""
    call()
    return min(_time(call, number) for _ in range(repeats))


class threads:
    """with threads(1): torch uses one thread."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def needs_memory(size: float) -> None:
    """Skip the benchmark, visibly, where fewer bytes are free."""
    free = psutil.virtual_memory().available
    if free < size + 1e9:  # for what else runs
        pytest.skip(f"needs {size / 1e9 + 1:.1f} GB of memory, {free / 1e9:.1f} GB are free")
