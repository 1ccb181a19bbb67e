"""Activation checkpoints around the model, its loss, or a part of it: lambda is right, and training notices nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_models import Normalize, before, constants
from few import few
from models import Graph, mlp, relative_error, seeded
from oracle import same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def frozen() -> nn.Module:
    model = mlp(5, 7, 1)
    model[0].requires_grad_(False)
    return model


def checkpointed_part() -> nn.Module:
    rest = mlp(5, 7, 1)
    return Graph(lambda m, x: m.last(checkpoint(m.rest, 2 * x, use_reentrant=False)), rest=rest, last=nn.Linear(1, 1))


def around_model(m: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(m, x, use_reentrant=False).square().sum()


def around_loss(m: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m(x).square().sum(), x, use_reentrant=False)


def around_what_is_before(m: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m(x + 0), x, use_reentrant=False).square().sum()


def in_a_dict(m: nn.Module, x: Tensor) -> Tensor:
    inputs = {"x": x}
    loss = checkpoint(lambda: m(**inputs), use_reentrant=False).square().sum()
    assert inputs["x"] is x
    return loss


def two_passes(m: nn.Module, x: Tensor) -> Tensor:
    return sum(around_model(m, part) for part in (x[:2], x[2:]))  # type: ignore[return-value]


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    f.__name__: f for f in (around_model, around_loss, around_what_is_before, in_a_dict, two_passes)
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "product": lambda: Graph(lambda m, x: m.rest(x), rest=mlp(5, 7, 1)),
    "gradient": lambda: Graph(lambda m, x: m.rest(x), rest=before(Normalize())),
    "frozen": lambda: Graph(lambda m, x: m.rest(x), rest=frozen()),
    "part": checkpointed_part,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("every", few([1, 3, None], 1))
def test_checkpoints(model: str, call: str, every: int | None) -> None:
    build, x = MODELS[model], data(4, 5)
    expected = constants(seeded(build, dtype=torch.float64), x)
    gradients: list[list[Tensor]] = []
    for watched in (False, True):
        m = seeded(build, dtype=torch.float64)
        metric = Lipschitz(lambda_every=every)
        monitor = Monitor(m, metrics=[metric]) if watched else None
        for _ in range(4):
            CALLS[call](m, x).backward()
            if monitor is not None:
                monitor.step()
        gradients.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
        if monitor is not None:
            (values,) = monitor.compute()["lipschitz"].local_lipschitz.values()
            monitor.close()
            assert values["mean"].valid
            found = values["max"].value  # of all samples, or of those passes in which it was taken
            assert float((expected - found).abs().min()) <= 1e-11
            assert every is None or found == pytest.approx(float(expected.max()), rel=1e-11)
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


def test_the_input_of_a_layer_in_a_checkpoint() -> None:
    x = data(4, 5)
    model = seeded(checkpointed_part, dtype=torch.float64)
    expected = constants(nn.Sequential(model.rest, model.last), 2 * x)
    for hooked in (False, True):
        if hooked:  # so that W_1 is not all that this layer does
            model.rest[0].register_forward_hook(lambda module, given, output: output * 1)
        metric = Lipschitz(input="rest.0", lambda_every=1)
        with Monitor(model, metrics=[metric]) as monitor:
            for _ in range(3):
                model(x).square().sum().backward()
                monitor.step()
            found: Any = metric.per_sample.local_lipschitz
        assert relative_error(found, expected) <= 1e-11
