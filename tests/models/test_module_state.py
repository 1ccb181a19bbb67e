"""What a forward pass changes in a model is put back; hooks that it installs are among it, lipcore's own are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipcore import PerSampleGradNorms
from lipcore.models.held import Held
from lipcore.models.module_state import ModuleState


class Collects(nn.Module):
    """Installs a hook in its first pass, and counts on it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.installed = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), False
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            self.layer.register_forward_hook(self.note)
            self.installed = True
        self.seen = []
        self.layer(x * self.scale)
        return torch.stack(self.seen).sum(0)

    def note(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.seen.append(output)


Collects.__module__ = "peft"  # as someone whose hooks are known to be harmless


def test_hooks_that_a_model_installs_are_there_once() -> None:
    model, x = Collects(), torch.randn(3, 4)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(2):
            output = model(x)
            output.square().sum().backward()
            assert not metric.unproved
    assert list(model.layer._forward_hooks.values()) == [model.note]
    torch.testing.assert_close(output, model.layer(x * model.scale))


def test_hooks_of_both_moments() -> None:
    layer = nn.Linear(2, 2)
    first = layer.register_forward_hook(lambda module, arguments, output: None)
    before = ModuleState(Held(layer))
    own = PerSampleGradNorms(layer, loss_reduction="sum")
    second = layer.register_forward_hook(lambda module, arguments, output: None)
    after, ours = ModuleState(Held(layer)), dict(layer._forward_hooks)
    before.put_back()
    assert layer._forward_hooks == {number: hook for number, hook in ours.items() if number != second.id}
    after.put_back()
    assert layer._forward_hooks == ours
    own.close()
    assert list(layer._forward_hooks) == [first.id, second.id]
