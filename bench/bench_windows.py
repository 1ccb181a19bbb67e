"""Closing windows: what it costs the training thread, against the plain step, and what a window keeps."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from measure import interleave, ratios, threads
from torch import nn

from lipcore import Monitor, PerSampleGradNorms, Trajectory

_WIDTH, _BATCH = 16, 512
_STEPS = 10  # of a window


def _model() -> nn.Module:
    """300 parameters in 25 blocks."""
    return nn.Sequential(*(nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(6))) for _ in range(25)))


def _steps(monitored: bool, window_steps: int | None = _STEPS) -> tuple[Callable[[], None], Monitor | None]:
    """A step of training, with or without a Monitor."""
    torch.manual_seed(0)
    model, x = _model(), torch.randn(_BATCH, _WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    metrics = [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]
    monitor = Monitor(model, optimizer, metrics, window_steps=window_steps) if monitored else None

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, monitor


def _check() -> None:
    """A window says what its steps were."""
    step, monitor = _steps(True)
    assert monitor is not None
    before = [p.detach().double().clone() for p in monitor.model.parameters()]
    for _ in range(_STEPS):
        step()
    (window,) = monitor.history
    after = [p.detach().double() for p in monitor.model.parameters()]
    moved = torch.stack([(one - other).square().sum() for one, other in zip(after, before, strict=True)]).sum()
    assert abs(window["trajectory"].distance["total"].last.value / float(moved.sqrt()) - 1) < 1e-6
    assert window["per_sample_grad_norm"].norm["total"].mean.count == _STEPS * _BATCH


def bench_close_of_a_window(benchmark: Any, report: Any) -> None:
    _check()
    with threads(1):
        step, monitor = _steps(True, window_steps=None)
        assert monitor is not None
        times = []
        for _ in range(30):
            for _ in range(_STEPS):
                step()
            monitor.flush()
            start = time.thread_time()  # other programs' time is none of the window's
            monitor.close_window()
            times.append(time.thread_time() - start)

        def one_step() -> None:
            step()

        benchmark.pedantic(monitor.close_window, setup=one_step, rounds=3, iterations=1)
    milliseconds = 1e3 * sorted(times)[len(times) // 2]
    title = "closing a window of 300 parameters, Trajectory and PerSampleGradNorms"
    report.add(title, milliseconds, "ms", target=2.0, better="lower")


def bench_windows_of_ten_steps(benchmark: Any, report: Any) -> None:
    """The same metrics with one window that stays open, and with windows of ten steps."""
    _check()
    with threads(1):
        (plain, _), (again, _) = _steps(False), _steps(False)
        (open_, one), (windows, two) = _steps(True, None), _steps(True)
        calls = {"plain": plain, "control": again, "open": open_, "windows": windows}
        calls = {name: _ten(step) for name, step in calls.items()}
        found = ratios(interleave(calls, seconds=30, rounds=15), "plain")
        benchmark.pedantic(calls["windows"], rounds=1, iterations=1)
    assert one is not None
    assert two is not None
    where = "300 small parameters, windows of 10 steps"
    closing = 1 + found["windows"] - found["open"]
    details = {"whole": found["windows"], "open_window": found["open"], "control": found["control"]}
    report.add(f"{where}: closing them, of the plain step", closing, "x", target=1.05, better="lower", **details)


def _ten(step: Callable[[], None]) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(_STEPS):
            step()

    return steps


def bench_bytes_kept(benchmark: Any, report: Any) -> None:
    step, monitor = _steps(True)
    assert monitor is not None
    for _ in range(2 * _STEPS):
        step()
    tracemalloc.start()
    windows = 5
    for _ in range(windows * _STEPS):
        step()
    said = monitor.history[-1].nbytes / 1024
    with_them = tracemalloc.get_traced_memory()[0]
    monitor.history.clear()
    while monitor.pop_window() is not None:
        pass
    kept = (with_them - tracemalloc.get_traced_memory()[0]) / windows / 1024
    tracemalloc.stop()
    benchmark.pedantic(monitor.compute, rounds=3, iterations=1)
    report.add("kept per window of 300 parameters", kept, "KiB", target=100, better="lower", nbytes_kib=said)
