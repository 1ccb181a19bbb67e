"""Handwritten digits, odd or even, from images that ship inside scikit-learn; corrupted labels are the difficulty."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

TRAIN = 1000
DESCRIPTION = (
    "scikit-learn's 1797 digits (8 x 8 pixels in [0, 1]), odd against even, 1000 training and 797 test images; the "
    "labels of the given share of training images are drawn anew by a fair coin, so about half of them become wrong; "
    "test labels are clean; CNN 16-32 (3 x 3, no padding), a hidden layer of 128, ReLU, sigmoid head"
)


def data(corrupted: float, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images [N, 1, 8, 8] and labels [N, 1] in {0, 1}, then the same for testing."""
    digits = load_digits()
    order = random.permutation(len(digits.target))
    x = torch.from_numpy(digits.images[order] / 16).to(torch.float32).unsqueeze(1)
    y = torch.from_numpy(digits.target[order] % 2).to(torch.float32).unsqueeze(1)
    redrawn = torch.from_numpy(random.permutation(TRAIN)[: round(corrupted * TRAIN)])
    y[redrawn, 0] = torch.from_numpy(random.integers(0, 2, len(redrawn))).to(torch.float32)
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def model(seed: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Return the network, which returns the probability of "odd", and its loss."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 1),
        nn.Sigmoid(),
    )
    return network, binary_cross_entropy
