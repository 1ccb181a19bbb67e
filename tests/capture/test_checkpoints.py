"""Which nodes of a graph are reentrant checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction as OfTorch
from torch.utils.checkpoint import checkpoint

from lipcore.capture.checkpoints import is_reentrant_checkpoint
from lipcore.models.outputs import nodes_of


class CheckpointFunction(torch.autograd.Function):
    """As other libraries name theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Derived(OfTorch):
    """Somebody's own, made from torch's."""


class Doubled(torch.autograd.Function):
    """No checkpoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


LAYER = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: checkpoint(LAYER, x, use_reentrant=True), True),
        (lambda x: checkpoint(LAYER, x, use_reentrant=False), False),
        (CheckpointFunction.apply, True),
        (lambda x: Derived.apply(LAYER, False, x), True),
        (Doubled.apply, False),
        (LAYER, False),
    ],
    ids=["torch", "not_reentrant", "another_library", "derived", "another_function", "none"],
)
def test_reentrant_checkpoints_are_told_apart(run: Any, expected: bool) -> None:
    output = run(torch.randn(2, 3, requires_grad=True)).tanh()
    assert any(map(is_reentrant_checkpoint, nodes_of(output))) is expected
