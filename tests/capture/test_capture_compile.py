"""Hooks inside torch.compile: the same numbers, no graph break, bounded recompiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Custom, batches, cnn, frozen_first, images, mlp, seeded, sgd, train
from torch import Tensor, nn
from windows import assert_same, assert_unhooked, ratios_of

from lipcore import Lipschitz, Monitor, Trajectory
from lipcore.metric.results import Window

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def compiled_run(
    build: Callable[[], nn.Module], backend: str, data: list[Any], **settings: Any
) -> tuple[Window, nn.Module]:
    inner = seeded(build)
    model = torch.compile(inner, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
    with Monitor(model, optimizer, metrics=[Lipschitz(**settings), Trajectory()]) as monitor:
        for x, y in data:
            train(model, [(x, y)], optimizer)
            with torch.no_grad():
                model(x)
        return monitor.compute(), inner


def in_place_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1))


def circular() -> nn.Sequential:
    first = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 1))


def tokens() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(15, 1)
    )


COMPILED: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any], str]] = {
    "mlp": (in_place_mlp, batches, "0"),
    "cnn": (cnn, images, "0"),
    "frozen": (frozen_first, batches, "0"),
    "circular": (circular, images, "0"),
    "tokens": (tokens, batches, "1"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", [name if name in ("mlp", "circular") else pytest.param(name, marks=pytest.mark.ci) for name in COMPILED]
)
def test_compiled_models(name: str, backend: str, fresh_dynamo: Any) -> None:
    build, data_of, first = COMPILED[name]
    data = data_of(4, 3)
    found, inner = compiled_run(build, backend, data, input=first)
    assert sum(fresh_dynamo["graph_break"].values()) == 0
    assert fresh_dynamo["stats"]["unique_graphs"] <= 3  # training, evaluation, and one more
    model = seeded(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, metrics=[Lipschitz(input=first), Trajectory()]) as monitor:
        train(model, data, optimizer)
        expected = monitor.compute()
    assert_same(found, expected, rel=2e-5)
    assert ratios_of(found)[0] == 12
    for mine, theirs in zip(inner.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_compiled_training_is_bitwise_unchanged_and_recompiles_are_bounded(fresh_dynamo: Any) -> None:
    def run(watched: bool) -> list[Tensor]:
        torch._dynamo.reset()
        fresh_dynamo.clear()
        inner = seeded(lambda: mlp(5, 7, 6, 1))
        model = torch.compile(inner, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.01)
        monitor = Monitor(model, optimizer) if watched else None
        for size in (4, 4, 3, 2, 5, 6, 4):
            train(model, batches(2, size), optimizer)
        if monitor is not None:
            assert ratios_of(monitor.compute())[0] == 2 * 28
            monitor.close()
        return [p.detach().clone() for p in inner.parameters()]

    plain_run, watched_run = run(False), run(True)
    assert fresh_dynamo["stats"]["unique_graphs"] <= 3  # the first size, any size, and one more
    assert all(torch.equal(a, b) for a, b in zip(plain_run, watched_run, strict=True))


def test_what_cannot_be_done_with_compiled_models_is_said() -> None:
    inner = seeded(Custom)
    with pytest.warns(UserWarning, match="off: the first layer of a compiled model cannot be found by watching"):
        Monitor(torch.compile(inner, backend="eager"), metrics=[Lipschitz()]).close()
    assert_unhooked(inner)
    in_place_compiled = seeded(lambda: mlp(5, 7, 1))
    in_place_compiled.compile(backend="eager")
    with pytest.raises(ValueError, match=r"model: was compiled in place by model\.compile\(\)"):
        Monitor(in_place_compiled, metrics=[Lipschitz()])


def test_a_monitor_attached_after_the_first_compiled_call_says_so(fresh_dynamo: Any) -> None:
    model = torch.compile(seeded(lambda: mlp(5, 7, 1)), backend="eager")
    optimizer = sgd(model)
    train(model, batches(2, 4), optimizer)
    with (
        pytest.warns(RuntimeWarning, match="stopped recording"),
        pytest.raises(ValueError, match=r"before its first call \(or torch\._dynamo\.reset\(\)\)"),
        Monitor(model, optimizer, metrics=[Lipschitz()]),
    ):
        train(model, batches(3, 4), optimizer)
