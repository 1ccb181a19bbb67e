"""What may be gone through by one backward pass alone, and must not be by lipcore's own; and state outside of torch."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lipcore import PerSampleGradNorms

pytestmark = pytest.mark.filterwarnings("ignore:lipcore:UserWarning")


class Pops(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = [x.detach().clone()]
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.kept.pop().tanh() ** 2)


class Frees(Pops):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        result = grad * (1 - ctx.kept[0].tanh() ** 2)
        ctx.kept[0].untyped_storage().resize_(0)
        return result


def offloaded(model: Net, x: Tensor) -> Tensor:
    kept: dict[int, Tensor] = {}
    number = itertools.count()

    def pack(tensor: Tensor) -> int:
        kept[at := next(number)] = tensor
        return at

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.pop):
        return model.inside(x)


def save_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def selective(model: Net, x: Tensor) -> Tensor:
    context = functools.partial(create_selective_checkpoint_contexts, save_products)
    found: Tensor = checkpoint(model.inside, x, use_reentrant=False, context_fn=context)
    return found


def told(model: Net, x: Tensor) -> Tensor:
    found: Tensor = checkpoint(model.inside, x, use_reentrant=False, debug=True)
    return found


class Net(nn.Module):
    def __init__(self, way: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head, self.way = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3), way

    def inside(self, x: Tensor) -> Tensor:
        return self.second(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.way(self, self.first(x)))
        return y


ONCE = "may give what it keeps to one backward pass alone"
WAYS: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "offloading": (offloaded, ONCE),
    "selective checkpointing": (selective, ONCE),
    "a checkpoint that tells": (told, ONCE),
    "a Function that pops": (lambda m, x: m.inside(Pops.apply(x)), ""),  # type: ignore[no-untyped-call]
    "a Function that frees": (lambda m, x: m.inside(Frees.apply(x)), ""),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("name", WAYS)
def test_the_training_is_as_without_lipcore(name: str) -> None:
    way, label = WAYS[name]
    torch.manual_seed(0)
    model, x = Net(way), torch.randn(4, 5)
    model(x).square().sum().backward()
    plain = [p.grad for p in model.parameters()]
    expected = []
    for row in x:
        grads = torch.autograd.grad(model(row[None]).square().sum(), list(model.parameters()))
        expected.append(torch.cat([g.flatten() for g in grads]).double().norm())
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for _ in range(3):
            model.zero_grad()
            model(x).square().sum().backward()
            assert all(
                torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True) if p.grad is not None
            )
            torch.testing.assert_close(norms.per_sample, torch.stack(expected), rtol=1e-5, atol=0)
            assert label in norms.unproved if label else not norms.unproved


class Counts(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(5, 3), state

    def forward(self, x: Tensor) -> Tensor:
        state = self.state["seen"] if isinstance(self.state, dict) else self.state
        state[0] += 1
        y: Tensor = self.layer(x) * float(state[0])
        return y


@pytest.mark.parametrize(
    "make", [lambda: np.zeros(1), lambda: {"seen": np.zeros(1)}, lambda: array("d", [0.0]), lambda: bytearray(1)]
)
def test_arrays_are_put_back(make: Callable[[], Any]) -> None:
    model = Counts(make())
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for _ in range(3):
            model(torch.randn(4, 5)).sum().backward()
            assert not norms.unproved
    state = model.state["seen"] if isinstance(model.state, dict) else model.state
    assert state[0] == 3
