"""The default watch() with a record beside the steps of a transformer of some 50 to 70 milliseconds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import interleave, ratios, threads
from per_sample_models import Gpt
from torch import Tensor, nn

import lipcore

_SAMPLES, _LENGTH, _VOCABULARY, _WIDTH = 12, 64, 1000, 128
_STEPS = 10  # of one turn
_WAYS: dict[str, dict[str, Any]] = {"plain": {}, "control": {}, "watched": {}, "alarms": {"alarms": "default"}}


class Training:
    """A training in one of the ways; it begins past the alarms' silent steps and the first window."""

    turn = _STEPS  #: steps of a call

    def __init__(
        self, way: str, folder: Path, *, samples: int = _SAMPLES, length: int = _LENGTH, steps: int = 110
    ) -> None:
        torch.manual_seed(0)
        self.model = Gpt(_LENGTH, _VOCABULARY, _WIDTH)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(_VOCABULARY, (samples, length + 1))
        self.monitor: lipcore.Monitor | None = None
        self.begin(way, folder)
        self.steps(steps)

    def begin(self, way: str, folder: Path) -> None:
        """Have it watched in this way."""
        if way not in ("plain", "control"):
            self.monitor = lipcore.watch(self.model, self.optimizer, run=folder / way, **_WAYS[way])

    def before_step(self, loss: Tensor) -> None:
        """Do nothing: another tool is told of a step here."""

    def close(self) -> None:
        """End the watching."""
        if self.monitor is not None:
            self.monitor.close()

    def steps(self, count: int = _STEPS) -> None:
        for _ in range(count):
            logits = self.model(self.tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
            if self.monitor is not None:
                self.monitor.log(loss=loss)
            loss.backward()
            self.before_step(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()


def _check(folder: Path, plain: Training, watched: Training) -> None:
    """Training is the same bits, and the record has every step so far."""
    for mine, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with lipcore.open_run(folder / "watched") as run:
        norms = run.series("update_norm", "total")["total"]
        assert len(norms) > 50
        assert np.isfinite(norms).all()


def bench_default_watch(benchmark: Any, report: Any) -> None:
    with threads(1), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainings = {way: Training(way, folder) for way in _WAYS}
        _check(folder, trainings["plain"], trainings["watched"])
        calls = {way: training.steps for way, training in trainings.items()}
        times = interleave(calls, seconds=90, rounds=25)
        found = ratios(times, "plain")
        benchmark.pedantic(calls["watched"], rounds=1, iterations=1)
        for training in trainings.values():
            training.close()
    count = sum(p.numel() for p in trainings["plain"].model.parameters())
    details = {"control": found["control"], "parameters": count, "plain_ms": 1e3 * min(times["plain"]) / _STEPS}
    where = "watch() with a record, transformer of 1 million parameters, 12 x 64 tokens, 1 thread"
    report.add(where, found["watched"], "x plain", target=1.03, better="lower", **details)
    report.add(f"{where}, with alarms", found["alarms"], "x plain", **details)
