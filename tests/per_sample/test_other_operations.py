"""Passes that do other operations than any proved one: labelled at once, and the next is proved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import Lipschitz, Monitor, PerSampleGradNorms

OTHER = "no pass that does as many operations was proved yet"


class Changing(nn.Module):
    """A model that does more from a pass on, or in some passes."""

    def __init__(self, more: Callable[[Changing, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.head, self.more, self.on = nn.Linear(5, 5), nn.Linear(5, 3), more, False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        y: Tensor = self.head(self.more(self, hidden) if self.on else hidden)
        return y


def unproved(model: Changing, passes: int, on: Callable[[int], bool], sizes: tuple[int, ...] = (4,)) -> list[str]:
    found = []
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for number in range(passes):
            model.on = on(number)
            model(torch.randn(sizes[number % len(sizes)], 5)).square().sum().backward()
            found.append(norms.unproved)
            model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:lipcore:UserWarning", "ignore:lipcore:RuntimeWarning")
@pytest.mark.parametrize("first", [1, 2, 7])
def test_samples_that_are_mixed_in_later_passes(first: int) -> None:
    model = Changing(lambda _, hidden: hidden - hidden.mean(0))
    with pytest.raises(ValueError, match="parts at other samples|another one when the other samples"):
        unproved(model, first + 2, lambda number: number >= first)
    assert unproved(Changing(model.more), first + 1, lambda number: number >= first)[-1] == OTHER


@pytest.mark.filterwarnings("ignore:lipcore:UserWarning", "ignore:PerSampleGradNorms:UserWarning")
def test_a_weight_that_is_used_beside_its_layer_in_later_passes() -> None:
    found = unproved(Changing(lambda m, hidden: F.linear(hidden, m.inner.weight)), 80, lambda number: number >= 10)
    assert not any(found[:10])
    assert all(found[10:])
    assert "is not the sum of the samples' gradients" in found[-1]


def test_more_operations_that_keep_samples_apart_are_proved_once() -> None:
    found = unproved(Changing(lambda _, hidden: hidden.relu() + hidden), 40, lambda number: number % 3 == 2)
    assert found[2] == OTHER
    known = [number for number in range(40) if number % 3 == 2 and not found[number]]
    assert known  # it was proved when its turn came
    assert not any(found[number] for number in range(40) if number % 3 != 2)
    assert not any(found[known[0] :])


def test_an_input_of_another_shape_may_take_more() -> None:
    """A loop over the positions, say."""
    model = Changing(lambda _, hidden: hidden.relu())
    found = unproved(model, 12, lambda number: number % 2 == 1, sizes=(4, 6))
    assert not any(found)


def test_beside_another_metric_that_adds_to_the_graph() -> None:
    """What that one adds differs by pass: nothing is concluded from the number of operations."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))
    with Monitor(model, metrics=[PerSampleGradNorms(loss_reduction="sum"), Lipschitz()]) as monitor:
        for _ in range(12):
            model(torch.randn(4, 5)).square().sum().backward()
            assert not monitor.metrics["per_sample_grad_norm"].unproved  # type: ignore[attr-defined]
            monitor.step()
            model.zero_grad()
