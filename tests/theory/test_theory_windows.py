"""Which windows a statement is about: order, overlap, gaps, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from theory_runs import SIZE, Run
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, local_lipschitz, theory
from lipcore.metric.results import Window
from lipcore.theory.training import joined


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def sliding(blocks: int, steps: int = 20) -> tuple[list[Window], list[float]]:
    """Windows of six steps at batch 1, and r of every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    r = []
    with Monitor(model, optimizer, [Lipschitz()], window_steps=6, window_blocks=blocks) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.randn(1, 3).double()
            u = model[0](x).detach().requires_grad_()
            r.append(float(torch.autograd.grad(model[1:](u).sum(), u)[0].norm()))
            (model(x) - 1).square().sum().backward()
            optimizer.step()
    return list(monitor.history), r


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_every_step_counts_once(blocks: int) -> None:
    windows, r = sliding(blocks)
    found = theory.sandwich(windows)
    seen = r[: found.last_step]
    assert (found.first_step, found.length.count) == (1, len(seen))
    assert found.length.value == pytest.approx(sum(seen), rel=1e-6)
    assert found.middle.value == pytest.approx(np.mean(seen), rel=1e-6)
    curve = theory.steadiness(windows)
    assert curve.phi == pytest.approx([max(seen[tau - 1 :]) for tau in curve.steps], rel=1e-6)
    assert theory.lipschitz_bound(windows).phi.valid


def test_the_order_of_the_list_does_not_matter(run: Run) -> None:
    windows = list(run.history)
    mixed = [windows[i] for i in (2, 0, 3, 1)]
    for statement in (theory.sandwich, theory.steadiness, theory.lipschitz_bound):
        assert repr(statement(mixed)) == repr(statement(windows))
    assert theory.bias_variance(mixed, "0.bias").last_step == 4 * SIZE


def test_gaps_are_reported(run: Run) -> None:
    windows = [run.history[0], run.history[3]]
    gap = "steps 13 to 36 are in no window"
    assert gap in theory.sandwich(windows).length.note
    assert gap in theory.sandwich(windows).lower.note
    curve = theory.steadiness(windows)
    assert curve.note == gap
    assert gap in repr(curve)
    assert math.isnan(curve.at(20))
    bound = theory.lipschitz_bound(windows)
    for value in (bound.phi, bound.bound):
        assert not value.valid
        assert gap in value.note


def test_phi_within_a_window_is_never_below_the_truth(run: Run) -> None:
    curve = theory.steadiness(run.history)
    r = np.concatenate(run.r)
    for tau in range(1, 4 * SIZE + 1):
        truth = r[tau - 1 :].max()
        assert curve.at(tau) >= truth * (1 - 1e-6)
        if tau in curve.steps:
            assert curve.at(tau) == pytest.approx(truth, rel=1e-6)
    assert curve.at(0) == curve.at(1)
    assert math.isnan(curve.at(4 * SIZE + 1))
    text = repr(curve)
    assert f"{curve.phi[0]:.6g}" in text
    assert f"{curve.phi[-1]:.6g}" in text
    assert "4, exact" in text


# ---- numbers that are not finite


def diverged(order: int = 1) -> list[Window]:
    """A run whose second window ends with a first layer that is NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        for i in range(3):
            model(torch.randn(5, 3)).square().mean().backward()
            monitor.step()
            if i == 1:
                before = model[0].weight.detach().clone()
                model[0].weight.data.fill_(math.nan)
            monitor.close_window()
            if i == 1:
                model[0].weight.data.copy_(before)
    return list(monitor.history)[::order]


@pytest.mark.parametrize("order", [1, -1])
def test_a_diverged_window_is_not_passed_over(order: int) -> None:
    found = theory.lipschitz_bound(diverged(order))
    for value in (found.beta, found.bound):
        assert math.isnan(value.value)
        assert not value.valid
        assert "W_1 is not finite at the end of the window of steps 2 to 2" in value.note
    lower = theory.sandwich(diverged(order)).lower
    assert (math.isnan(lower.value), lower.valid) == (True, False)
    assert "W_1 is not finite" in lower.note


@pytest.mark.parametrize("what", ["x", "model"])
def test_the_truth_at_values_that_are_not_finite_is_not_known(run: Run, what: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    x = run.x.clone()
    if what == "x":
        x[3, 0] = math.nan
    else:
        model[0].weight.data[0, 0] = math.nan
    found = theory.lipschitz_bound(run.history, model, x).largest
    assert (math.isnan(found.value), found.valid) == (True, False)
    assert f"{what} holds values that are not finite" in found.note


def test_a_truth_above_the_bound_is_said_to_be(run: Run) -> None:
    """The model has changed since its windows were taken."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()
    model[1].weight.data.mul_(1e6)
    found = theory.lipschitz_bound(run.history, model, run.x)
    assert found.largest.value == pytest.approx(float(local_lipschitz(model, run.x).max()))
    assert found.largest.value > found.bound.value
    assert "above the bound: no recorded sample was at these weights and inputs" in found.largest.note


def test_a_truth_above_a_bound_that_is_none_is_not_said_to_be_elsewhere(run: Run) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()
    model[1].weight.data.mul_(1e6)
    gap = theory.lipschitz_bound([run.history[0], run.history[3]], model, run.x)
    assert "above the bound: that is not valid" in gap.largest.note
    moved = theory.lipschitz_bound(Run(frozen=False).history, model, run.x)
    assert moved.beta.label == "heuristic"
    assert "W_1 moved within a window" in moved.beta.note
    assert "above the bound: that is heuristic" in moved.largest.note


class Skip(nn.Module):
    """The input goes past the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 2), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x).relu(), 100 * x], dim=1))


def test_there_is_no_bound_past_which_the_input_goes() -> None:
    model, x = Skip(), torch.randn(5, 3)
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        model(x).square().mean().backward()
        monitor.step()
        monitor.close_window()
    found = theory.lipschitz_bound(monitor.history, model, x)
    assert not found.bound.valid
    assert not found.beta.valid
    assert "not W_1 x + b_1 of 'first' alone" in found.bound.note
    assert found.largest.value > 0
    sides = theory.sandwich(monitor.history)
    assert not sides.lower.valid
    assert not sides.upper.valid


def head_of(output: str | None) -> tuple[nn.Sequential, Tensor, list[Window]]:
    """A window of a network with a sigmoid head, of its probability or of an inner module's output."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid()), torch.randn(20, 4)
    with Monitor(model, metrics=[Lipschitz(output=output)]) as monitor:
        nn.functional.binary_cross_entropy(model(x), torch.ones(20, 1)).backward()
        monitor.step()
        monitor.close_window()
    return model, x, list(monitor.history)


@pytest.mark.parametrize(
    ("output", "layers", "reason"),
    [
        ("2", 4, "of '2:Linear', but the model ends in a Sigmoid"),
        (None, 3, "of 'model:Sigmoid', but the model ends in a Linear"),
        (None, 4, ""),
        ("2", 3, ""),
        ("3", 4, ""),
    ],
)
def test_numbers_of_another_output_are_not_compared(output: str | None, layers: int, reason: str) -> None:
    model, x, windows = head_of(output)
    found = theory.lipschitz_bound(windows, model[:layers], x)
    for value in (found.largest, found.spectral_product):
        assert value.valid == (not reason)
        assert reason in value.note
    assert found.bound.valid
    assert ("not comparable" in found.largest.note) == bool(reason)
    chosen = theory.lipschitz_bound(windows, model[:layers], x, output=lambda y: y)
    assert chosen.largest.valid  # of what a function makes of the output, nothing is known


def test_numbers_of_an_inner_layer_of_the_same_kind_are_not_compared() -> None:
    model, x, windows = head_of("2")
    longer = nn.Sequential(*model[:3], nn.Linear(1, 1))
    assert "goes on behind that module" in theory.lipschitz_bound(windows, longer, x).largest.note


@pytest.mark.parametrize("order", [(0, 3, 0, 3, 0), (3, 0, 3, 0)])
def test_a_window_without_a_sample_is_passed_over(order: tuple[int, ...]) -> None:
    """Be it the first, one between or the last; its steps are still known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with Monitor(model) as monitor:
        for samples in order:
            if samples:
                model(torch.randn(samples, 3)).square().mean().backward()
                monitor.step()
            for _ in range(0 if samples else 1):
                monitor.step()
            monitor.close_window()
    full = [window for window, samples in zip(monitor.history, order, strict=True) if samples]
    everything = theory.sandwich(monitor.history)
    assert everything.length.count == 6
    for side in ("lower", "middle", "upper"):
        assert getattr(everything, side).value == getattr(theory.sandwich(full), side).value
    bound = theory.lipschitz_bound(monitor.history)
    assert (bound.bound.value, bound.bound.valid) == (theory.lipschitz_bound(full).bound.value, True)
    assert theory.bias_variance(monitor.history, "0.bias").last_step == monitor.history[-1].last_step
    assert len(theory.steadiness(monitor.history).steps) == len(order)
    without = monitor.history[order.index(0)]
    steps = f"{without.first_step} to {without.last_step}"
    message = f"history: lipschitz has no sandwich in the window of steps {steps}: it needs"
    with pytest.raises(ValueError, match=message):
        theory.sandwich(without)


def test_a_window_without_a_sample_has_no_curve() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        model(torch.randn(5, 3)).square().mean().backward()
        monitor.step()
        monitor.close_window()
        monitor.step()
        monitor.close_window()
    curve = theory.steadiness(monitor.history[1])
    assert math.isnan(curve.phi[0])
    with pytest.raises(ValueError, match="has no sandwich.*recorded samples"):
        theory.sandwich(monitor.history[1])


def test_infinite_and_skipped_samples_are_said_to_be() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        for scale in (0.0, 1.0):
            (scale * model(torch.randn(5, 3).double())).sum().backward()
            monitor.step()
        monitor.close_window()
        with torch.no_grad():
            model[0].bias.fill_(10.0)
            model[2].weight.fill_(1e308)
        model(torch.randn(5, 3).double()).sum().backward()
        monitor.step()
        monitor.close_window()
    skipped = theory.lipschitz_bound(monitor.history[0]).phi
    assert (skipped.valid, skipped.note) == (True, "5 samples skipped, whose loss gradient was 0 or not finite")
    assert "r was infinite at 5 samples" in theory.steadiness(monitor.history).note
    with pytest.raises(ValueError, match="no singular values"):
        theory.lipschitz_bound(monitor.history)


def test_notes_of_many_windows_stay_short() -> None:
    assert joined(str(i) for i in range(100)) == "0; 1; 2; 3; 4; 5; and 94 more"
    assert joined(["a", "", "a", "b"]) == "a; b"


# ---- what is refused

BAD: dict[str, tuple[Callable[[Run], Any], type[Exception], str]] = {
    "a monitor": (
        lambda run: theory.sandwich(Monitor(nn.Linear(2, 1))),  # type: ignore[arg-type]
        TypeError,
        r"history: .*got a Monitor; pass its history: monitor.history",
    ),
    "nothing": (lambda run: theory.steadiness(None), TypeError, "history: .*got None"),  # type: ignore[arg-type]
    "a number": (lambda run: theory.sandwich(5), TypeError, "history: .*got a int"),  # type: ignore[arg-type]
    "twice": (
        lambda run: theory.sandwich([*run.history, run.history[1]]),
        ValueError,
        "history: the window of steps 13 to 24 stands in it twice",
    ),
    "two runs": (lambda run: theory.steadiness([*run.history, *Run().history]), ValueError, "steps 1 to 12 .* twice"),
    "a step that is text": (
        lambda run: theory.sandwich(run.history, first_step="a"),  # type: ignore[arg-type]
        ValueError,
        "first_step: expected a step .*got 'a'",
    ),
    "a step that is a fraction": (
        lambda run: theory.lipschitz_bound(run.history, last_step=1.5),  # type: ignore[arg-type]
        ValueError,
        "last_step: expected a step .*got 1.5",
    ),
    "step 0": (
        lambda run: theory.sandwich(run.history, first_step=0, last_step=3),
        ValueError,
        "no window lies within steps 0 to 3",
    ),
    "a place that is none": (
        lambda run: theory.bias_variance(run.history, "0.bias", place="zz"),
        ValueError,
        "place: .*'zz'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_other_histories_are_refused_in_words(run: Run, name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(run)
