"""Quantities that are left to the first reader of a result."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from torch import nn

from lipcore import Monitor, PerSampleGradNorms, Trajectory
from lipcore.metric.metric_result import MetricResult
from lipcore.metric.values import Value


def result() -> tuple[MetricResult, list[int]]:
    found, calls = MetricResult("m"), []

    def add(into: MetricResult) -> None:
        calls.append(1)
        into.add("late", "total", "total", last=Value(2.0, 1))

    found.add("early", "total", "total", last=Value(1.0, 1))
    found.leave(add, 1000)
    return found, calls


@pytest.mark.parametrize(
    "read",
    [
        lambda r: r.late,
        lambda r: r["late"],
        lambda r: "late" in r,
        lambda r: list(r) == ["early", "late"],
        lambda r: len(r) == 2,
        lambda r: r.flat()["m/late.last/total"] == 2,
        lambda r: r.to_dict()["quantities"]["late"],
        lambda r: "late" in repr(r),
        lambda r: "late" in dir(r),
        lambda r: pickle.loads(pickle.dumps(r))["late"]["total"].last.value == 2,
    ],
)
def test_whoever_reads_finds_them(read) -> None:
    found, calls = result()
    assert read(found)
    assert read(found)
    assert calls == [1]


def test_memory_is_that_of_what_is_kept_until_then() -> None:
    found, calls = result()
    kept = found.nbytes
    assert kept > 1000
    assert not calls
    assert found.late["total"].last.value == 2
    assert found.nbytes < kept


def test_readers_in_several_threads_make_them_once() -> None:
    found, calls = result()
    start, seen = threading.Barrier(8), []

    def read() -> None:
        start.wait()
        seen.append(found["late"]["total"].last.value)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [2.0] * 8
    assert calls == [1]


def test_an_error_of_one_reader_is_that_of_the_next_too() -> None:
    found = MetricResult("m")
    found.leave(lambda into: into.missing, 0)
    for _ in range(2):
        with pytest.raises(AttributeError, match="missing"):
            len(found)


def test_what_is_read_late_is_what_was_there_at_the_close() -> None:
    """Training goes on before a window is read."""
    read = []
    for early in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        metrics = [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]
        with Monitor(model, optimizer, metrics, window_steps=10) as monitor:
            for step in range(30):
                model(torch.randn(5, 3)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if early and step % 10 == 9:
                    read.append(monitor.history[-1].to_dict())
            if not early:
                assert [window.to_dict() for window in monitor.history] == read
