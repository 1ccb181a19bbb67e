"""Optimizer steps with a Trajectory that keeps no copies, captured in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lipcore import Trajectory

STATS = ["path_length", "update_norm", "weight_norm", "grad_norm"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, capturable=True),
}


class Training:
    """Steps whose gradients are those of a parabola, with noise; the Trajectory is told of them."""

    def __init__(self, optimizer: str, device: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)).to(device)
        made = OPTIMIZERS[optimizer if device != "cpu" else f"{optimizer} on the CPU"]
        self.optimizer = made(self.model.parameters())
        self.noise = [torch.zeros_like(parameter.detach()) for parameter in self.model.parameters()]
        for parameter in self.model.parameters():  # in one place, as a captured step needs it
            parameter.grad = torch.zeros_like(parameter)
        self.trajectory = Trajectory(self.model, mode="updates", optimizer=self.optimizer, stats=STATS, ring=512)

    def load(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for noise in self.noise:
            noise.copy_(torch.randn(noise.shape, generator=generator))

    def step(self) -> None:
        for parameter, noise in zip(self.model.parameters(), self.noise, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(noise).add_(parameter.detach(), alpha=0.3)
        self.trajectory.observe_gradients()
        self.trajectory.before_step()
        self.optimizer.step()
        self.trajectory.observe_step()


for _name in list(OPTIMIZERS):
    OPTIMIZERS[f"{_name} on the CPU"] = {
        "sgd": OPTIMIZERS["sgd"],
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    }[_name]


def captured(training: Training) -> torch.cuda.CUDAGraph:
    """Return a graph whose replays are steps."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_replays_are_steps(optimizer: str) -> None:
    here, there = Training(optimizer, "cpu"), Training(optimizer, "cuda")

    def both(seed: int, run: Callable[[], object]) -> None:
        for training in (here, there):
            training.load(seed)
        here.step()
        run()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(3):
            both(seed, there.step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = captured(there)
    for seed in range(3, 23):
        both(seed, graph.replay)
    expected, found = (training.trajectory.compute() for training in (here, there))
    for quantity in STATS:
        for place in expected[quantity]:
            for reducer, value in expected[quantity][place].items():
                number = found[quantity][place][reducer]
                assert number.value == pytest.approx(value.value, rel=1e-3), (quantity, place, reducer)
                assert number.count == value.count, (quantity, place, reducer)


@pytest.mark.gpu
def test_more_replays_than_the_ring_holds_have_no_quantiles() -> None:
    """Nobody knows the steps that are gone; everything else counts them."""
    training = Training("sgd", "cuda")
    training.load(0)
    training.step()
    graph = captured(training)
    for _ in range(600):
        graph.replay()
    found = training.trajectory.compute()
    assert found.update_norm["total"].mean.count == 601
    assert set(found.update_norm["total"]) == {"last", "mean", "max"}
    training.trajectory.reset()
    for _ in range(30):
        graph.replay()
    found = training.trajectory.compute()
    assert found.update_norm["total"].p50.count == 30
    assert set(found.update_norm["total"]) == {"last", "mean", "max", "p50", "p99"}


@pytest.mark.gpu
def test_a_state_after_replays_goes_on() -> None:
    training = Training("sgd", "cuda")
    training.load(0)
    training.step()
    graph = captured(training)
    for _ in range(5):
        graph.replay()
    state = training.trajectory.state_dict()
    other = Training("sgd", "cuda")
    other.trajectory.load_state_dict(state)
    assert other.trajectory.compute().update_norm["total"].p50.count == 6
