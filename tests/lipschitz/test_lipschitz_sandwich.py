"""Theorem 1 and the singular values it needs; steadiness."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from models import batches, cnn, mlp, reference, seeded, train
from torch import Tensor, nn
from windows import window_of

from lipcore import Lipschitz, Monitor
from lipcore.lipschitz import singular_values as spectral
from lipcore.lipschitz.singular_values import norm_bound, singular_values


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU], ids=lambda a: a.__name__)
def test_sandwich_holds_for_random_networks(activation: Callable[[], nn.Module]) -> None:
    generator = torch.Generator().manual_seed(7)
    for seed in range(25):
        n = int(torch.randint(1, 9, (), generator=generator))
        n_1 = int(torch.randint(1, n + 1, (), generator=generator))
        depth = int(torch.randint(0, 3, (), generator=generator))
        hidden = torch.randint(1, 12, (depth,), generator=generator).tolist()
        model = seeded(lambda s=(n, n_1, *hidden, 1): mlp(*s, activation=activation), seed, torch.float64)
        result = window_of(model, torch.randn(7, n, dtype=torch.float64))
        place = next(iter(result.sandwich))
        lower, middle, upper = (result.sandwich[place][side] for side in ("lower", "middle", "upper"))
        assert lower.label == middle.label == upper.label == "exact"
        assert upper.valid
        assert lower.value <= middle.value * (1 + 1e-12)
        assert middle.value <= upper.value * (1 + 1e-12)
        sigma = torch.linalg.svdvals(model[0].weight.detach())
        average = result.local_lipschitz[place].mean.value
        assert lower.value == pytest.approx(average / float(sigma[0]), rel=1e-12)
        assert upper.value == pytest.approx(average / float(sigma[-1]), rel=1e-10)


@pytest.mark.parametrize("n_1", [2, 9, 40])
def test_sandwich_lower_side_holds_without_the_upper(n_1: int) -> None:
    for seed in range(10):
        model = seeded(lambda: mlp(3 if n_1 > 2 else 1, n_1, 6, 1), seed, torch.float64)
        result = window_of(model, torch.randn(5, model[0].in_features, dtype=torch.float64))
        sides = result.sandwich["model:Linear"]
        assert sides.lower.value <= sides.middle.value * (1 + 1e-12)
        assert not sides.upper.valid
        assert math.isnan(sides.upper.value)
        assert "more outputs than inputs" in sides.upper.note


def test_sandwich_counterexample_for_a_first_layer_wider_than_its_input() -> None:
    # f(x) = relu(x + 1) - relu(x + 1): lambda is 0 while ||grad_b f|| is sqrt 2, so the printed upper bound fails.
    model = mlp(1, 2, 1).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
    result = window_of(model, torch.ones(3, 1, dtype=torch.float64))
    sides = result.sandwich["model:Linear"]
    assert result.local_lipschitz["model:Linear"].max.value == 0.0
    assert sides.middle.value == pytest.approx(math.sqrt(2), rel=1e-15)
    assert sides.lower.value == 0.0
    assert sides.upper.valid is False


def test_sandwich_of_a_rank_deficient_first_layer_is_bounded_by_infinity() -> None:
    model = seeded(lambda: mlp(5, 3, 1), dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[2] = model[0].weight[1]
    upper = window_of(model, torch.randn(4, 5, dtype=torch.float64)).sandwich["model:Linear"].upper
    assert (upper.value, upper.valid) == (math.inf, False)
    assert "rank" in upper.note


@pytest.mark.parametrize("size", [1, 4], ids=["shortcut", "taps"])
def test_sandwich_is_heuristic_only_when_w_1_moved_within_the_window(size: int) -> None:
    model = seeded(lambda: mlp(5, 4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, metrics=[Lipschitz()]) as monitor:
        train(model, batches(3, size), optimizer)
        moved = monitor.close_window()["lipschitz"].sandwich["model:Linear"]
        model[0].weight.requires_grad_(False)
        train(model, batches(3, size), optimizer)
        fixed = monitor.close_window()["lipschitz"].sandwich["model:Linear"]
    assert moved.lower.label == moved.middle.label == moved.upper.label == "heuristic"
    assert "moved within the window" in moved.lower.note
    assert fixed.lower.label == fixed.upper.label == "exact"
    assert fixed.lower.note == ""


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 9)),
    "conv2d_strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 6)),
    "conv2d_circular": (lambda: nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), (1, 6, 6)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2), (1, 4, 4, 4)),
    "conv2d_many_inputs": (lambda: nn.Conv2d(3, 2, 3), (3, 15, 15)),
    "conv1d_many_inputs": (lambda: nn.Conv1d(2, 1, 5, padding=2, padding_mode="reflect"), (2, 300)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_largest_singular_value_of_a_convolution(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    for seed in range(3):
        layer = seeded(build, seed, torch.float64)
        inputs = math.prod(shape)
        layer.bias.detach().zero_()
        with torch.no_grad():
            matrix = layer(torch.eye(inputs, dtype=torch.float64).reshape(inputs, *shape)).reshape(inputs, -1)
        expected = float(torch.linalg.svdvals(matrix)[0])
        found = singular_values(layer, (1, *shape))
        assert found is not None
        assert found.smallest is None
        # Iteration approaches it from below; the sandwich's lower side is overstated by no more than this.
        assert found.largest == pytest.approx(expected, rel=1e-4 if "many_inputs" in name else 1e-12)
        assert found.largest <= expected * (1 + 1e-9)
        assert expected * (1 - 1e-12) <= found.upper <= expected * (1.05 if "many_inputs" in name else 1 + 1e-12)
        assert found.exact == ("many_inputs" not in name)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_bound_of_sigma_1_without_iteration(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    layer = seeded(build, 0, torch.float64)
    layer.bias.detach().zero_()
    with torch.no_grad():
        matrix = layer(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)).flatten(1)
    bound = norm_bound(layer, (1, *shape))
    assert float(torch.linalg.svdvals(matrix)[0]) <= bound * (1 + 1e-12)
    assert bound <= math.sqrt(float(matrix.abs().sum(0).max() * matrix.abs().sum(1).max())) * (1 + 1e-12) or (
        layer.padding_mode != "zeros"  # padded copies add up in absolute value
    )


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-6, 0.0])
def test_the_upper_value_holds_where_lanczos_has_not_converged(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many singular values side by side, and one of them a little larger; also with too few steps for any."""
    layer = nn.Linear(520, 520, bias=False, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(520, 520, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    values = torch.linspace(0.999, 1.0, 520, dtype=torch.float64)
    values[-1] += gap
    layer.weight.data.copy_((q * values) @ q.T)
    for steps in (100, 5, 1):
        monkeypatch.setattr(spectral, "_STEPS", steps)
        found = singular_values(layer, None)
        assert found is not None
        truth = 1.0 + gap
        assert found.largest <= truth * (1 + 1e-12)
        assert found.upper >= truth * (1 - 1e-12)
        if steps == 1:
            assert "not converged in 1 steps" in found.rule
        if steps == 100:
            assert found.upper <= truth * 1.025


def test_the_lower_side_divides_by_the_bound_of_an_iterated_sigma_1() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 169, 1)).double()
    result = window_of(model, torch.randn(3, 3, 15, 15, dtype=torch.float64))
    lower = result.sandwich["model:Linear"].lower
    sigma = result.details["singular_values"]
    assert lower.value == pytest.approx(result.local_lipschitz["model:Linear"].mean.value / sigma["upper"])
    assert (lower.label, result.sandwich["model:Linear"].middle.label) == ("one-sided", "exact")
    assert "Lanczos" in lower.note
    assert sigma["upper"] > sigma["largest"]


def test_sandwich_of_a_convolution_has_only_its_lower_side() -> None:
    model = seeded(cnn, dtype=torch.float64)
    sides = window_of(model, torch.randn(5, 1, 8, 8, dtype=torch.float64)).sandwich["model:Linear"]
    assert sides.lower.valid
    assert 0 < sides.lower.value <= sides.middle.value
    assert not sides.upper.valid
    assert "smallest singular value is not known" in sides.upper.note


@pytest.mark.parametrize("shape", [(600, 530), (530, 600)])
def test_singular_values_of_a_large_linear_layer(shape: tuple[int, int]) -> None:
    layer = seeded(lambda: nn.Linear(*shape), dtype=torch.float64)
    found = singular_values(layer, (1, shape[0]))
    assert found is not None
    assert found.smallest is None
    assert found.largest == pytest.approx(float(torch.linalg.svdvals(layer.weight.detach())[0]), rel=1e-8)


# ---- steadiness


def test_steadiness_is_the_suffix_maximum_of_r() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    largest = []
    with Monitor(model, optimizer, metrics=[Lipschitz()], window_steps=2) as monitor:
        for pair in zip(batches(12, 4)[::2], batches(12, 4)[1::2], strict=True):
            highest = 0.0
            for x, y in pair:
                highest = max(highest, float(reference_outside(model, x).max()))
                train(model, [(x, y)], optimizer)
            largest.append(highest)
    within = [window["lipschitz"].steadiness["model:Linear"].max.value for window in monitor.history]
    assert within == pytest.approx(largest, rel=1e-5)
    curve = monitor.history.steadiness("model:Linear")
    assert curve == pytest.approx([max(largest[i:]) for i in range(6)], rel=1e-5)
    assert all(a >= b for a, b in itertools.pairwise(curve))


def reference_outside(model: nn.Sequential, x: Tensor) -> Tensor:
    """The reference for a model that is being watched: of an untouched model with the same parameters."""
    twin = mlp(5, 7, 1)
    twin.load_state_dict(model.state_dict())
    return reference(twin, x)[0]
