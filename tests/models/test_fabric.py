"""Fabric's wrapper around a model: two names for one module, and outputs that only Fabric may differentiate."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory, local_lipschitz

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
STATE = {"inside": False}


def refuse(gradient: Tensor) -> None:
    if not STATE["inside"]:
        raise RuntimeError("you have to call fabric.backward(loss)")


class FabricModule(nn.Module):
    """Calls one of two modules, which are the same one unless it was compiled or made parallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = module, module

    def forward(self, *arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = self._forward_module(*arguments)
        output = output.float()
        if output.requires_grad:
            output.register_hook(refuse)
        return output  # type: ignore[no-any-return]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def run(outer: bool) -> tuple[Any, nn.Module, Lipschitz, PerSampleGradNorms]:
    model = mlp()
    wrapped = FabricModule(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lipschitz, norms = Lipschitz(), PerSampleGradNorms(loss_reduction="mean")
    with Monitor(wrapped if outer else model, optimizer, [Trajectory(), lipschitz, norms]) as monitor:
        for _ in range(3):
            loss = wrapped(X).square().mean()
            STATE["inside"] = True
            loss.backward()
            STATE["inside"] = False
            optimizer.step()
            optimizer.zero_grad()
        return monitor.compute(), model, lipschitz, norms


def test_its_numbers_and_names_are_those_of_the_module_inside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, model, _, norms = run(True)
        expected, other, _, others = run(False)
    assert not found.off
    assert set(found.flat()) == set(expected.flat())
    assert found["lipschitz"].details == expected["lipschitz"].details
    assert (
        found["trajectory"].path_length["0.weight"].sum.value
        == expected["trajectory"].path_length["0.weight"].sum.value
    )
    assert torch.equal(norms.per_sample, others.per_sample)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_names_with_its_prefix_are_understood() -> None:
    model = FabricModule(mlp())
    with Monitor(model, metrics=[Lipschitz(input="_forward_module.0")]) as monitor:
        model._forward_module(X).sum().backward()
        monitor.step()
        assert monitor.compute()["lipschitz"].details["first_layer"] == "0"  # type: ignore[index]


def test_points_of_ones_own() -> None:
    model = mlp()
    assert torch.equal(local_lipschitz(FabricModule(model), X), local_lipschitz(model, X))


def test_other_modules_with_two_parts_are_no_wrappers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._forward_module, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Any:
            return self.head(self._forward_module(x))

    model = Two()
    with Monitor(model, metrics=[Trajectory()]) as monitor:
        model(X).sum().backward()
        monitor.step()
        assert "head.weight" in monitor.compute()["trajectory"].path_length  # type: ignore[index]
