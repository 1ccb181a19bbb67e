"""Half-precision parameters, and the float32 master copies that move in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp, seeded
from points import Points
from torch import Tensor, nn

from lipcore import Monitor, Trajectory

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
STEP = 1e-5  # far below half an ulp of a bfloat16 near 0.3


def bf16_model() -> nn.Module:
    return seeded(lambda: mlp(5, 7, 1), dtype=torch.bfloat16)


def masters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float() for name, p in model.named_parameters()}


def move(model: nn.Module, masters: dict[str, Tensor], by: float = STEP) -> None:
    for name, parameter in model.named_parameters():
        masters[name] += by
        parameter.data.copy_(masters[name])


WAYS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "dict": lambda masters: masters,
    "callable": lambda masters: lambda name, parameter: masters[name],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_path_is_that_of_the_masters(way: str) -> None:
    model = bf16_model()
    masters = masters_of(model)
    shadows = Trajectory(model)  # for so few steps it does not complain
    trajectory = Trajectory(model, masters=WAYS[way](masters))
    points, still = Points(masters.items()), Points(model.named_parameters())
    for _ in range(9):
        move(model, masters)
        for one in (trajectory, shadows):
            one.update()
        for one in (points, still):
            one.look()
    points.check(trajectory.compute())
    still.check(shadows.compute())
    assert float(still.norms().sum()) != pytest.approx(float(points.norms().sum()), rel=0.2)


def test_a_replaced_entry_of_the_dict_is_seen() -> None:
    model = bf16_model()
    masters = masters_of(model)
    trajectory, points = Trajectory(model, masters=masters), Points(masters.items())
    for _ in range(3):
        points.tensors["0.weight"] = masters["0.weight"] = masters["0.weight"] + STEP
        model[0].weight.data.copy_(masters["0.weight"])
        trajectory.update()
        points.look()
    points.check(trajectory.compute())


def test_masters_of_some_parameters() -> None:
    model = bf16_model()
    masters = masters_of(model)
    del masters["2.bias"]
    trajectory = Trajectory(model, masters=lambda name, _: masters.get(name))
    points = Points({**dict(model.named_parameters()), **masters}.items())
    for _ in range(3):
        for name, parameter in model.named_parameters():
            if name in masters:
                masters[name] += 0.01
                parameter.data.copy_(masters[name])
            else:
                parameter.data += 0.5
        trajectory.update()
        points.look()
    points.check(trajectory.compute())


def test_masters_in_an_optimizer() -> None:
    """The usual loop: gradients go to the copies, the copies step, the parameters follow."""
    model = bf16_model()
    masters = {name: nn.Parameter(m) for name, m in masters_of(model).items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=0.05)
    for settings in ({}, {"mode": "updates", "source": "optimizer"}):
        points = Points(masters.items())
        metric = Trajectory(masters=masters, stats=["update_norm", "clipped_grad_norm"], **settings)
        with Monitor(model, optimizer, [metric]) as monitor:
            for _ in range(5):
                model.zero_grad()
                model(torch.randn(4, 5).bfloat16()).float().square().mean().backward()
                for name, parameter in model.named_parameters():
                    masters[name].grad = parameter.grad.float()
                norm = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
                optimizer.step()
                points.look()
                for name, parameter in model.named_parameters():
                    parameter.data.copy_(masters[name])
            result = monitor.compute()["trajectory"]
        points.check(result, distance=False)
        assert result.clipped_grad_norm["total"].last.value == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize(
    ("masters", "message"),
    [
        ({"0.weight": torch.zeros(5, 7)}, r"masters: expected a tensor of shape \[7, 5\] for '0.weight', got \[5, 7\]"),
        ({"0.weight": 3}, "masters: expected a tensor of shape .* got int"),
        ({"0.weihgt": torch.zeros(7, 5)}, "masters: there is no trainable parameter '0.weihgt'; names are like"),
        (lambda name, parameter: parameter.float()[:1], "masters: expected a tensor of shape .* for '0.weight'"),
        ({"0.weight": torch.full((7, 5), torch.nan)}, "'0.weight' has NaN or infinite values"),
    ],
    ids=["shape", "number", "unknown", "callable", "nan"],
)
def test_wrong_masters_are_named(masters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectory(bf16_model(), masters=masters)


def test_a_removed_entry_is_named() -> None:
    model = bf16_model()
    masters = masters_of(model)
    trajectory = Trajectory(model, masters=masters)
    del masters["2.weight"]
    with pytest.raises((ValueError, TypeError), match=r"2\.weight"):
        trajectory.update()


# ---- warnings


@pytest.mark.parametrize("window", [10, 3])
def test_parameters_that_do_not_move_are_warned_of_once(window: int) -> None:
    """Also where every window is short."""
    model = bf16_model()
    trajectory = Trajectory(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(24):
            model[2].bias.data += 1
            trajectory.update()
            if (i + 1) % window == 0:
                trajectory.compute()
                trajectory.reset()
    texts = [str(w.message) for w in caught]
    assert len(texts) == 3
    for name in ("0.weight", "0.bias", "2.weight"):
        (text,) = [t for t in texts if f"'{name}'" in t]
        assert "bfloat16 and did not move in" in text
        assert "masters=" in text


def test_float32_parameters_may_stand_still() -> None:
    trajectory = Trajectory(seeded(lambda: mlp(5, 7, 1)))
    for _ in range(12):
        trajectory.update()
    assert trajectory.compute().unmoved_steps["total"].sum.value == 12  # and no warning: those are errors here


def test_a_shadow_that_does_not_follow_is_warned_of_once() -> None:
    model = bf16_model()
    masters = masters_of(model)
    trajectory = Trajectory(model, masters=masters)
    move(model, masters, 0.5)
    trajectory.update()
    trajectory.compute()
    masters["0.bias"] += 0.5
    trajectory.update()
    with pytest.warns(UserWarning, match="parameter '0.bias' does not hold the values of its master copy") as caught:
        trajectory.compute()
        trajectory.compute()
    assert len(caught) == 1
