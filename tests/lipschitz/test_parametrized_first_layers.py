"""A first layer whose weight is computed, or drawn, whenever it is read: training stays the same, and lambda is that of
the weight which the forward pass used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_models import constants
from few import few
from models import batches, mlp, mse, seeded, sgd
from oracle import same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lipcore import Lipschitz, Monitor

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight|spectral)_norm. is deprecated")


class Drawn(nn.Module):
    """Noise on a weight, drawn anew whenever it is read."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.3 * torch.randn_like(weight)


class Counting(nn.Module):
    """Changes with every reading."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("read", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.read.add_(1)
        return weight * self.read


def drawn(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Drawn())


def counted(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Counting())


def counted_bias(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "bias", Counting())


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.4)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm_old": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_old": nn.utils.weight_norm,
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    "pruned": pruned,
    "drawn": drawn,
    "counted": counted,
    "counted_bias": counted_bias,
}


def build(name: str, convolution: bool) -> nn.Sequential:
    if convolution:
        model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1))
    else:
        model = mlp(5, 7, 1, activation=nn.Tanh)
    WAYS[name](model[0])
    return model


def used_weight(model: nn.Module, twin: nn.Sequential, x: Tensor) -> Tensor:
    """What the model's next forward pass will use, found out on a twin."""
    twin.load_state_dict(model.state_dict())
    used: list[Tensor] = []
    lists = getattr(twin[0], "parametrizations", None)
    handle = None
    if lists is not None and "weight" in lists:
        handle = lists["weight"].register_forward_hook(lambda m, a, weight: used.append(weight))
    twin(x)
    if handle is not None:
        handle.remove()
    return (used or [twin[0].weight])[0].detach().clone()


def run(name: str, *, convolution: bool, size: int, watched: bool) -> tuple[list[Tensor], list[float], list[float]]:
    """Everything that a model of five steps has, and lambda in the mean of each step beside what it should be."""
    make = lambda: build(name, convolution)  # noqa: E731
    model, twin, found, expected = seeded(make), seeded(make), [], []
    optimizer = sgd(model)
    metrics = None if size > 1 else [Lipschitz()]
    monitor = Monitor(model, optimizer, metrics=metrics, window_steps=1) if watched else None
    torch.manual_seed(7)
    for x, y in batches(5, size, (1, 5) if convolution else (5,)):
        if watched:
            with torch.random.fork_rng():
                expected.append(float(_constants(model, used_weight(model, twin, x), x, convolution).mean()))
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
        if monitor is not None:
            (values,) = monitor.history[-1]["lipschitz"].local_lipschitz.values()
            found.append(values["mean"].value)
            assert values["mean"].count == size
    if monitor is not None:
        for window in monitor.history:
            (sides,) = window["lipschitz"].sandwich.values()
            assert sides["lower"].valid, sides["lower"].note
        monitor.close()
        assert not any(module._forward_hooks for module in model.modules())
    return [tensor.clone() for tensor in model.state_dict().values()], found, expected


def _constants(model: nn.Module, weight: Tensor, x: Tensor, convolution: bool) -> Tensor:
    first = nn.Conv1d(1, 3, 2) if convolution else nn.Linear(5, 7)
    state = model.state_dict()
    bias = next(state[key] for key in ("0.bias", "0.parametrizations.bias.original") if key in state)
    if "0.parametrizations.bias.0.read" in state:
        bias = bias * (state["0.parametrizations.bias.0.read"] + 1)
    first.weight.data, first.bias.data = weight.clone(), bias.clone()
    last = model[-1]
    head = nn.Linear(last.in_features, 1)
    head.load_state_dict(last.state_dict())
    return constants(nn.Sequential(first, nn.Tanh(), nn.Flatten(), head), x)


@pytest.mark.parametrize("size", few([4, 1], 1))
@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "convolution"])
@pytest.mark.parametrize("name", WAYS)
def test_five_steps_are_bit_for_bit_the_same_and_lambda_is_right(name: str, convolution: bool, size: int) -> None:
    alone, _, _ = run(name, convolution=convolution, size=size, watched=False)
    watched, found, expected = run(name, convolution=convolution, size=size, watched=True)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(watched, alone, strict=True))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
