"""What counts as a chain: types say what modules do, unless a hook may change it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from models import Wrapper, mlp, mse, seeded
from torch import nn
from torch.nn.utils import prune

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, local_lipschitz, theory
from lipcore.models.chains import altered_modules, modules_in_order
from lipcore.regions import Coverage


def skip(module: nn.Module, arguments: Any, output: Any) -> Any:
    return output + 3 * arguments[0]


@contextmanager
def everywhere(model: nn.Module) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def done(change: Any) -> Iterator[None]:
    yield


ALTERED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "output": (lambda m: done(m[3].register_forward_hook(skip)), r"module '3' has a hook .*\(skip\)"),
    "input": (lambda m: done(m[2].register_forward_pre_hook(lambda _, x: 2 * x[0])), "module '2'"),
    "of the model": (lambda m: done(m.register_forward_hook(lambda *a: a[2] * 2)), "the model has a hook"),
    "of all modules": (everywhere, "every module has a hook"),
    "another forward": (lambda m: done(setattr(m[1], "forward", torch.tanh)), r"module '1' .*\(tanh\)"),
    "weight norm": (lambda m: done(nn.utils.weight_norm(m[0])), r"module '0' .*\(WeightNorm\)"),
    "spectral norm": (lambda m: done(nn.utils.spectral_norm(m[0])), r"module '0' .*\(SpectralNorm\)"),
    "pruning": (lambda m: done(prune.l1_unstructured(m[2], "weight", 0.3)), r"module '2' .*\(L1Unstructured\)"),
}


@pytest.mark.parametrize("name", ALTERED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_hook_that_may_change_something_makes_it_no_chain(name: str) -> None:
    change, message = ALTERED[name]
    model, x = seeded(lambda: mlp(3, 3, 3, 1), dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    assert modules_in_order(model) == list(model)
    with change(model):
        assert modules_in_order(model) is None
        with pytest.raises(ValueError, match=message):
            theory.spectral_norm_product(model, x)
        if name != "another forward":
            assert "multi-affine" in repr(Coverage(model, x))
    assert name != "of all modules" or modules_in_order(model) == list(model)


def test_bounds_hold_behind_a_hook() -> None:
    pytest.importorskip("scipy")
    for seed in range(20):
        model = seeded(lambda: mlp(3, 3, 3, 1), seed=seed, dtype=torch.float64)
        model[3].register_forward_hook(skip)
        x, queries = torch.randn(80, 3, dtype=torch.float64), 2 * torch.randn(100, 3, dtype=torch.float64)
        found, truth = Coverage(model, x).query(queries), local_lipschitz(model, queries).numpy()
        for bound in (found.bound, found.relaxed, found.nearest):
            assert (np.isnan(bound) | (bound >= truth * (1 - 1e-6) - 1e-9)).all()


METRICS: dict[str, Callable[[], Any]] = {
    "lipschitz": Lipschitz,
    "taps": lambda: Lipschitz(batch_of_one="exact"),
    "per sample": lambda: PerSampleGradNorms(loss_reduction="mean"),
}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", METRICS)
def test_the_hooks_of_metrics_change_nothing(name: str, size: int) -> None:
    model = seeded(lambda: mlp(3, 5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hooks = 0
    with Monitor(model, optimizer, metrics=[METRICS[name]()]):
        for _ in range(30):
            optimizer.zero_grad()
            mse(model(torch.randn(size, 3)), torch.ones(size, 1)).backward()
            optimizer.step()
            hooks += sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
            assert altered_modules(model) == {}
            assert modules_in_order(model) == list(model)
        assert modules_in_order(copy.deepcopy(model)) is not None
    assert hooks


def test_a_wrappers_hook_counts_too() -> None:
    model = Wrapper(mlp(3, 4, 1))
    assert modules_in_order(model) == list(model.module)
    model.register_forward_hook(skip)
    assert modules_in_order(model) is None
    assert list(altered_modules(model)) == ["the model's wrapper"]
