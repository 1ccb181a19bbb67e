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
        assert_same_numbers(found, expected)


def assert_same_numbers(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=1e-5, abs=1e-9, nan_ok=True), name
    assert any(math.isfinite(number) and number > 0 for number in found.values())


def closed(monitor: lipcore.Monitor) -> dict[str, float]:
    window = monitor.close_window()
    assert window is not None
    return numbers_of(window.to_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("metrics", METRICS)
def test_a_window_may_be_closed_on_another_stream_than_that_of_its_steps(metrics: str) -> None:
    """Where both streams wait for each other, as torch asks of whoever hands tensors from one to the other."""
    here, steps_here = trained(METRICS[metrics](), "cpu", window_steps=None)
    there, steps_there = trained(METRICS[metrics](), "cuda", window_steps=None)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    with here, there:
        for _ in range(2):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                steps_there(5)
            main.wait_stream(side)
            steps_here(5)
            assert_same_numbers(closed(there), closed(here))


@pytest.mark.gpu
@pytest.mark.parametrize("metrics", METRICS)
def test_monitors_on_two_devices(metrics: str) -> None:
    """In one process, in turn, with the first device current; the second one's steps are on a stream of its own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    (here, steps_here), *there = (
        trained(METRICS[metrics](), device, window_steps=None) for device in ("cpu", "cuda:0", "cuda:1")
    )
    side = torch.cuda.Stream("cuda:1")
    side.wait_stream(torch.cuda.current_stream("cuda:1"))
    (first, steps_first), (second, steps_second) = there
    with here, first, second:
        for _ in range(2):
            for _ in range(3):
                steps_here(1)
                steps_first(1)
                with torch.cuda.stream(side), torch.cuda.device(0):
                    steps_second(1)
            expected = closed(here)
            assert_same_numbers(closed(first), expected)
            with torch.cuda.stream(side), torch.cuda.device(0):
                assert_same_numbers(closed(second), expected)
    assert torch.cuda.current_device() == 0


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
