"""A module that is compiled inside an activation checkpoint: the backward pass runs it again, and it is to keep as many
tensors as the first time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor, PerSampleGradNorms
from lipcore.capture.compiled import armed

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("fresh_dynamo")]


class Net(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 1)
        self.reentrant = reentrant

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(x)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(checkpoint(self.inner, self.a(x), use_reentrant=self.reentrant))
        return y


def made(*, compiled: bool, reentrant: bool = False) -> Net:
    model = Net(reentrant).double()
    if compiled:
        model.b.compile(backend="aot_eager")
    return model


def data(size: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :1].sin()


def trained(model: Net, metrics: list[Any], sizes: tuple[int, ...] = (3,), steps: int = 3) -> tuple[Any, list[Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, metrics) as monitor:
        for i in range(steps):
            optimizer.zero_grad()
            sum(mse_loss(model(x), y) for x, y in (data(size, 10 * i + size) for size in sizes)).backward()
            optimizer.step()
        return monitor.compute(), [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("sizes", [(3,), (3, 3), (3, 5)])
@pytest.mark.parametrize("prove", [False, True])
def test_norms_are_those_of_the_same_model_that_is_not_compiled(prove: bool, sizes: tuple[int, ...]) -> None:
    windows, weights = zip(
        *(
            trained(
                made(compiled=compiled), [PerSampleGradNorms(loss_reduction="mean", prove=prove)], sizes=sizes, steps=4
            )
            for compiled in (False, True)
        ),
        strict=True,
    )
    assert all(map(torch.equal, *weights))
    expected, found = (window["per_sample_grad_norm"].norm for window in windows)
    for place in ("total", "a", "b", "c"):
        assert found[place]["mean"].value == pytest.approx(expected[place]["mean"].value, rel=1e-9)
        assert found[place]["mean"].count == expected[place]["mean"].count == 4 * sum(sizes)
    assert not armed


def test_lambda_is_that_of_the_same_model_that_is_not_compiled() -> None:
    found = [
        trained(made(compiled=compiled), [Lipschitz(input="a", lambda_every=1)])[0]["lipschitz"].local_lipschitz
        for compiled in (False, True)
    ]
    (expected, number) = (each["model"]["mean"] for each in found)
    assert number.value == pytest.approx(expected.value, rel=1e-9)
    assert number.count == expected.count == 9


@pytest.mark.parametrize("sizes", [(3,), (3, 3)])
def test_a_checkpoint_with_a_backward_pass_of_its_own_is_refused(sizes: tuple[int, ...]) -> None:
    """Nobody knows of which forward pass that is."""
    _, plain = trained(made(compiled=True, reentrant=True), [], sizes=sizes)
    norms = PerSampleGradNorms(loss_reduction="mean", prove=False)
    window, weights = trained(made(compiled=True, reentrant=True), [norms], sizes=sizes)
    assert all(map(torch.equal, weights, plain))
    assert torch.isnan(torch.tensor(window["per_sample_grad_norm"].norm["total"]["mean"].value))


def test_a_backward_pass_that_raises_leaves_no_probes() -> None:
    model = made(compiled=True)
    with Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), [PerSampleGradNorms(loss_reduction="mean")]):
        x, y = data(3, 0)
        mse_loss(model(x), y).backward()
        hook = model.a.weight.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mse_loss(model(x), y).backward()
        hook.remove()
        model(data(7, 1)[0])  # of another size
        model.eval()
        assert model(data(5, 1)[0]).shape == (5, 1)
        assert not armed
