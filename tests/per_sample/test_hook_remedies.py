"""A hook of the user that is set in mid-run: the refusal begins with it, and the remedy that it names works."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from per_sample_oracle import norms_sq, samples_of
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradNorms

NAME = "per_sample_grad_norm"
TAKE_OFF = "take the hook off, by its handle's remove(), and call rebind()"


class Scaled(nn.Module):
    """What no rule covers, and the graph measures."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def made(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 4), nn.Linear(4, 1))


def doubled(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return 2 * output


def repeated(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return torch.cat([output, output])


def step(model: nn.Module) -> Tensor:
    x = torch.randn(5, 3)
    expected = torch.stack(list(norms_sq(model, samples_of((x,), 5), torch.sum).values())).sum(0).sqrt().double()
    model.zero_grad()
    model(x).sum().backward()
    return expected


@pytest.mark.parametrize("hook", [doubled, repeated])
def test_the_hook_is_the_cause_and_comes_first_and_without_it_all_is_right_again(hook: Any) -> None:
    model = made(Scaled())
    with warnings.catch_warnings(), PerSampleGradNorms(model, loss_reduction="sum") as norms:
        warnings.simplefilter("ignore")
        for _ in range(3):
            assert torch.allclose(step(model), norms.per_sample)
        handle = model[2].register_forward_hook(hook)
        model(torch.randn(5, 3)).sum().backward()
        with pytest.raises(ValueError) as refused:
            _ = norms.per_sample
        handle.remove()
        said = str(refused.value)
        which = f"a hook of {__name__} on module '2'"
        cause = f"'1.w': the autograd graph cannot measure it: {which} would see another forward pass; nor can a rule: "
        assert f"cannot be measured per sample: {cause}there is no rule for Scaled" in said
        if hook is repeated:
            layer = f"'3.weight': the autograd graph cannot measure it: {which} would see another forward pass; nor can"
            assert f"{layer} a rule: module '3' (Linear): expected 5 samples at dimension 0, got shape [10, 4]" in said
        assert re.search(rf"Ways out: {re.escape(TAKE_OFF)}; on_unsupported='skip'", said)
        norms.rebind()
        for _ in range(3):
            assert torch.allclose(step(model), norms.per_sample)
        assert norms.broken == norms.unproved == ""


def test_what_is_not_proved_for_a_hook_says_so_with_the_remedy() -> None:
    model = made(nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = model[2].register_forward_hook(doubled)
    with Monitor(model, optimizer, [PerSampleGradNorms(loss_reduction="mean")], window_steps=2) as monitor:
        for i in range(4):
            if i == 2:
                handle.remove()
                monitor.rebind()
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        first, then = (window[NAME] for window in monitor.history)
    hooked = f"were not looked for: a hook of {__name__} on module '2' would see another forward pass; {TAKE_OFF}"
    assert [reason.endswith(hooked) for reason in first.details["not_proved"]] == [True]
    assert then.details["proved"]
    assert then.norm["total"].mean.label == "exact"
