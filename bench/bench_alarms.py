"""Alarms beside a training step, of which each is looked at."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import interleave, ratios, threads
from torch import nn
from watched_models import MODELS, Made

from lipcore import Monitor, Trajectory
from lipcore.alarms import Alarms

STEPS = 20


class Training:
    """A training that is watched in one of the ways, past the alarms' silent steps."""

    def __init__(self, make: Callable[[], Made], way: str) -> None:
        torch.manual_seed(0)
        self.model, self.x, classes = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.y = torch.randint(classes, self.x.shape[:1] if self.x.is_floating_point() else self.x.shape).flatten()
        self.monitor = None
        if way not in ("plain", "control"):
            alarms: Any = "default" if way == "alarms" else None
            if way == "movement":
                alarms = Alarms(signals=["unexplained_movement"])
            self.monitor = Monitor(self.model, self.optimizer, [Trajectory()], window_steps=None, alarms=alarms)
        for _ in range(120):
            self.step()

    def step(self) -> None:
        loss = nn.functional.cross_entropy(self.model(self.x).flatten(0, -2), self.y)
        if self.monitor is not None:
            self.monitor.log(loss=loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self) -> None:
        for _ in range(STEPS):
            self.step()


@pytest.mark.parametrize("name", MODELS)
def bench_beside_a_step(benchmark: Any, report: Any, name: str) -> None:
    make, title = MODELS[name]
    with threads(1):
        trainings = {way: Training(make, way) for way in ("plain", "control", "without", "alarms")}
        monitor = trainings["alarms"].monitor
        assert monitor is not None
        assert monitor.alarms is not None
        calls = {way: training.steps for way, training in trainings.items()}
        found = ratios(interleave(calls, seconds=30, rounds=15), "plain")
        benchmark.pedantic(calls["alarms"], rounds=1, iterations=1)
    where = f"Monitor(alarms='default'), {title}, 1 thread"
    details = {"control": found["control"], "without_alarms": found["without"]}
    report.add(where, found["alarms"], "x plain", **details)


@pytest.mark.parametrize("name", MODELS)
def bench_movement_that_the_optimizer_did_not_make(benchmark: Any, report: Any, name: str) -> None:
    """What the check adds to a Monitor with the same copies, as a share of the plain step."""
    make, title = MODELS[name]
    with threads(1):
        trainings = {way: Training(make, way) for way in ("plain", "control", "without", "movement")}
        calls = {way: training.steps for way, training in trainings.items()}
        times = interleave(calls, seconds=30, rounds=15, clock=time.process_time)
        benchmark.pedantic(calls["movement"], rounds=1, iterations=1)
        _check_movement(trainings["movement"])
    found = ratios(times, "plain")
    rounds = zip(times["movement"], times["without"], times["plain"], strict=True)
    added = 1 + statistics.median((checked - without) / plain for checked, without, plain in rounds)
    where = f"what the check of movement that AdamW did not make adds, {title}, 1 thread"
    details = {"control": found["control"], "checked": found["movement"], "without": found["without"]}
    report.add(where, added, "x plain", target=1.03, better="lower", **details)


def _check_movement(training: Training) -> None:
    """Nothing but the optimizer has moved the weights so far, and what does is found."""
    monitor = training.monitor
    assert monitor is not None
    assert monitor.alarms is not None
    assert not monitor.alarms.events
    name, weight = next((name, p) for name, p in training.model.named_parameters() if p.ndim == 2)
    with torch.no_grad():
        weight[0] *= 2
    training.step()
    monitor.close()
    assert [event.place for event in monitor.alarms.events] == [name]
