"""A copied or pickled model, or optimizer, is not watched."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from models import Custom, batches, mlp, observe, reference, relative_error, seeded, sgd, train
from torch import nn
from windows import ratios_of

from lipcore import Lipschitz, Monitor


def clone_by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def clone_by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def clone_by_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("when", ["before_the_first_step", "in_mid_run"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("build", [lambda: mlp(5, 7, 1), Custom], ids=["chain", "custom"])
@pytest.mark.parametrize("clone", [clone_by_deepcopy, clone_by_pickle, clone_by_save])
def test_a_copy_of_a_watched_model_is_not_watched(
    clone: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module], size: int, when: str
) -> None:
    model = seeded(build)
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        if when == "in_mid_run":
            train(model, batches(2, size), optimizer)
        twin = clone(model)
        before = monitor.compute()
        train(twin, batches(3, size), sgd(twin))
        train(twin, batches(2, 3), sgd(twin))
        after = monitor.compute()
        assert (after and after.to_dict()) == (before and before.to_dict())
        assert (after is None) == (when == "before_the_first_step")
        train(model, batches(3, size), optimizer)
        count, _, _ = ratios_of(monitor.compute())
        assert count == size * (5 if when == "in_mid_run" else 3)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_copy_can_be_watched_by_itself() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference(model, x)
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        twin = copy.deepcopy(model)
        for found, wanted in zip(observe(twin, x), expected, strict=True):
            assert relative_error(found, wanted) <= 1e-12
        assert monitor.compute() is None
        monitor.step()
        assert ratios_of(monitor.compute())[0] == 0


def test_optimizer_copies_do_not_tick_the_clock() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        train(model, batches(2, 4), optimizer)
        twin = pickle.loads(pickle.dumps(optimizer))
        twin.step()
        assert monitor.compute().steps == 2
