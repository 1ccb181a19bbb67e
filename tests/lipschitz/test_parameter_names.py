"""What a window says of parameters names those that the model has."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, Trajectory, theory
from lipcore.metric.results import Window


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.out = nn.Embedding(11, 4), nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.out(self.tok(ids).mean(1))
        return found


def rows() -> Tensor:
    return torch.randn(1, 3)


def ids() -> Tensor:
    return torch.randint(0, 11, (1, 5))


def chain(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str | None]] = {
    "embedding": (Words, ids, None),
    "with a bias": (lambda: chain(True), rows, "0.bias"),
    "without a bias": (lambda: chain(False), rows, None),
    "one layer": (lambda: nn.Linear(3, 1), rows, "bias"),
}


def window_of(model: nn.Module, data: Callable[[], Tensor], *, followed: bool) -> Window:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = [Lipschitz(virtual_bias=followed), Trajectory()]
    with Monitor(model, optimizer, metrics, window_steps=3, prefix="stage") as monitor:
        for _ in range(3):
            model(data()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.history[0]


@pytest.mark.filterwarnings("ignore:lipcore does not follow")
@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_layers_bias_has_a_name_where_there_is_one(name: str, followed: bool) -> None:
    torch.manual_seed(0)
    kind, data, bias = MODELS[name]
    window = window_of(model := kind(), data, followed=followed)
    result = window["lipschitz"]
    expected = bias or ("0.bias" if followed and name == "without a bias" else None)
    assert result.details["first_bias"]["parameter"] == (expected and f"stage.{expected}")
    text = str([dict(result.details), *([*result[quantity]] for quantity in result)])
    known = {f"{before}{parameter}" for parameter, _ in model.named_parameters() for before in ("", "stage.")}
    known |= {"0.bias", "stage.0.bias"} if followed else set()  # which stands for the one that is followed
    assert set(re.findall(r"\b[\w.]+\.(?:bias|weight)\b", text)) <= known


def test_statements_about_another_bias_than_the_one_that_is_not_there() -> None:
    window = window_of(chain(False), rows, followed=False)
    note = theory.bias_variance([window], "stage.2.bias", learning_rate=0.1, eps=[1.0] * 3).lower_lipschitz.note
    assert "'stage.2.bias' is not the first layer's own bias, which has none" in note
