"""The record of a run: what it costs the training thread beside the same Monitor without one, its bytes, reading it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import interleave, ratios, threads
from torch import nn

import lipcore
from lipcore.recording import RunRecord

_BLOCK = 64


def _steps(run: Path | None) -> tuple[Callable[[], None], lipcore.Monitor]:
    """A step of about half a millisecond under watch(), with or without a record."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=1e-3), torch.randn(16, 64)
    monitor = lipcore.watch(model, optimizer, run=run, window_steps=100)

    def step() -> None:
        loss = model(x).square().mean()
        monitor.log(loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, monitor


def _check(folder: Path) -> None:
    """The record has every step, as the Monitor saw it."""
    step, monitor = _steps(folder)
    for _ in range(200):
        step()
    mine = [window["trajectory"].update_norm["total"].mean.value for window in monitor.history]
    monitor.close()
    with lipcore.open_run(folder) as run:
        norms = run.series("update_norm", "total")["total"]
        assert len(norms) == len(run.series("loss")) == 200
        assert np.allclose([norms[:100].mean(), norms[100:].mean()], mine, rtol=1e-6)


def bench_a_record_beside_the_training(benchmark: Any, report: Any) -> None:
    with threads(1), tempfile.TemporaryDirectory() as folder:
        _check(Path(folder) / "check")
        (plain, one), (again, two), (recorded, three) = _steps(None), _steps(None), _steps(Path(folder) / "run")
        calls = {"plain": plain, "control": again, "recorded": recorded}
        blocks = {name: _repeated(step, _BLOCK) for name, step in calls.items()}
        found = ratios(interleave(blocks, seconds=20, rounds=15), "plain")
        slowest = _p99(calls)
        benchmark.pedantic(blocks["recorded"], rounds=1, iterations=1)
        for monitor in (one, two, three):
            monitor.close()
    where = "a record beside the same Monitor, half-millisecond steps"
    report.add(f"{where}: median step", found["recorded"], "x", target=1.03, better="lower", control=found["control"])
    late = 1e3 * (slowest["recorded"] - slowest["plain"])
    control = 1e3 * (slowest["control"] - slowest["plain"])
    report.add(f"{where}: slowest 1 % of the steps", late, "ms", target=1.0, better="lower", control=control)


def bench_bytes_and_reading(benchmark: Any, report: Any) -> None:
    """1e5 steps of 300 places, as of a model with 300 parameters."""
    places, steps = 300, 100_000
    names, levels = [f"layers.{i}" for i in range(places)], ["group"] * places
    with tempfile.TemporaryDirectory() as folder:
        record = RunRecord(Path(folder) / "a")
        record.begin(0)
        rng = np.random.default_rng(0)
        written = rng.standard_normal((_BLOCK, places))
        for first in range(1, steps, _BLOCK):
            record.add_steps(first, {"update_norm": written}, names, levels)  # type: ignore[arg-type]
        record.close()
        size = (Path(folder) / "a" / "rank0.lipcore").stat().st_size
        with lipcore.open_run(Path(folder) / "a") as run:
            times = []
            for place in names[:5]:
                start = time.perf_counter()
                series = run.series("update_norm", place)
                times.append(time.perf_counter() - start)
            assert np.allclose(series.values[:_BLOCK, 0], written[:, 4], rtol=1e-6)
            benchmark.pedantic(run.series, args=("update_norm", names[7]), rounds=1, iterations=1)
    report.add(
        "a record's bytes per number, 300 places", size / len(series) / places, "bytes", target=5, better="lower"
    )
    title = "reading one place of 1e5 recorded steps of 300"
    report.add(title, statistics.median(times), "s", target=1.0, better="lower")


def _repeated(step: Callable[[], None], count: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(count):
            step()

    return steps


def _p99(calls: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds that 1 % of the steps take longer than; in turns, so that a slow spell of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(40):
        for name, step in calls.items():
            for _ in range(_BLOCK):
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    return {name: sorted(found)[int(0.99 * len(found))] for name, found in times.items()}
