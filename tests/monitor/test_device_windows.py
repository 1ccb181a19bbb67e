"""Windows of a training on a device: its numbers, and the one copy that brings them to the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import EMULATED
from torch import nn

import lipcore

METRICS: dict[str, Callable[[], list[Any] | None]] = {
    "default": lambda: None,
    "gradients": lambda: [lipcore.Trajectory(stats=["path_length", "grad_norm", "clipped_grad_norm"])],
    "updates": lambda: [lipcore.Trajectory(mode="updates")],
    "per sample": lambda: [lipcore.PerSampleGradNorms(loss_reduction="mean", noise_scale=False)],
}


def trained(metrics: list[Any] | None, device: str, **settings: Any) -> tuple[lipcore.Monitor, Callable[[int], None]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(8, 10).to(device), torch.randn(8, 1).to(device)) for _ in range(4)]

    def steps(count: int) -> None:
        for step in range(count):
            x, y = batches[step % 4]
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return lipcore.Monitor(model, optimizer, metrics, **settings), steps


def numbers_of(found: Any, path: str = "") -> dict[str, float]:
    if isinstance(found, dict):
        return {k: v for name in found for k, v in numbers_of(found[name], f"{path}.{name}").items()}
    return {path: float(found)} if isinstance(found, (int, float)) else {}


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("metrics", METRICS)
def test_a_window_is_that_of_the_cpu(metrics: str, blocks: int) -> None:
    windows = []
    for device in ("cpu", "cuda"):
        monitor, steps = trained(METRICS[metrics](), device, window_steps=4, window_blocks=blocks)
        with monitor:
            steps(10)
            windows.append([numbers_of(window.to_dict()) for window in (*monitor.history, monitor.compute())])
    here, there = windows
    assert len(here) == len(there) > 1
    for expected, found in zip(here, there, strict=True):
        assert found.keys() == expected.keys()
        for name, number in expected.items():
            assert found[name] == pytest.approx(number, rel=1e-5, abs=1e-9, nan_ok=True), name
        assert any(math.isfinite(number) and number > 0 for number in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not EMULATED, reason="asks the emulator how often the host has waited")
@pytest.mark.parametrize("metrics", METRICS)
def test_a_window_is_read_by_one_copy(metrics: str) -> None:
    monitor, steps = trained(METRICS[metrics](), "cuda", window_steps=None)
    stream = torch.cuda.current_stream()
    with monitor:
        for _ in range(2):
            steps(5)
            before = stream.reads
            assert monitor.close_window() is not None
            assert stream.reads - before == 1
