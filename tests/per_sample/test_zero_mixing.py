"""Samples that are mixed by a factor which is 0 in the first passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lipcore import PerSampleGradNorms

ZERO = "the model mixed its samples by a factor of exactly 0"
pytestmark = pytest.mark.filterwarnings("ignore:lipcore:UserWarning", "ignore:lipcore:RuntimeWarning")


def mean(hidden: Tensor) -> Tensor:
    return hidden.mean(0)


def attention(hidden: Tensor) -> Tensor:
    return (hidden @ hidden.T).softmax(-1) @ hidden


def rolled(hidden: Tensor) -> Tensor:
    return hidden.roll(1, 0)


def chosen(hidden: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)).flip(0)]


class Gated(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.head, self.mix, self.gate = nn.Linear(5, 5), nn.Linear(5, 3), mix, 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        y: Tensor = self.head(hidden + self.gate * self.mix(hidden))
        return y


class Bare(Gated):
    """The same, measured from the graph."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__(mix)
        self.inner = nn.Identity()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.weight)


@pytest.mark.parametrize("kind", [Gated, Bare])
@pytest.mark.parametrize("mix", [mean, attention, rolled, chosen])
def test_a_gate_that_begins_at_zero(mix: Callable[[Tensor], Tensor], kind: type[Gated]) -> None:
    torch.manual_seed(0)
    model, found, number = kind(mix), [], -1
    with (
        PerSampleGradNorms(model, loss_reduction="sum") as norms,
        pytest.raises(ValueError, match="mixes its samples|takes statistics over the batch"),
    ):
        for number in range(12):
            model.gate = 0.5 * (number >= 6)
            model(torch.randn(4, 5)).square().sum().backward()
            found.append(norms.unproved)
    assert 6 <= number < 12  # soon after it has opened
    assert not found[0]
    proved = [i for i, why in enumerate(found) if not why]
    assert max(proved) < 6  # never silently while it is open
    assert all(ZERO in why for why in found if why)


def test_hooks_on_tensors_of_other_models_see_no_nan() -> None:
    seen: list[Tensor] = []
    model = Gated(lambda hidden: hidden[:, :1].expand_as(hidden))
    model.head.register_forward_pre_hook(lambda _, args: args[0].register_hook(seen.append) and None)
    with PerSampleGradNorms(model, loss_reduction="sum"):
        for _ in range(2):
            model(torch.randn(4, 5)).square().sum().backward()
    assert len(seen) > 2  # proofs among them
    assert all(bool(grad.isfinite().all()) for grad in seen)


def test_where_anomalies_are_looked_for() -> None:
    with PerSampleGradNorms(model := Gated(mean), loss_reduction="sum") as norms, torch.autograd.detect_anomaly():
        for _ in range(2):
            model(torch.randn(4, 5)).square().sum().backward()
        assert ZERO in norms.unproved
