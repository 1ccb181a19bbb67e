"""Models beside whose training steps metrics are timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from small_transformer import SmallTransformer
from torch import Tensor, nn

Made = tuple[nn.Module, Tensor, int]  # model, input, classes


def transformer() -> Made:
    return SmallTransformer(), torch.randint(32, (16, 32)), 32


def mlp() -> Made:
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers), torch.randn(256, 784), 10


MODELS: dict[str, tuple[Callable[[], Made], str]] = {
    "transformer": (transformer, "small transformer, 16 x 32 tokens"),
    "mlp": (mlp, "MLP 784-1024-1024-10, batch 256"),
}
