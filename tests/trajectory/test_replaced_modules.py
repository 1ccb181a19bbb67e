"""Modules that are replaced while they are watched: as replaced parameters, they are followed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lipcore import Monitor, Trajectory

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def replace_leaf(model: Any) -> None:
    model.body[0] = nn.Linear(3, 5)


def replace_branch(model: Any) -> None:
    model.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5))


def replace_head(model: Any) -> None:
    model.head = nn.Linear(5, 1)


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def train(model: nn.Module, steps: int) -> list[torch.Tensor]:
    optimizer, points = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        points.append(vector(model))
    return points


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("change", [replace_leaf, replace_branch, replace_head])
@pytest.mark.parametrize("settings", [{}, {"mode": "sketch"}, {"window_blocks": 2}], ids=["exact", "sketch", "sliding"])
def test_they_are_followed(change: Callable[[Any], None], settings: dict[str, Any], every: int) -> None:
    torch.manual_seed(0)
    model = Net()
    trajectory, points = Trajectory(model, every_steps=every, **settings), [vector(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(12):
        if step == 6:
            change(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        trajectory.update()
        if step % every == every - 1:
            points.append(vector(model))
    result = trajectory.compute()
    length = sum(float((b - a).norm()) for a, b in itertools.pairwise(points))
    near = 0.2 if settings.get("mode") == "sketch" else 1e-5
    quantity = result.path_length if every == 1 else result.chord_length
    assert quantity["total"].sum.value == pytest.approx(length, rel=near)
    assert result.distance["total"].last.value == pytest.approx(float((points[-1] - points[0]).norm()), rel=near)
    assert list(trajectory.drain().steps) == list(range(1, 12 // every + 1))


def test_in_a_monitor() -> None:
    torch.manual_seed(0)
    model = Net()
    with Monitor(model, metrics=[Trajectory(stats=["path_length", "update_norm"])], window_steps=None) as monitor:
        points = [vector(model)]
        for change in (replace_head, replace_leaf, replace_branch):
            change(model)
            monitor.step()
            points.append(vector(model))
            monitor.step()
            points.append(vector(model))
        window = monitor.compute()
    length = sum(float((b - a).norm()) for a, b in itertools.pairwise(points))
    assert window is not None
    assert window["trajectory"].path_length["total"].sum.value == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "head", nn.Linear(5, 2)),
        lambda m: setattr(m, "head", nn.Linear(5, 1, bias=False)),
        lambda m: setattr(m, "body", nn.Linear(3, 5)),
    ],
    ids=["other shape", "no bias", "other names"],
)
def test_one_with_other_parameters_is_refused_and_rebind_helps(change: Callable[[Any], None]) -> None:
    model = Net()
    trajectory = Trajectory(model)
    trajectory.update()
    change(model)
    with pytest.raises(ValueError, match=r"trajectory: (a module was replaced by one with other|parameter .* removed)"):
        trajectory.update()
    trajectory.rebind()
    trajectory.update()
    assert trajectory.compute().update_norm["total"].last.count == 1
