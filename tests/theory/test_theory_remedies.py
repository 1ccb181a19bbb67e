"""Every way out that messages of lipcore.theory and lipcore.regions name is tried: the numbers come, and are right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from any_models import constants
from remedies import Remedy, try_it
from theory_runs import RATE, SIZE, Run
from torch import Tensor, nn
from torch.nn.utils import prune

from lipcore import Lipschitz, Monitor, Trajectory, theory
from lipcore.regions import Coverage, Plane, activation_patterns, slice_map

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def net(*middle: nn.Module, last: int = 1, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), *middle, activation(), nn.Linear(6, last))


# ---- the product of spectral norms


def product(model: nn.Module) -> None:
    """The product of spectral norms by SVD in float64."""
    weights = [layer.weight.detach().double() for layer in model if isinstance(layer, nn.Linear)]
    expected = float(torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights]).prod())
    assert theory.spectral_norm_product(model, X).value == pytest.approx(expected, rel=1e-5)


def changed(how: Callable[[nn.Linear], Any]) -> nn.Sequential:
    model = net()
    how(model[0])
    return model


def without(how: Callable[[nn.Linear], Any], undo: Callable[[nn.Linear], Any]) -> None:
    """Undone in a model made anew, which has the same outputs."""
    model, anew = changed(how), changed(how)
    anew.load_state_dict(model.state_dict())
    undo(anew[0])
    product(anew)
    assert torch.allclose(model(X), anew(X), atol=1e-6)


SPECTRAL: dict[str, Remedy] = {
    "old weight_norm": Remedy(
        lambda: theory.spectral_norm_product(changed(old_weight_norm), X),
        r"WeightNorm.*remove it: .*torch\.nn\.utils\.remove_weight_norm\(\)",
        lambda: without(old_weight_norm, nn.utils.remove_weight_norm),
    ),
    "pruning": Remedy(
        lambda: theory.spectral_norm_product(changed(pruned), X),
        r"remove it: .*torch\.nn\.utils\.prune\.remove\(\)",
        lambda: without(pruned, lambda layer: prune.remove(layer, "weight")),
    ),
    "Dropout": Remedy(
        lambda: theory.spectral_norm_product(net(nn.Dropout()), X),
        "leave it out or put the model into eval mode",
        lambda: [product(net()), product(net(nn.Dropout()).eval())],
    ),
}


def old_weight_norm(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


def pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


@pytest.mark.parametrize("name", SPECTRAL)
def test_products_of_spectral_norms(name: str) -> None:
    try_it(SPECTRAL[name])


# ---- regions


def relu(*middle: nn.Module) -> nn.Sequential:
    return net(*middle, activation=nn.ReLU)


def counted(model: nn.Module, of: nn.Module | None = None) -> None:
    """As many regions as there are signs of the hidden layer."""
    plain = relu() if of is None else of
    signs = (plain[0](X) > 0).int().tolist()
    assert activation_patterns(model, X).regions == len({tuple(row) for row in signs})


def covered(model: nn.Sequential) -> None:
    """A training input's constant is its own."""
    coverage = Coverage(model, X)
    found = coverage.query(X, solve=False)
    assert set(found.status.tolist()) == {"train"}
    expected = constants(model, X)
    assert torch.allclose(torch.as_tensor(found.bound), expected, rtol=1e-5)


def stale(build_anew: bool) -> None:
    model = relu()
    coverage = Coverage(model, X)
    with torch.no_grad():
        model[0].weight.mul_(2)
    if build_anew:
        covered(model)
    else:
        coverage.query(X, solve=False)


def through() -> None:
    plane = Plane.through(X[0], X[1], X[2])
    found, away = plane.coordinates(X[:3])
    assert found[:2].tolist() == [pytest.approx([0, 0], abs=1e-6), pytest.approx([1, 0], abs=1e-6)]
    assert float(away.max()) < 1e-5


class Branch(nn.Module):
    """Two ways, by a value that depends on x, or one."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.net, self.branches = relu(), branches

    def forward(self, x: Tensor) -> Tensor:
        return -self.net(x) if self.branches and bool(x.sum() > 100) else self.net(x)


REGIONS: dict[str, Remedy] = {
    "Dropout": Remedy(
        lambda: activation_patterns(relu(nn.Dropout()), X),
        r"call model\.eval\(\)",
        lambda: counted(relu(nn.Dropout()).eval()),
    ),
    "BatchNorm without running statistics": Remedy(
        lambda: activation_patterns(relu(nn.BatchNorm1d(6, track_running_stats=False)).eval(), X),
        r"or train it with track_running_stats=True and call model\.eval\(\)",
        lambda: covered(relu(nn.BatchNorm1d(6)).eval()),
    ),
    "a smooth activation": Remedy(
        lambda: activation_patterns(net(), X), "patterns need ReLU-family activations", lambda: counted(relu())
    ),
    "a smooth head": Remedy(
        lambda: Coverage(nn.Sequential(*relu(), nn.Sigmoid()), X),
        r"pass the part before it \(model\[:-1\]\)",
        lambda: covered(nn.Sequential(*relu(), nn.Sigmoid())[:-1]),
    ),
    "a model that changed": Remedy(lambda: stale(False), r"build it anew: Coverage\(model, x\)", lambda: stale(True)),
    "a branch": Remedy(
        lambda: activation_patterns(Branch(True), X), "leave the branch out", lambda: counted(Branch(False))
    ),
    "a plane that is none": Remedy(lambda: Plane(X[0], X[1], X[1]), r"use Plane\.through\(\)", through),
    "a coverage of another output": Remedy(
        lambda: sliced(output=lambda y: y[:, 0]),
        r"pass Coverage\(model, x, output=output\) with the same ones",
        lambda: sliced(),
    ),
    "TorchScript": Remedy(
        lambda: activation_patterns(scripted(), X), "use the Python module that it was made of", lambda: counted(relu())
    ),
}


def sliced(**of_coverage: Any) -> None:
    model = relu()
    found = slice_map(model, Plane.through(*X[:3]), resolution=3, coverage=Coverage(model, X, **of_coverage))
    assert found.coverage is not None


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(relu())


@pytest.mark.parametrize("name", REGIONS)
def test_regions(name: str) -> None:
    try_it(REGIONS[name])


# ---- statements about runs


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def windowed(close: bool = True, metrics: Any = None) -> Monitor:
    model = net()
    monitor = Monitor(model, metrics=metrics)
    model(X).square().mean().backward()
    monitor.step()
    if close:
        monitor.close_window()
    monitor.close()
    return monitor


def test_no_window() -> None:
    def right() -> None:
        monitor = windowed()
        found = theory.sandwich(monitor.history).middle.value
        mean = monitor.history[0]["lipschitz"].normalized_gradient_norm["model:Linear"].mean
        assert found == pytest.approx(mean.value, rel=1e-12)

    try_it(Remedy(lambda: theory.sandwich(windowed(close=False).history), r"monitor\.close_window\(\)", right))


def test_the_monitor_in_place_of_its_history(run: Run) -> None:
    monitor = windowed()
    try_it(
        Remedy(
            lambda: theory.sandwich(monitor),
            r"pass its history: monitor\.history",
            lambda: theory.sandwich(monitor.history).middle.value > 0,
        )
    )


def test_a_metric_that_is_missing() -> None:
    try_it(
        Remedy(
            lambda: theory.sandwich(windowed(metrics=[Trajectory()]).history),
            r"give the Monitor one \(metrics=\[\.\.\.\]\)",
            lambda: theory.sandwich(windowed(metrics=[Lipschitz()]).history).middle.value > 0,
        )
    )


def test_another_learning_rate(run: Run) -> None:
    def right() -> None:
        found = theory.bias_variance(run.history, "0.bias")
        points = torch.stack(run.bias[-1])
        expected = float(points.var(0, correction=0).sum()) / RATE**2
        assert found.variance_over_lr_sq.value == pytest.approx(expected, rel=1e-6)
        assert found.last_step == 4 * SIZE

    provoke = lambda: theory.bias_variance(run.history, "0.bias", learning_rate=2 * RATE)  # noqa: E731
    try_it(Remedy(provoke, "leave it out to take that", right))


def test_logits_for_probabilities() -> None:
    logits = torch.tensor([-2.0, 0.5, 3.0])
    expected = 1 / (1 + math.exp(3))

    def right() -> None:
        assert theory.sigmoid_head(logits.sigmoid()).mu.value == pytest.approx(expected, rel=1e-5)

    try_it(Remedy(lambda: theory.sigmoid_head(logits), "was this the logit", right))
