"""Wrapped models: the same names, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Custom, Wrapper, batches, mlp, seeded, sgd, train
from one_rank import one_rank
from torch import nn
from windows import assert_same

from lipcore import Lipschitz, Monitor
from lipcore.metric.results import Window


def test_wrappers_keep_names_and_keys() -> None:
    data = batches(4, 3)

    def run(wrap: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module]) -> Window:
        model = wrap(seeded(build))
        optimizer = sgd(model)
        with Monitor(model, optimizer) as monitor:
            train(model, data, optimizer)
            return monitor.compute()

    for build in (lambda: mlp(5, 7, 6, 1), Custom):
        expected = run(lambda model: model, build)
        for wrap in (
            Wrapper,
            lambda model: Wrapper(Wrapper(model)),
            lambda model: nn.DataParallel(model, device_ids=[]),
        ):
            found = run(wrap, build)
            assert_same(found, expected)
            assert found["lipschitz"].details == expected["lipschitz"].details


def test_names_with_a_wrappers_prefix_are_understood() -> None:
    model = Wrapper(seeded(lambda: mlp(5, 7, 6, 1)))
    with Monitor(model, metrics=[Lipschitz(input="module.2", output="module.4")]) as monitor:
        model(torch.randn(3, 5)).sum().backward()
        monitor.step()
        result = monitor.compute()["lipschitz"]
    assert result.details["first_layer"] == "2"
    assert list(result.normalized_gradient_norm) == ["4:Linear"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_distributed_data_parallel() -> None:
    data = batches(4, 3)
    with one_rank():
        windows = []
        for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
            model = wrap(seeded(lambda: mlp(5, 7, 6, 1)))
            optimizer = sgd(model)
            with Monitor(model, optimizer) as monitor:
                train(model, data, optimizer)
                windows.append(monitor.compute())
            assert not windows[-1].local
        assert_same(windows[1], windows[0])
