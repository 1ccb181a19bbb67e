"""Task 1 of Loukas, Poiitis and Jegelka (NeurIPS 2021): regression of a sinusoid; its frequency is the difficulty."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

TRAIN, TEST, DIMENSIONS = 100, 30, 10
DESCRIPTION = (
    f"y = cos(2 pi f s1) cos(2 pi f s2), s uniform in [-1, 1]^2, {TRAIN} training and {TEST} test points, embedded by "
    f"x = (10 Q)[:, :2] s with Q a random orthogonal {DIMENSIONS} x {DIMENSIONS} matrix; MLP 10-10-32-32-32-1, ReLU, "
    "first weight frozen at the identity"
)


def data(frequency: float, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training inputs [N, 10] and targets [N, 1], then the same for testing."""
    s = random.uniform(-1, 1, (TRAIN, 2))
    s_test = random.uniform(-1, 1, (TEST, 2))
    orthogonal = np.linalg.qr(random.standard_normal((DIMENSIONS, DIMENSIONS)) / np.sqrt(DIMENSIONS))[0]
    embed = 10 * orthogonal[:, :2].T

    def sinusoid(points: npt.NDArray[np.float64]) -> Tensor:
        return _tensor(np.cos(2 * np.pi * frequency * points).prod(axis=1, keepdims=True))

    return _tensor(s @ embed), sinusoid(s), _tensor(s_test @ embed), sinusoid(s_test)


def model(seed: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Return the network and its loss. With W_1 = I the normalised length and the local Lipschitz constants
    coincide."""
    torch.manual_seed(seed)
    first = nn.Linear(DIMENSIONS, DIMENSIONS)
    widths = (DIMENSIONS, 32, 32, 32)
    hidden = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    network = nn.Sequential(first, nn.ReLU(), *hidden, nn.Linear(widths[-1], 1))
    nn.init.eye_(first.weight).requires_grad_(False)
    return network, half_squared_error


def half_squared_error(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().mean() / 2


def _tensor(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values).to(torch.float32)
