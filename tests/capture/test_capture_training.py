"""A training that does not notice the hooks, and errors that never reach it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Wrapper, adam, batches, cnn, found_by_running, frozen_first, images, mlp, seeded, sgd, train
from torch import Tensor, nn
from windows import assert_unhooked

from lipcore import Lipschitz, Monitor, Trajectory
from lipcore.metric.results import Window


def with_dropout() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 1)
    )


def frozen_weight() -> nn.Sequential:
    model = mlp(5, 7, 6, 1)
    model[0].weight.requires_grad_(False)
    return model


def in_place() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.LayerNorm(7), nn.Linear(7, 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], list[tuple[Tensor, Tensor]]]]] = {
    "mlp": (lambda: mlp(5, 7, 6, 1), batches),
    "cnn": (cnn, images),
    "dropout": (with_dropout, batches),
    "frozen_first": (frozen_first, batches),
    "frozen_weight": (frozen_weight, batches),
    "in_place": (in_place, batches),
    "found_by_running": (found_by_running, batches),
}


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize(
    ("name", "optimizer_of"),
    [*(pytest.param(name, sgd, id=f"{name}-momentum") for name in MODELS), pytest.param("mlp", adam, id="mlp-adam")],
)
def test_training_is_bitwise_unchanged(name: str, optimizer_of: Callable[..., Any], size: int) -> None:
    build, data = MODELS[name]

    def run(metrics: list[Any] | None, *, watched: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        model = seeded(build)
        optimizer = optimizer_of(model)
        torch.manual_seed(5)
        monitor = Monitor(model, optimizer, metrics=metrics, window_steps=3) if watched else None
        train(model, data(20, size), optimizer)
        if monitor is not None:
            assert monitor.compute()["lipschitz"]
            monitor.close()
            assert sum(window["lipschitz"].skipped[place].sum.count for window, place in places(monitor)) == 18 * size
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [p.detach() for p in model.parameters()] + grads, state, torch.get_rng_state()

    plain = run(None, watched=False)
    for metrics in (None, [Lipschitz(batch_of_one="exact")]):
        watched = run(metrics, watched=True)
        for mine, theirs in zip(plain[:2], watched[:2], strict=True):
            assert len(mine) == len(theirs)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert torch.equal(plain[2], watched[2])


def places(monitor: Monitor) -> list[tuple[Window, str]]:
    return [(window, next(iter(window["lipschitz"].skipped))) for window in monitor.history]


@pytest.mark.parametrize("build", [lambda: mlp(5, 7, 1), found_by_running], ids=["chain", "custom"])
def test_nothing_is_left_on_the_model(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    keys = list(model.state_dict())
    attributes = {id(m): set(m.__dict__) for m in model.modules()} | {
        id(p): set(p.__dict__) for p in model.parameters()
    }
    optimizer = sgd(model)
    with Monitor(model, optimizer) as monitor:
        for size in (1, 4):
            train(model, batches(3, size), optimizer)
        assert list(model.state_dict()) == keys
        for thing in [*model.modules(), *model.parameters()]:
            assert set(thing.__dict__) == attributes[id(thing)]
    assert_unhooked(model)
    assert not optimizer._optimizer_step_post_hooks
    before = monitor.compute().to_dict()
    train(model, batches(2, 4), optimizer)
    assert monitor.compute().to_dict() == before


def test_an_unused_monitor_can_be_closed() -> None:
    for build in (lambda: mlp(5, 7, 1), found_by_running):
        model = seeded(build)
        monitor = Monitor(model)
        monitor.close()
        monitor.close()
        assert_unhooked(model)


def test_the_monitor_does_not_keep_a_model_alive_that_nobody_has_any_more() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer)
    train(model, batches(2, 4), optimizer)
    alive = weakref.ref(model)
    del model, optimizer, monitor
    gc.collect()
    assert alive() is None


def test_activations_are_not_kept_alive() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with Monitor(model, metrics=[Lipschitz()]):
        x = torch.randn(4, 5)
        out = model(x)
        out.sum().backward()
        alive = [weakref.ref(x), weakref.ref(out)]
        del x, out
        gc.collect()
        assert [ref() for ref in alive] == [None, None]


# ---- errors never reach the training


def test_no_backward_recorded_is_an_error_that_says_what_to_do() -> None:
    inner = seeded(lambda: mlp(5, 7, 1))
    undisturbed = copy.deepcopy(inner)
    outer = Wrapper(inner)
    optimizer, twin_optimizer = sgd(inner), sgd(undisturbed)
    monitor = Monitor(outer, optimizer, metrics=[Lipschitz(), Trajectory()])
    data = batches(4, 3)
    with pytest.warns(
        RuntimeWarning, match="lipcore stopped recording lipschitz: model: two optimizer steps were made"
    ):
        train(inner, data, optimizer)  # not through `outer`
    train(undisturbed, data, twin_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(inner.parameters(), undisturbed.parameters(), strict=True))
    with pytest.raises(ValueError, match="Call the very object that was passed as model"):
        monitor.compute()
    monitor.compute()  # raised once
    monitor.close()
    assert_unhooked(outer)


@pytest.mark.parametrize("call", ["compute", "close_window", "pop_window", "step", "flush", "close", "end_of_with"])
def test_a_kept_error_is_raised_by_the_next_call(call: str) -> None:
    model = seeded(lambda: mlp(5, 7, 3))
    monitor = Monitor(model, metrics=[Lipschitz(quantity="scalar")])
    with pytest.warns(RuntimeWarning, match="stopped recording"):
        model(torch.randn(2, 5)).sum().backward()
    with pytest.raises(ValueError, match="one value per sample is needed"):
        if call == "end_of_with":
            with monitor:
                pass
        else:
            getattr(monitor, call)()
    monitor.close()
    assert_unhooked(model)


def test_an_exception_in_the_with_block_goes_first() -> None:
    model = seeded(lambda: mlp(5, 7, 3))
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ZeroDivisionError),
        Monitor(model, metrics=[Lipschitz(quantity="scalar")]),
    ):
        model(torch.randn(2, 5)).sum().backward()
        raise ZeroDivisionError
    assert_unhooked(model)


@pytest.mark.parametrize("size", [1, 4])
def test_weights_that_became_nan_do_not_stop_the_training(size: int) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, window_steps=2) as monitor:
        train(model, batches(3, size), optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        train(model, batches(5, size), optimizer)
        assert len(monitor.history) == 4
        last = monitor.history[-1]
        assert last["lipschitz"].skipped["model:Linear"].sum.value == 2 * size
        assert last["lipschitz"].normalized_gradient_norm["model:Linear"].mean.count == 0
