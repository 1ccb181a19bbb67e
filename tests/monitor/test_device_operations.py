"""What metrics make a device do beside a training's own step, counted: docs/cuda.md says which numbers are wanted."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_operations import Counts, DeviceOperations
from torch import nn

import lipcore

WARM, COUNTED = 25, 16
#: Operations of torch and launches of kernels beside the plain step's: of most steps, and of the one that has most.
REACHED = {"monitor": (12, 12), "trajectory": (6, 6), "updates": (4, 4), "per sample": (21, 21)}


class Plain:
    """A training's own steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self._x, self._y = torch.randn(256, 10).cuda(), torch.randn(256, 1).cuda()

    def step(self) -> None:
        nn.functional.mse_loss(self.model(self._x), self._y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def monitor(plain: Plain, *metrics: Any) -> Any:
    return lipcore.Monitor(plain.model, plain.optimizer, list(metrics) or None, window_steps=1000)


WATCHED: dict[str, Callable[[Plain], Any]] = {
    "monitor": monitor,
    "trajectory": lambda plain: monitor(plain, lipcore.Trajectory(stats=["path_length", "grad_norm"])),
    "updates": lambda plain: monitor(plain, lipcore.Trajectory(mode="updates", stats=["path_length"])),
    "per sample": lambda plain: lipcore.PerSampleGradNorms(plain.model, loss_reduction="mean"),
}


def counts_of(watch: Callable[[Plain], Any]) -> list[Counts]:
    """Return what each of some steps after the first ones has done."""
    plain, counts = Plain(), []
    with watch(plain):
        for _ in range(WARM):
            plain.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(COUNTED):
                with DeviceOperations() as mode:
                    plain.step()
                counts.append(mode.counts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counts


@pytest.mark.gpu
@pytest.mark.parametrize("what", WATCHED)
def test_a_step(what: str) -> None:
    plain, watched = counts_of(lambda plain: contextlib.nullcontext())[0], counts_of(WATCHED[what])
    found = [counts.all - plain.all for counts in watched]
    usual, most = REACHED[what]
    assert statistics.mode(found) <= usual, found
    assert max(found) <= most, found
    for counts in watched:
        assert not counts.waits
        assert not counts.from_host
        assert not counts.refused
        assert not counts.unordered
