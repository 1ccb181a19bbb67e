"""Models that are edited while they are watched: found at the next forward pass, and by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from per_sample_models import made, sum_loss
from per_sample_oracle import assert_norms, norms_sq, samples_of
from torch import nn
from torch.nn.utils import parametrize

from lipcore import PerSampleGradNorms

SIZES = pytest.mark.parametrize("size", [1, 3], ids=["served", "tapped"])


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))


def replace(model: nn.Sequential) -> None:
    model[2] = nn.Linear(4, 4)


def append(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2))


def remove(model: nn.Sequential) -> None:
    del model[3]


def tie(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight


def parametrized(model: nn.Sequential) -> None:
    parametrize.register_parametrization(model[2], "weight", nn.Tanh())


def step(model: nn.Module, size: int, seed: int) -> torch.Tensor:
    model.zero_grad()
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    sum_loss(model(x)).backward()
    return x


def assert_step(model: nn.Module, metric: PerSampleGradNorms, size: int, seed: int) -> None:
    x = step(model, size, seed)
    assert_norms(metric, norms_sq(model, samples_of((x,), size), sum_loss))


@SIZES
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (replace, r"'2\.\w+' was replaced .*rebind"),
        (append, r"'4\.\w+' was added .*rebind"),
        (remove, r"'3\.\w+' .*rebind"),
        (tie, r"'2\.weight' was tied to '0\.weight' .*rebind"),
        (parametrized, r"'2\.weight' is not there any more .*rebind"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_structure_is_an_error(edit: Callable[[nn.Sequential], None], words: str, size: int) -> None:
    model = made(chain)
    metric = PerSampleGradNorms(model, loss_reduction="sum")
    for seed in range(6):
        step(model, size, seed)
    edit(model)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=words), metric:
        step(model, size, 7)


@SIZES
def test_a_weight_that_is_untied_is_an_error(size: int) -> None:
    model = made(chain)
    tie(model)
    metric = PerSampleGradNorms(model, loss_reduction="sum")
    for seed in range(6):
        step(model, size, seed)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"'2\.weight' was untied"), metric:
        step(model, size, 7)


@SIZES
def test_new_objects_in_the_same_places_and_other_activations_are_none(size: int) -> None:
    model = made(chain)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for seed in range(6):
            step(model, size, seed)
        model[1] = nn.Sigmoid()
        model[0].bias = nn.Parameter(torch.ones(4))
        for seed in range(8):
            assert_step(model, metric, size, seed)
            assert metric.broken == ""


@SIZES
def test_after_rebind_the_new_structure_is_measured(size: int) -> None:
    model = made(chain)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for seed in range(6):
            step(model, size, seed)
        replace(model)
        assert metric._engine is not None
        metric._engine.rebind()
        for seed in range(8):
            assert_step(model, metric, size, seed)
