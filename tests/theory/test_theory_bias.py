"""Corollaries 2 and 3: against formulas by hand, and every kind of step they are not about."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from theory_runs import RATE, SIZE, Run
from torch import nn

from lipcore import Lipschitz, Monitor, Trajectory, theory
from lipcore.metric.results import History


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def test_corollary_2(run: Run) -> None:
    found = theory.bias_variance(run.history, "0.bias", learning_rate=RATE, eps=run.eps[-1])
    path = torch.stack(run.bias[-1])
    variance = float((path - path.mean(0)).square().sum() / (SIZE + 1))
    moves = path.diff(dim=0).norm(dim=1)
    shrink = SIZE / (4 * (SIZE + 1))
    assert found.variance.value == pytest.approx(variance, rel=1e-6)
    assert found.variance_over_lr_sq.value == pytest.approx(variance / RATE**2, rel=1e-6)
    assert found.lower.value == pytest.approx(shrink * float(moves.mean()) ** 2, rel=1e-6)
    lam = np.mean(run.lam[-1]) / float(run.sigma[0][0])
    assert found.printed.value == pytest.approx(shrink * (RATE * lam) ** 2, rel=1e-6)
    inverse = np.mean(np.array(run.eps[-1]) ** -2.0)
    assert found.lower_lipschitz.value == pytest.approx(shrink * (RATE * lam) ** 2 / inverse, rel=1e-6)
    assert found.lower_lipschitz.value <= found.lower.value <= found.variance.value
    assert found.printed.label == "heuristic"


def test_corollary_3(run: Run) -> None:
    eps_max = max(max(eps) for eps in run.eps)
    found = theory.bias_distance(run.history, "0.bias", learning_rate=RATE, eps_max=eps_max)
    distance = float((run.bias[-1][-1] - run.bias[0][0]).norm())
    length = sum(float(torch.stack(path).diff(dim=0).norm(dim=1).sum()) for path in run.bias)
    assert found.distance.value == pytest.approx(distance, rel=1e-6)
    assert found.length.value == pytest.approx(length, rel=1e-6)
    assert found.directness.value == pytest.approx(distance / length, rel=1e-6)
    assert found.bound.value == pytest.approx(RATE * eps_max * np.sum(run.lam) / float(run.sigma[0][-1]), rel=1e-6)
    assert found.bound.valid
    assert found.bound.value >= distance
    assert not theory.bias_distance(Run(inputs=3, width=5, epochs=1).history, "0.bias").bound.valid


def test_the_recorded_rate_is_the_default(run: Run) -> None:
    eps_max = max(max(eps) for eps in run.eps)
    given = theory.bias_distance(run.history, "0.bias", learning_rate=RATE, eps_max=eps_max).bound
    assert theory.bias_distance(run.history, "0.bias", eps_max=eps_max).bound == given
    per_step = theory.bias_distance(run.history, "0.bias", eps_max=eps_max, learning_rate=torch.full((48,), RATE)).bound
    assert per_step.value == pytest.approx(given.value)
    second = theory.bias_variance(run.history, "0.bias", learning_rate=RATE, eps=run.eps[-1])
    found = theory.bias_variance(run.history, "0.bias", eps=torch.tensor(run.eps[-1]))
    assert found.lower_lipschitz.value == pytest.approx(second.lower_lipschitz.value, rel=1e-6)
    assert (found.printed, found.variance_over_lr_sq) == (second.printed, second.variance_over_lr_sq)
    # The record is of the first layer's bias, not of any other parameter.
    assert not theory.bias_variance(run.history, "2.bias").variance_over_lr_sq.valid


def test_what_the_bound_lacks_is_what_is_named(run: Run) -> None:
    def note(windows: Any, **given: Any) -> str:
        return theory.bias_distance(windows, "0.bias", **given).bound.note

    assert note(run.history) == "needs eps_max"
    bare = [replace(one, results={"trajectory": one["trajectory"]}) for one in run.history]
    assert note(bare, eps_max=1.0, learning_rate=RATE) == "needs a Lipschitz metric in every window"
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Monitor(model, optimizer, [Trajectory(), Lipschitz()], window_steps=2) as monitor:
        for _ in range(2):
            model(torch.randn(1, 4)).square().mean().backward()
            optimizer.step()
    said = note(monitor.history, eps_max=1.0, learning_rate=RATE)
    assert said.startswith("needs the sides of Theorem 1, which a window lacks: it needs a Linear")
    other = theory.bias_distance(run.history, "2.bias", eps_max=1.0).bound.note
    assert other.startswith("needs learning_rate: that of 2.bias was not recorded in every step; '2.bias' is not")


class Rows(nn.Module):
    """A first layer that sees four rows of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x[:, :, None]).flatten(1).relu())


class Tied(nn.Module):
    """A first bias that another layer adds once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.bias = self.first.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def sgd(**settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **({"lr": 1e-2} | settings))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))


def conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 1))


def history(
    build: Callable[[], nn.Module] = mlp,
    make: Callable[[Any], torch.optim.Optimizer] | None = None,
    size: int = 1,
    schedule: float = 1.0,
    between: Callable[[nn.Module], None] = lambda model: None,
    frozen: bool = True,
    manual: bool = False,
    every: int = 1,
    blocks: int = 1,
    **settings: Any,
) -> History:
    """Three windows of eight steps."""
    torch.manual_seed(0)
    model = build().double()
    (layer, *_) = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d)))
    layer.weight.requires_grad_(not frozen)
    optimizer = (make or sgd())([p for p in model.parameters() if p.requires_grad])
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, schedule)
    metrics = [Trajectory(every_steps=every), Lipschitz(**settings)]
    with Monitor(model, None if manual else optimizer, metrics, window_steps=8, window_blocks=blocks) as monitor:
        for _ in range(24):
            optimizer.zero_grad()
            x = torch.randn(size, 4).double()
            (model(x) - 1).square().mean().backward()
            between(model)
            optimizer.step()
            if manual:
                monitor.step()
            rates.step()
    return monitor.history


def clip(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)


ASIDE: dict[str, tuple[Callable[[], History], str, str]] = {
    "lambda at every second step": (lambda: history(lambda_every=2, batch_of_one="exact"), "0.bias", "lambda_every=1"),
    "batch 2": (lambda: history(size=2), "0.bias", "16 samples and 16 with a lambda in the 8 steps"),
    "batch 2, half of the lambdas": (
        lambda: history(size=2, lambda_every=2),
        "0.bias",
        "16 samples and 8 with a lambda",
    ),
    "a convolution": (lambda: history(conv), "1.bias", "the first layer is a Conv1d"),
    "several rows": (lambda: history(Rows), "first.bias", "4 rows per sample"),
    "a shared bias": (lambda: history(Tied), "first.bias", "shared with another layer"),
    "a weight": (history, "2.weight", "'2.weight' is not the first layer's own bias, '0.bias'"),
    "another bias": (history, "2.bias", "'2.bias' is not the first layer's own bias"),
    "momentum": (lambda: history(make=sgd(momentum=0.99)), "0.bias", "SGD has momentum=0.99"),
    "nesterov": (lambda: history(make=sgd(momentum=0.5, nesterov=True)), "0.bias", "nesterov=True"),
    "weight decay": (lambda: history(make=sgd(weight_decay=0.1)), "0.bias", "SGD has weight_decay=0.1"),
    "Adam": (lambda: history(make=torch.optim.Adam), "0.bias", "torch.optim.adam.Adam, not by torch.optim.SGD"),
    "not in the optimizer": (
        lambda: history(make=lambda p: torch.optim.SGD(p[-1:], lr=1e-2)),
        "0.bias",
        "stepped by none of them",
    ),
}


@pytest.mark.parametrize("name", ASIDE)
def test_other_steps_are_not_valid_and_say_why(name: str) -> None:
    make, parameter, reason = ASIDE[name]
    windows = make()
    recorded = windows[-1]["lipschitz"].details["first_bias"]["learning_rate"]
    rate = recorded[0] if recorded else 1e-2
    second = theory.bias_variance(windows, parameter, learning_rate=rate, eps=[1.0] * 8)
    bound = theory.bias_distance(windows, parameter, learning_rate=rate, eps_max=10.0).bound
    for value in (second.lower_lipschitz, bound):
        assert not value.valid
        assert reason in value.note


def test_steps_that_only_the_motion_contradicts() -> None:
    second = theory.bias_variance(history(between=clip), "0.bias", eps=[1.0] * 8).lower_lipschitz
    assert not second.valid
    assert "the recorded motion contradicts it" in second.note
    bound = theory.bias_distance(history(), "0.bias", eps_max=1e-9).bound
    assert not bound.valid
    assert "wrong eps" in bound.note


def test_a_trajectory_that_was_not_looked_at_in_every_step() -> None:
    windows = history(every=2)
    found = theory.bias_variance(windows, "0.bias", eps=[10.0] * 4)
    for bound in (found.lower, found.lower_lipschitz):
        assert not bound.valid
        assert "looked at in 4 of 8 steps: it takes every_steps=1" in bound.note
    assert (found.variance.label, found.variance.count) == ("heuristic", 5)
    assert found.variance.note == "over the steps that were looked at only"
    with pytest.raises(
        ValueError,
        match="no path_length in the window of steps 17 to 24: with every_steps=2 single steps are not known",
    ):
        theory.bias_distance(windows, "0.bias")


def test_a_sliding_window_has_lost_its_start() -> None:
    """A large first step is in the mean of the steps and not between the points: the bound would be above."""
    torch.manual_seed(0)
    model = mlp().double()
    model[0].bias.data.fill_(5.0)  # no unit is dead
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, window_steps=6, window_blocks=2) as monitor:
        for step in range(1, 10):
            optimizer.param_groups[0]["lr"] = 1.0 if step == 4 else 0.0
            optimizer.zero_grad()
            (model(torch.ones(1, 4).double()) - 9).square().sum().backward()
            optimizer.step()
    whole = theory.bias_variance(monitor.history, "0.bias", last_step=6)
    assert (whole.lower.valid, whole.variance.count, whole.variance.note) == (True, 7, "")
    found = theory.bias_variance(monitor.history, "0.bias")
    assert found.lower.value > found.variance.value
    assert (found.first_step, found.variance.count, found.lower.valid) == (4, 6, False)
    assert "over 6 points, not the 7 between which the steps lie" in found.lower.note
    assert "start is not among its points" in found.variance.note


def jumping(jumps: set[int], window_steps: int | None, blocks: int = 1, cut: int | None = None) -> list[Any]:
    """Twelve steps of length 1, with the weights set back after these of them; the windows' lower bounds and
    variances. After `cut` steps a new Monitor goes on from the old one's state."""
    model = nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    settings: dict[str, Any] = {"window_steps": window_steps, "window_blocks": blocks}
    monitor = Monitor(model, optimizer, [Trajectory()], **settings)
    start, history = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    for step in range(1, 13):
        optimizer.zero_grad()
        model(torch.ones(1, 2).double()).sum().backward()
        optimizer.step()
        if step in jumps:
            model.load_state_dict(start)
        if step == cut:
            state = monitor.state_dict()
            history += monitor.history
            monitor.close()
            monitor = Monitor(model, optimizer, [Trajectory()], **settings)
            monitor.load_state_dict(state)
    if window_steps is None:
        monitor.close_window()
    monitor.close()
    return [theory.bias_variance(window, "bias") for window in [*history, *monitor.history]]


@pytest.mark.parametrize("cut", [None, 5])
def test_weights_that_are_set_back_between_steps(cut: int | None) -> None:
    """The steps do not lie between the variance's points, whose mean bound would be above it."""
    (found,) = jumping(set(range(1, 12)), None, cut=cut)
    assert found.lower.value > found.variance.value
    assert not found.lower.valid
    assert "changed between the window's steps by something else than a step" in found.lower.note
    assert [found.lower.valid for found in jumping({4, 6, 12}, 4, cut=cut)] == [True, False, True]
    (ends,) = jumping({12}, None, cut=cut)
    assert ends.lower.valid
    # In a sliding one until the step before it has gone; it has lost its start from the third on.
    notes = [found.lower.note for found in jumping({4}, 6, blocks=2, cut=cut)]
    assert ["changed" in note for note in notes] == [False, True, False, False]


def test_a_sliding_window_says_nothing_of_lambda() -> None:
    windows = history(blocks=2)
    assert theory.bias_variance(windows, "0.bias", last_step=8, eps=[0.1] * 8).lower_lipschitz.valid
    second = theory.bias_variance(windows, "0.bias", eps=[0.1] * 8).lower_lipschitz
    assert not second.valid
    assert "sliding" in second.note


def test_a_bias_that_is_given_to_the_optimizer_later() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=1e-2)
    with Monitor(model, optimizer, [Lipschitz()]) as monitor:
        for _ in range(2):
            model(torch.randn(1, 4)).sum().backward()
            optimizer.step()
            if not monitor.history:
                monitor.close_window()
                optimizer.add_param_group({"params": [model[0].bias], "lr": 0.5})
                monitor.step()
                monitor.close_window()  # groups are looked at when a window starts
        monitor.close_window()
    facts = [window["lipschitz"].details["first_bias"] for window in monitor.history]
    assert facts[0]["optimizer"] == "none of them"
    assert (facts[-1]["optimizer"], facts[-1]["learning_rate"]) == ("torch.optim.sgd.SGD", [0.5, 0.5])


def test_a_first_weight_that_moves_makes_them_heuristic() -> None:
    windows = history(frozen=False)
    bound = theory.bias_distance(windows, "0.bias", eps_max=10.0).bound
    assert (bound.label, bound.valid) == ("heuristic", True)
    assert "moved within the window" in bound.note
    assert theory.bias_variance(windows, "0.bias", eps=[10.0] * 8).lower_lipschitz.label == "heuristic"


def test_without_an_optimizer_object_it_is_not_checked() -> None:
    bound = theory.bias_distance(history(manual=True), "0.bias", learning_rate=1e-2, eps_max=10.0).bound
    assert bound.valid
    assert "not checked: the optimizer" in bound.note
    assert not theory.bias_distance(history(manual=True), "0.bias", eps_max=10.0).bound.valid


@pytest.mark.parametrize("keep", [[0, 2], [1, 2], [2]])
def test_every_window_from_the_start_on_is_needed(keep: list[int]) -> None:
    windows = history()
    bound = theory.bias_distance([windows[i] for i in keep], "0.bias", eps_max=10.0).bound
    assert not bound.valid
    assert "are in no window" in bound.note
    assert theory.bias_distance(list(windows)[::-1], "0.bias", eps_max=10.0).bound.valid


def moved_by_hand(change: Callable[[nn.Module, Trajectory], object], at: int) -> theory.BiasDistance:
    """Corollary 3 over two windows of eight steps, with a change after `at` steps."""
    torch.manual_seed(0)
    model = mlp().double()
    model[0].weight.requires_grad_(False)
    optimizer = sgd()([p for p in model.parameters() if p.requires_grad])
    trajectory = Trajectory()
    with Monitor(model, optimizer, [trajectory, Lipschitz()], window_steps=8) as monitor:
        for step in range(16):
            if step == at:
                change(model, trajectory)
            optimizer.zero_grad()
            (model(torch.randn(1, 4).double()) - 1).square().mean().backward()
            optimizer.step()
        state = monitor.state_dict()
    again = Trajectory()
    with Monitor(model, optimizer, [again, Lipschitz()], window_steps=8) as resumed:
        resumed.load_state_dict(state)
        details = again.compute().details
    assert details.get("distance_apart_by") == trajectory.compute().details.get("distance_apart_by")
    return theory.bias_distance(monitor.history, "0.bias", eps_max=100.0)


def shifted(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor + 7 for name, tensor in model.state_dict().items()}


ELSEWHERE: dict[str, tuple[Callable[[nn.Module, Trajectory], object], str]] = {
    "another reference": (lambda model, trajectory: trajectory.set_reference(shifted(model)), r"set_reference\(\)"),
    "weights loaded": (lambda model, trajectory: model.load_state_dict(shifted(model)), r"load_state_dict\(\)"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("at", [0, 5, 12])
def test_a_distance_that_is_not_along_the_path(name: str, at: int) -> None:
    change, reason = ELSEWHERE[name]
    found = moved_by_hand(change, at)
    assert found.distance.valid
    for value in (found.directness, found.bound):
        assert not value.valid
        assert re.search(reason, value.note)


@pytest.mark.parametrize("at", [0, 5])
def test_a_reference_on_the_path_and_weights_loaded_before_it(at: int) -> None:
    def now(model: nn.Module, trajectory: Trajectory) -> None:
        model.load_state_dict(model.state_dict())  # nothing moves
        trajectory.set_reference()

    def there(model: nn.Module, trajectory: Trajectory) -> None:
        model.load_state_dict(shifted(model))
        trajectory.set_reference(model)

    for change in (now, there):
        found = moved_by_hand(change, at)
        assert found.bound.valid
        assert found.directness.valid
        assert found.directness.value <= 1


def test_a_schedule() -> None:
    """Corollary 3 sums the rates; Corollary 2 has one."""
    windows = history(schedule=0.9)
    rates = [1e-2 * 0.9**i for i in range(24)]
    recorded = theory.bias_distance(windows, "0.bias", eps_max=10.0)
    assert recorded.bound.valid
    given = theory.bias_distance(windows, "0.bias", learning_rate=rates, eps_max=10.0)
    assert given.bound.value == pytest.approx(recorded.bound.value)
    assert recorded.length.value <= recorded.bound.value
    constant = theory.bias_distance(history(), "0.bias", eps_max=10.0)
    assert recorded.bound.value < constant.bound.value
    with pytest.raises(
        ValueError, match="Corollary 2 needs a constant one, but in the window of steps 17 to 24 it went"
    ):
        theory.bias_variance(windows, "0.bias", eps=[1.0] * 8)
    with pytest.raises(ValueError, match="learning_rate: got 0.01, but the optimizer's was 0.00478297 to 0.01"):
        theory.bias_distance(windows, "0.bias", learning_rate=1e-2, eps_max=10.0)

    unasked = theory.bias_variance(windows, "0.bias")
    assert unasked.variance.valid
    assert unasked.variance_over_lr_sq.note == "the learning rate changed within the window"


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_rates_of_0_and_rates_that_are_tensors(kind: str) -> None:
    def warm(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=torch.tensor(1e-2) if kind == "tensor" else 1e-2)

    windows = history(make=warm, schedule=0.5)
    rates = windows[0]["lipschitz"].details["first_bias"]["learning_rate"]
    assert rates == pytest.approx([1e-2 * 0.5**7, 1e-2], rel=1e-6)
    given = [0.0] * 24
    with pytest.raises(ValueError, match="learning_rate: got 0, but the optimizer's was 7.8125e-05 to 0.01"):
        theory.bias_distance(windows, "0.bias", learning_rate=given, eps_max=10.0)


def test_the_rate_survives_a_checkpoint() -> None:
    """Also where the optimizer's own load_state_dict() has made new parameter groups."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    state: dict[str, Any] = {}
    for rate in (1e-2, 5e-3):
        with Monitor(model, optimizer) as monitor:
            if state:
                monitor.load_state_dict(state)
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] = rate
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(1, 4)).square().sum().backward()
                optimizer.step()
            monitor.flush()
            state = monitor.state_dict()
    facts = monitor.compute()["lipschitz"].details["first_bias"]
    assert (facts["steps"], facts["learning_rate"]) == (8, [5e-3, 1e-2])


def test_a_window_in_which_no_step_was_looked_at_is_not_valid() -> None:
    with Monitor(mlp(), metrics=[Trajectory(every_steps=2)]) as monitor:
        monitor.step()
        monitor.close_window()
    found = theory.bias_variance(monitor.history, "0.bias", learning_rate=1.0, eps=[])
    assert math.isnan(found.lower.value)
    assert not found.lower.valid
    assert "no step observed" in found.lower.note
    assert not found.lower_lipschitz.valid


Call = Callable[[Run], Any]
BAD: dict[str, tuple[Call, str]] = {
    "eps is a number": (lambda run: theory.bias_variance(run.history, "0.bias", eps=0.5), "eps: .*12 steps, got 0.5"),
    "eps is a table": (
        lambda run: theory.bias_variance(run.history, "0.bias", eps=torch.ones(12, 2)),
        r"eps: .*12 steps, got shape \[12, 2\]",
    ),
    "eps is text": (lambda run: theory.bias_variance(run.history, "0.bias", eps="x" * 12), "eps: .*pass a sequence"),
    "rate is text": (
        lambda run: theory.bias_variance(run.history, "0.bias", learning_rate="x"),
        "learning_rate: expected a positive number, got 'x'",
    ),
    "rate is text, distance": (
        lambda run: theory.bias_distance(run.history, "0.bias", learning_rate="x", eps_max=1.0),
        "learning_rate: expected a positive number, got 'x'",
    ),
    "rate of another run": (
        lambda run: theory.bias_variance(run.history, "0.bias", learning_rate=0.5),
        "learning_rate: got 0.5, but the optimizer's was 0.01 in the window of steps 37 to 48",
    ),
    "too few rates": (
        lambda run: theory.bias_distance(run.history, "0.bias", learning_rate=[RATE] * 12, eps_max=1.0),
        "learning_rate: expected one value for each of the history's 48 steps, got 12",
    ),
    "eps_max is text": (
        lambda run: theory.bias_distance(run.history, "0.bias", eps_max="x"),
        "eps_max: expected a pos",
    ),
    "no such place": (
        lambda run: theory.bias_variance(run.history, "0.bias", eps=run.eps[-1], place="zz"),
        "place: .*'zz'.*'model:Linear'",
    ),
    "no such place, distance": (
        lambda run: theory.bias_distance(run.history, "0.bias", eps_max=1.0, place="zz"),
        "place: .*'zz'.*'model:Linear'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(run: Run, name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(run)
