"""Warnings that the user's filters make errors of (-W error): never raised in a training step, kept for close()."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import batches, mlp, seeded, sgd
from scenarios import penalty_on_parameters, plain
from torch import Tensor, nn

from lipcore import Lipschitz, Metric, Monitor, Trajectory
from lipcore.metric.hook_warnings import warn_in_hook

pytestmark = pytest.mark.filterwarnings("error")


class Plain(nn.Module):
    """Leaves autograd, and so cannot be differentiated by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x - float(x.numpy().mean()))


def with_batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


def half() -> nn.Module:
    """Its updates are below its resolution, so it does not move."""
    model = mlp(5, 7, 1).bfloat16()
    for parameter in model.parameters():
        parameter.data.fill_(100.0)
    return model


def vectors() -> nn.Module:
    return mlp(5, 7, 3)


Case = tuple[Callable[[], nn.Module], Callable[[], Metric], type[Warning] | type[Exception], str]
CASES: dict[str, Case] = {
    "BatchNorm": (with_batchnorm, Lipschitz, UserWarning, "mixes samples"),
    "numpy inside": (Plain, Lipschitz, UserWarning, "turned local_lipschitz off"),
    "half precision": (half, Trajectory, UserWarning, "did not move"),
    "an error of its own": (
        vectors,
        lambda: Lipschitz(quantity="scalar"),
        ValueError,
        "one value per sample is needed",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_not_interrupted(name: str) -> None:
    build, metric, kind, message = CASES[name]
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    monitor = Monitor(model, optimizer, [metric()], window_steps=12)
    for x, _ in batches(15, 4):
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
    with pytest.raises(kind, match=message):
        monitor.close()
    monitor.close()


def test_nor_by_the_shortcut() -> None:
    model = seeded(lambda: mlp(5, 7, 6, 1))
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer, [Lipschitz(batch_of_one="fast")])
    for step, (x, y) in enumerate(batches(300, 1)):
        (plain if step < 20 else penalty_on_parameters)(model, optimizer, x, y, step)
    with pytest.raises(UserWarning, match="more than the loss of one sample"):
        monitor.close()


def test_nor_by_a_metric_that_turns_itself_off() -> None:
    """The others go on."""
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = sgd(model)
    monitor = Monitor(nn.Sequential(*model), optimizer, window_steps=2)  # which is never called
    for x, _ in batches(6, 4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert len(monitor.history) == 3
    with pytest.raises(RuntimeWarning, match="turned lipschitz off"):
        monitor.close()


def test_a_warning_is_one_where_it_is_none_of_these() -> None:
    error = warn_in_hook("as expected", UserWarning)
    assert isinstance(error, UserWarning)
    with pytest.warns(UserWarning, match="as expected"):
        assert warn_in_hook("as expected", UserWarning) is None
