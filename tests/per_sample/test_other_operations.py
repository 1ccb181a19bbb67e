"""Passes that do other operations than any proved one: labelled at once, and the next is proved."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


def unproved(
    model: Changing,
    passes: int,
    on: Callable[[int], bool],
    sizes: tuple[int, ...] = (4,),
    call: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    found = []
    called = model if call is None else call
    with PerSampleGradNorms(called, loss_reduction="sum") as norms:  # type: ignore[arg-type]
        for number in range(passes):
            model.on = on(number)
            called(torch.randn(sizes[number % len(sizes)], 5)).square().sum().backward()
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


class ByGraph(Changing):
    """As its like, with a parameter that no rule is for."""

    def __init__(self, more: Callable[[Changing, Tensor], Tensor]) -> None:
        super().__init__(more)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Checkpointed(Changing):
    """As its like, with an activation checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


@pytest.mark.filterwarnings("ignore:lipcore:UserWarning", "ignore:lipcore:RuntimeWarning")
@pytest.mark.parametrize("kind", [ByGraph, Checkpointed])
def test_where_the_graph_measures_and_in_checkpoints(kind: type[Changing]) -> None:
    mixes = kind(lambda _, hidden: hidden - hidden.mean(0))
    if kind is ByGraph:  # another graph is proved at once
        with pytest.raises(ValueError, match="the model mixes its samples"):
            unproved(mixes, 4, lambda number: number >= 3)
    else:
        assert unproved(mixes, 4, lambda number: number >= 3)[-1] == OTHER
    found = unproved(kind(lambda m, hidden: F.linear(hidden, m.inner.weight)), 9, lambda number: number >= 3)
    assert not any(found[:3])
    assert all(found[3:])


class Bypassed(Changing):
    """A model that gives a layer's weight to a function instead, by as many operations."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.inner.weight, self.inner.bias) if self.on else self.inner(x)
        y: Tensor = self.head(hidden.tanh())
        return y


@pytest.mark.filterwarnings("ignore:lipcore:UserWarning", "ignore:PerSampleGradNorms:UserWarning")
def test_a_layer_that_is_not_called_in_later_passes() -> None:
    found = unproved(Bypassed(lambda _, hidden: hidden), 9, lambda number: number >= 3)
    assert not any(found[:3])
    assert all(found[3:])


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:lipcore:UserWarning", "ignore:lipcore:RuntimeWarning")
def test_another_compiled_region_in_later_passes() -> None:
    model = Changing(lambda _, hidden: hidden - hidden.mean(0))
    found = unproved(model, 4, lambda number: number >= 3, call=torch.compile(model, dynamic=False))
    assert not any(found[:3])
    assert "no pass that ran these compiled regions was proved yet" in found[3]


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(x)) * 2


def beside_lipschitz(model: nn.Module, mixes: Callable[[int], bool]) -> list[str]:
    found = []
    with Monitor(model, metrics=[PerSampleGradNorms(loss_reduction="sum"), Lipschitz()]) as monitor:
        for number in range(12):
            if hasattr(model, "on"):
                model.on = mixes(number)
            model(torch.randn(4, 5)).square().sum().backward()
            found.append(monitor.metrics["per_sample_grad_norm"].unproved)  # type: ignore[attr-defined]
            monitor.step()
            model.zero_grad()
    return found


def test_beside_another_metric_that_adds_to_the_graph() -> None:
    """What that one adds is counted apart."""
    assert not any(beside_lipschitz(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)), bool))
    # It begins a gradient at the input, in the first pass alone: what is made of that adds nodes.
    assert not any(beside_lipschitz(nn.Sequential(Twice(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)), bool))
    model = Changing(lambda m, hidden: F.linear(hidden, m.inner.weight))
    model.head = nn.Linear(5, 1)
    found = beside_lipschitz(model, lambda number: number >= 6)
    assert not any(found[:6])
    assert found[6]


@pytest.mark.filterwarnings("ignore:lipcore:UserWarning", "ignore:PerSampleGradNorms:UserWarning")
def test_batches_of_one_are_compared_at_once() -> None:
    model = Changing(lambda m, hidden: F.linear(hidden, m.inner.weight))
    found = unproved(model, 9, lambda number: number >= 3, sizes=(1,))
    assert not any(found[:3])
    assert all("is not the sum of the samples' gradients" in why for why in found[3:])


class Frozen(Changing):
    """A model that freezes a layer while it calls it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        self.head.requires_grad_(False)
        y: Tensor = self.head(hidden)
        self.head.requires_grad_(True)
        return y


def test_a_layer_that_is_frozen_while_it_is_called_is_not_counted() -> None:
    torch.manual_seed(0)
    model, x = Frozen(lambda _, hidden: hidden), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        model(x).square().sum().backward()
    for row, norm in zip(x, norms.per_sample, strict=True):
        grads = torch.autograd.grad(model(row[None]).square().sum(), list(model.inner.parameters()))
        assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-5)


class Exchanged(Changing):
    """A model that calls a layer with other parameters in their place."""

    def forward(self, x: Tensor) -> Tensor:
        others = {name: p.detach().requires_grad_() for name, p in self.inner.named_parameters()}
        hidden = torch.func.functional_call(self.inner, others, (x,)) if self.on else self.inner(x)
        y: Tensor = self.head(hidden.tanh())
        return y


@pytest.mark.filterwarnings("ignore:lipcore:UserWarning", "ignore:PerSampleGradNorms:UserWarning")
def test_parameters_that_are_exchanged_in_later_passes() -> None:
    """By as many operations: the next proof tells, pass 64."""
    found = unproved(Exchanged(lambda _, hidden: hidden), 66, lambda number: number >= 60)
    assert not any(found[:60])
    assert all("was called with another tensor in its place" in why for why in found[63:])


class Pictures(nn.Module):
    """Takes samples in other ways than by the first tensor's first dimension."""

    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.returns = nn.Linear(5, 3), returns

    def forward(self, time: Any, x: Tensor | None = None) -> Any:
        if isinstance(time, dict):
            time, x = time["time"], time["x"]
        given = torch.cat(time) if x is None else x + time
        return self.returns(self.inner(given))


SAMPLES: dict[str, tuple[tuple[Any, ...], str]] = {
    "a list": (([torch.ones(1, 5)] * 3,), r"shape \[1, 5\], but argument 0 is a list of 3 tensors"),
    "one number before": ((torch.ones(1), torch.ones(3, 5)), r"shape \[1\], but argument 1 has 3 rows"),
    "one row before": ((torch.ones(1, 5), torch.ones(3, 5)), r"shape \[1, 5\], but argument 1 has 3 rows"),
    "a dict": (({"time": torch.ones(1), "x": torch.ones(3, 5)},), r"shape \[1\], but argument 0\['x'\] has 3 rows"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_that_are_taken_for_one_are_refused(name: str) -> None:
    given, why = SAMPLES[name]
    model = Pictures(lambda rows: rows)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            model(*given).sum().backward()
        with pytest.raises(ValueError, match=f"{why} and 3 rows are returned: these are the samples"):
            _ = norms.per_sample


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("batch_of_one", ["exact", "fast"])
def test_samples_that_may_be_taken_for_one_are_not_proved(name: str, batch_of_one: Any) -> None:
    given, why = SAMPLES[name]
    model = Pictures(lambda rows: rows.sum())
    with PerSampleGradNorms(model, loss_reduction="sum", batch_of_one=batch_of_one) as norms:
        for _ in range(6):
            model.zero_grad()
            model(*given).backward()
            assert re.search(why.split(", but ")[1], norms.unproved)


def test_the_last_batch_may_have_one_sample() -> None:
    """What is returned has as many rows as another argument then, by chance: larger batches have shown whose rows are
    whose."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 4)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return (self.inner(x) @ table.T).squeeze()

    model = Scores()
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for size in (4, 1, 4):
            model(torch.randn(size, 5), torch.randn(7, 4)).square().sum().backward()
            assert norms.per_sample.shape == (size,)
            assert not norms.unproved


ONE = {
    "a mask": lambda model: model(torch.ones(1, 4, 5), torch.zeros(4, 1)),
    "a state": lambda model: model([torch.ones(1, 5)]),
}


@pytest.mark.parametrize("name", ONE)
def test_one_sample_is_taken_for_one(name: str) -> None:
    model = Pictures(lambda rows: rows)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        ONE[name](model).sum().backward()
        assert norms.per_sample.shape == (1,)
        assert not norms.unproved
