"""A small regression that every trainer runs, and what is true of it, from what was recorded beside the loop."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lipcore import Lipschitz, Metric, PerSampleGradNorms, Trajectory
from lipcore.metric.results import Window

X = torch.randn(22, 5, generator=torch.Generator().manual_seed(1))  # batches of 4, the last of 2
Y = X.sin().sum(1, keepdim=True)
PATH, LAMBDA, NORM = "trajectory", "lipschitz", "per_sample_grad_norm"


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def gradient_norm(model: nn.Module) -> float:
    return float(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm())


@dataclass
class Recorder:
    """What happened beside the loop: a control without lipcore, or the same loop with it.

    Attributes:
        points: the weights between the steps.
        before, used: norms of the gradients of the steps, before and after clipping.
        batches: the weights of every forward pass, and its samples.
    """

    points: list[Tensor] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    batches: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)

    def batch(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        exact = network().double()
        exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        self.batches.append((exact, x.double(), y.double()))

    def step(self, model: nn.Module) -> None:
        self.points.append(vector(model))

    @property
    def steps(self) -> int:
        return len(self.points) - 1

    @property
    def path(self) -> float:
        return sum(float((b - a).norm()) for a, b in itertools.pairwise(self.points))

    def sample_norms(self) -> Tensor:
        """Norms of single samples' gradients, float64, one at a time."""
        norms = []
        for model, x, y in self.batches:
            for i in range(len(x)):
                loss = nn.functional.mse_loss(model(x[i : i + 1]), y[i : i + 1])
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        return torch.stack(norms)

    def lambdas(self) -> Tensor:
        """Norms of the outputs' gradients at the samples, float64, one at a time."""
        found = []
        for model, x, _ in self.batches:
            for i in range(len(x)):
                point = x[i].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(model(point).sum(), point)
                found.append(gradient.norm())
        return torch.stack(found)


def metrics(**settings: Any) -> list[Metric]:
    """All that depends on a loop's passes and steps."""
    stats = ["path_length", "update_norm", "grad_norm", "clipped_grad_norm", "unmoved_steps"]
    return [Trajectory(stats=stats, **settings), Lipschitz(), PerSampleGradNorms(loss_reduction="auto")]


def near(value: float, rel: float) -> Any:
    return pytest.approx(value, rel=rel)


def check(window: Window | None, watched: Recorder, control: Recorder, rel: float = 2e-5) -> None:
    """Compare a window over the whole run with what is true, and the run with the one without lipcore."""
    assert all(torch.equal(a, b) for a, b in zip(watched.points, control.points, strict=True))
    assert window is not None
    assert not window.off
    assert window.steps == control.steps
    path = window[PATH]
    assert path.path_length["total"].sum.value == near(control.path, 1e-5)
    assert path.update_norm["total"].mean.value == near(control.path / control.steps, 1e-5)
    assert path.unmoved_steps["total"].sum.value == 0
    for name, norms in {"grad_norm": control.before, "clipped_grad_norm": control.used}.items():
        found = getattr(path, name)["total"]
        assert found.mean.value == near(sum(norms) / len(norms), 1e-6)
        assert found.max.value == near(max(norms), 1e-6)
    for found, expected in (
        (window[NORM].norm["total"], control.sample_norms()),
        (next(iter(window[LAMBDA].local_lipschitz.values())), control.lambdas()),
    ):
        assert found.mean.count == len(expected)
        for reducer in ("mean", "min", "max"):
            error = abs(getattr(found, reducer).value - float(getattr(expected, reducer)()))
            assert error <= rel * float(expected.max())
    assert window[NORM].details["proved"]


def run_both(run: Callable[[bool], tuple[Window | None, Recorder]], rel: float = 2e-5) -> Window:
    """Run a loop without lipcore and with it, and check the latter."""
    _, control = run(False)
    window, watched = run(True)
    check(window, watched, control, rel)
    assert window is not None
    return window


@contextlib.contextmanager
def no_word_of_ours() -> Iterator[None]:
    """Let the trainers warn; fail where lipcore does."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    words = ("lipcore", "optimizer=", "scaler=")  # a warning out of a hook has another's file name
    ours = [str(one.message) for one in told if any(word in f"{one.message} {one.filename}" for word in words)]
    assert not ours
