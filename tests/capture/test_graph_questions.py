"""What a graph is made of: the quick walk finds what the thorough one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore.capture.identity import Alias
from lipcore.capture.taps.graph import operations_of
from lipcore.capture.taps.identity import Anchored
from lipcore.models.outputs import gradient_node


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad


def transformer(x: Tensor) -> Tensor:
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True)
    found: Tensor = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)(x)
    return found


def frozen_then_anchored(x: Tensor) -> Tensor:
    """Gradients begin at a node of lipcore's, behind which no leaf counts."""
    anchored = Anchored.apply(2 * x, torch.empty(0, requires_grad=True), False)
    return nn.Linear(4, 4)(torch.cat([anchored, x])) + 1


def aliased(x: Tensor) -> Tensor:
    inner = nn.Linear(4, 4)(x)
    return torch.cat([Alias.apply(inner, torch.empty(0, requires_grad=True)), inner]) * x.mean()


GRAPHS = {
    "transformer": transformer,
    "checkpoint": lambda x: nn.Linear(4, 1)(checkpoint(nn.Linear(4, 4), nn.Linear(4, 4)(x), use_reentrant=False)),
    "function": lambda x: Twice.apply(nn.Linear(4, 4)(x), x),
    "constants": lambda x: torch.where(x > 0, nn.Linear(4, 4)(x) * x, torch.zeros(1)),
    "frozen": frozen_then_anchored,
    "aliased": aliased,
    "leaf": lambda x: torch.ones(2, requires_grad=True).clone(),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_two_walks_find_the_same(name: str) -> None:
    output: Any = GRAPHS[name](torch.randn(3, 2, 4))
    assert operations_of(output.grad_fn) == operations_of(output.grad_fn, [object()])


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "aliased"])
def test_what_depends_on_the_input_alone_does_not_count(name: str) -> None:
    """So a pass that is differentiated by the input is made of what one is that is not."""
    x = torch.randn(3, 2, 4)
    found = []
    for requires in (False, True):
        torch.manual_seed(0)
        given = x.clone().requires_grad_(requires)
        node: Any = gradient_node(given)
        output: Any = GRAPHS[name](given)
        found.append(operations_of(output.grad_fn, () if node is None else (node,)))
    assert found[0] == found[1]
    assert bool(found[0]) == (name != "leaf")


def test_each_operation_is_counted() -> None:
    w = torch.ones(2, 2, requires_grad=True)
    output: Any = (w + 1) * (w + 2) + (w @ w)
    assert operations_of(output.grad_fn) == frozenset(
        {
            (("AddBackward0", (True, False)), 2),
            (("AddBackward0", (True, True)), 1),
            (("MulBackward0", (True, True)), 1),
            (("MmBackward0", (True, True)), 1),
        }
    )
