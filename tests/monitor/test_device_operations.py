"""What metrics make a device do beside a training's own step, counted: docs/cuda.md says which numbers are wanted."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_operations import Counts, DeviceOperations
from torch import Tensor, nn

import lipcore

WARM, COUNTED = 25, 16
#: Operations of torch and launches of kernels beside the plain step's: of most steps, and of the one that has most.
REACHED = {"monitor": (12, 12), "trajectory": (6, 6), "updates": (4, 4), "per sample": (21, 21)}


class Plain:
    """A training's own steps: of an MLP, or of other layers with an input for them."""

    def __init__(self, layers: list[nn.Module] | None = None, x: Tensor | None = None) -> None:
        torch.manual_seed(0)
        mlp = [nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)]
        self.model = nn.Sequential(*(layers or mlp)).cuda()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self._x = (torch.randn(256, 10) if x is None else x).cuda()

    def step(self) -> None:
        self.model(self._x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def monitor(plain: Plain, *metrics: Any) -> Any:
    return lipcore.Monitor(plain.model, plain.optimizer, list(metrics) or None, window_steps=1000)


#: The last step in which torch's allocator, as the emulator has it, asks the driver for memory.
SETTLED = 2

WATCHED: dict[str, Callable[[Plain], Any]] = {
    "monitor": monitor,
    "trajectory": lambda plain: monitor(plain, lipcore.Trajectory(stats=["path_length", "grad_norm"])),
    "updates": lambda plain: monitor(plain, lipcore.Trajectory(mode="updates", stats=["path_length"])),
    "per sample": lambda plain: lipcore.PerSampleGradNorms(plain.model, loss_reduction="mean"),
}


def counts_of(watch: Callable[[Plain], Any], plain: Plain | None = None, warm: int = WARM) -> list[Counts]:
    """Return what each of some steps after the first ones has done."""
    plain, counts = plain or Plain(), []
    with watch(plain):
        for _ in range(warm):
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


def sequence(*layers: nn.Module) -> Plain:
    return Plain([*layers], torch.randn(4, 20, 8))


#: Training with one kind of layer, how many there are, and operations of most steps.
LAYERS: dict[str, tuple[Callable[[], Plain], int, int]] = {
    "sequences through Linear": (lambda: sequence(nn.Linear(8, 40), nn.GELU(), nn.Linear(40, 8)), 2, 12),
    "LayerNorm": (lambda: sequence(nn.LayerNorm(8), nn.GELU(), nn.LayerNorm(8)), 2, 11),
    "Embedding": (lambda: Plain([nn.Embedding(50, 8)], torch.randint(50, (4, 20))), 1, 10),
    "Conv2d by Gram matrices": (
        lambda: Plain([nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2)], torch.randn(4, 16, 4, 4)),
        2,
        13,
    ),
    "Conv2d": (lambda: Plain([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)], torch.randn(4, 3, 9, 9)), 2, 13),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_per_sample_norms_of_a_layer(kind: str) -> None:
    make, layers, reached = LAYERS[kind]
    plain = counts_of(lambda plain: contextlib.nullcontext(), make(), 2)[0]
    watched = counts_of(WATCHED["per sample"], make(), 4)
    found = [counts.all - plain.all for counts in watched]
    assert reached <= 4 * layers + 12
    assert statistics.mode(found) <= reached, found
    for counts in watched:
        assert not counts.waits
        assert not counts.from_host
        assert not counts.refused
        assert not counts.unordered


@pytest.mark.gpu
@pytest.mark.parametrize("what", WATCHED)
def test_no_memory_is_asked_of_the_driver_after_the_first_steps(what: str) -> None:
    """What a step takes of torch's allocator, those before have given back."""
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests have left
    plain, asked = Plain(), list[int]()
    with WATCHED[what](plain):
        for _ in range(8):
            plain.step()
            asked.append(torch.cuda.memory_stats()["num_device_alloc"])
    assert asked[SETTLED:] == [asked[SETTLED - 1]] * (8 - SETTLED), asked
