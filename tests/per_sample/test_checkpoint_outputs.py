"""Modules without a rule inside activation checkpoints that return more than a tensor: all that is used counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few
from per_sample_models import made
from per_sample_oracle import assert_norms, norms_sq, samples_of, weighted_sum
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import PerSampleGradNorms

B, T, C, H = 3, 4, 4, 5


class Checkpointed(nn.Module):
    """A module inside a checkpoint, and a head on what `used` makes of its output."""

    def __init__(self, inside: Callable[[], nn.Module], used: Callable[[Any], Tensor], width: int) -> None:
        super().__init__()
        self.inside, self.head, self.used = inside(), nn.Linear(width, 2), used

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.used(checkpoint(self.inside, x, use_reentrant=False)))
        return found


class Steps(nn.Module):
    """A loop over a cell, each step in a checkpoint, or all of them in that around."""

    def __init__(self, kind: type[nn.RNNCellBase], each: bool) -> None:
        super().__init__()
        self.cell, self.each = kind(C, H), each  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Any:
        zero = x.new_zeros(len(x), H)
        state: Any = (zero, zero) if isinstance(self.cell, nn.LSTMCell) else zero
        for now in x.unbind(1):
            state = checkpoint(self.cell, now, state, use_reentrant=False) if self.each else self.cell(now, state)
        return state


class Returns(nn.Module):
    """A module with a parameter of its own that packs two tensors as it is told."""

    def __init__(self, packed: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.scale, self.packed = nn.Parameter(torch.rand(C)), packed

    def forward(self, x: Tensor) -> Any:
        return self.packed(x * self.scale, x + self.scale.square())


def stepped(kind: type[nn.RNNCellBase]) -> nn.Module:
    return nn.Sequential(Steps(kind, True), First(), nn.Linear(H, 2))


class First(nn.Module):
    def forward(self, state: Any) -> Tensor:
        found: Tensor = state[0] if isinstance(state, tuple) else state
        return found


def returns(packed: Callable[[Tensor, Tensor], Any], used: Callable[[Any], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Checkpointed(lambda: Returns(packed), used, C)


def recurrent(kind: type[nn.RNNBase], used: Callable[[Any], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Checkpointed(lambda: kind(C, H, batch_first=True), used, H)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM's hidden state": recurrent(nn.LSTM, lambda out: out[1][0][-1]),
    "LSTM's cell state": recurrent(nn.LSTM, lambda out: out[0][:, -1] + out[1][1][-1]),
    "LSTMCell, step by step": lambda: stepped(nn.LSTMCell),
    "a dict": returns(lambda a, b: {"a": a, "b": b}, lambda out: out["a"]),
    "LSTM's output": recurrent(nn.LSTM, lambda out: out[0][:, -1]),
    "GRU's hidden state": recurrent(nn.GRU, lambda out: out[1][-1]),
    "GRUCell, step by step": lambda: stepped(nn.GRUCell),
    "LSTMCell": lambda: Checkpointed(lambda: Steps(nn.LSTMCell, False), lambda out: out[0], H),
    "both of a dict": returns(lambda a, b: {"a": a, "b": b}, lambda out: out["a"] * out["b"]),
    "a list": returns(lambda a, b: [a, b], lambda out: out[0] * out[1]),
    "tuples inside": returns(lambda a, b: ((a,), b), lambda out: out[0][0] * out[1]),
    "nothing first": returns(lambda a, b: (None, a), lambda out: out[1]),
    "the same twice": returns(lambda a, b: (a, a), lambda out: out[0] * out[1]),
}


@pytest.mark.parametrize("name", few(MODELS, 4))
def test_in_every_pass(name: str) -> None:
    model = made(MODELS[name])
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(3):
            x = torch.randn(B, T, C)
            expected = norms_sq(model, samples_of((x,), B), weighted_sum)
            weighted_sum(model(x)).backward()
            assert_norms(metric, expected)
            assert not metric.unproved


def test_a_state_that_is_used_later_is_nan_with_its_reason_and_then_measured() -> None:
    """Its module is run again in the backward pass since the first, in which its output alone was used."""
    model = made(lambda: Checkpointed(lambda: nn.LSTM(C, H, batch_first=True), lambda out: out[0][:, -1], H))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for step in range(5):
            if step == 2:
                model.used = lambda out: out[1][0][-1]
            x = torch.randn(B, T, C)
            expected = norms_sq(model, samples_of((x,), B), weighted_sum)
            weighted_sum(model(x)).backward()
            if step != 2:
                assert_norms(metric, expected)
                continue
            assert metric.per_sample.isnan().all()
            assert (
                "module 'inside' (LSTM): a gradient came to an output beside its first, a state perhaps"
                in metric.broken
            )
            assert "attention" not in metric.broken
            assert metric.broken.endswith("the next passes are measured from the autograd graph")
