"""local_lipschitz: the norm of the input gradient, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from first_layers import LEMMA
from models import Graph, batches, mlp, reference, relative_error, seeded, train, two_headed, with_batchnorm
from torch import nn

from lipcore import Lipschitz, Monitor, local_lipschitz


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize(
    "case", ["linear", "conv2d", "attention_after", "batchnorm_eval", "output_vector", "frozen_layer"]
)
def test_local_lipschitz_is_the_norm_of_the_input_gradient(case: str, dtype: torch.dtype, tolerance: float) -> None:
    build, shape, first = LEMMA[case]
    model = seeded(build, dtype=dtype)
    x = torch.randn(6, *shape, dtype=dtype)
    _, expected = reference(model, x, first=first)
    found = local_lipschitz(model, x)
    assert expected is not None
    assert (found.dtype, found.requires_grad) == (torch.float64, False)
    assert relative_error(found, expected) <= tolerance


def test_local_lipschitz_of_one_of_several_outputs() -> None:
    model = seeded(lambda: mlp(5, 7, 3), dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(model))(x)
    for index in (0, 2, -1):
        assert relative_error(local_lipschitz(model, x, output=index), jacobians[:, index].norm(dim=1)) <= 1e-12
    difference = local_lipschitz(model, x, output=lambda z: z[:, 0] - z[:, 1])
    assert relative_error(difference, (jacobians[:, 0] - jacobians[:, 1]).norm(dim=1)) <= 1e-12
    spectral = local_lipschitz(model, x, quantity="jacobian")
    assert relative_error(spectral, torch.linalg.svdvals(jacobians)[:, 0]) <= 1e-12


def test_local_lipschitz_leaves_model_and_input_alone() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    x = torch.randn(4, 5, requires_grad=True)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    kept, x_grad = x.detach().clone(), x.grad.clone()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            local_lipschitz(model, x)
            assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(x, kept)
    assert torch.equal(x.grad, x_grad)


@pytest.mark.parametrize("quantity", ["scalar", "jacobian"])
def test_local_lipschitz_of_no_samples(quantity: str) -> None:
    found = local_lipschitz(seeded(lambda: mlp(5, 7, 1)), torch.zeros(0, 5), quantity=quantity)
    assert (found.shape, found.dtype) == ((0,), torch.float64)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "taps"])
def test_local_lipschitz_is_not_recorded_by_a_monitor(size: int, shortcut: bool) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, metrics=[Lipschitz(batch_of_one="fast" if shortcut else "exact")]) as monitor:
        for batch in batches(3, size):
            train(model, [batch], optimizer)
            local_lipschitz(model, torch.randn(6, 5))
        result = monitor.compute()["lipschitz"]
    assert result.local_lipschitz["model:Linear"].mean.count == 3 * size
    assert result.details["unrecorded_forwards"] == 0


def constant() -> nn.Module:
    return Graph(lambda m, x: m.a(torch.ones(len(x), 5)), a=nn.Linear(5, 1))


def detached() -> nn.Module:
    return Graph(lambda m, x: m.a(x).detach(), a=nn.Linear(5, 1))


LOCAL_ERRORS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], str]] = {
    "x_list": (lambda: mlp(5, 1), [1.0], {}, TypeError, "x: expected a tensor, got list"),
    "x_integers": (
        lambda: mlp(5, 1),
        torch.ones(2, 5, dtype=torch.long),
        {},
        TypeError,
        "x: expected a floating tensor",
    ),
    "x_scalar": (lambda: mlp(5, 1), torch.tensor(1.0), {}, ValueError, r"x: expected shape \[B, \.\.\.\]"),
    "vector_output": (lambda: mlp(5, 3), torch.ones(2, 5), {}, ValueError, r"output: .*shape \[2, 3\].*jacobian"),
    "index_too_large": (lambda: mlp(5, 3), torch.ones(2, 5), {"output": 3}, ValueError, "output: index 3 does not fit"),
    "index_into_one_dimension": (
        lambda: nn.Sequential(mlp(5, 1), nn.Flatten(0)),
        torch.ones(2, 5),
        {"output": 0},
        ValueError,
        r"output: index 0 does not fit the model's output of shape \[2\]",
    ),
    "callable_reduces_everything": (
        lambda: mlp(5, 3),
        torch.ones(2, 5),
        {"output": lambda z: z.sum()},
        ValueError,
        r"output: .*shape \[\] for 2 samples",
    ),
    "dict_output": (two_headed, torch.ones(2, 5), {}, ValueError, "output: the model returns a dict"),
    "no choice": (
        lambda: mlp(5, 1),
        torch.ones(2, 5),
        {"output": 0.5},
        TypeError,
        "output: expected None, an index, a key or a callable, got 0.5; pass the index of a column .* the model up to",
    ),
    "true": (lambda: mlp(5, 1), torch.ones(2, 5), {"output": True}, TypeError, "output: expected None, .* got True"),
    "quantity": (lambda: mlp(5, 1), torch.ones(2, 5), {"quantity": "norm"}, ValueError, "quantity: expected 'scalar'"),
    "jacobian_of_a_dict": (two_headed, torch.ones(2, 5), {"quantity": "jacobian"}, ValueError, "quantity: 'jacobian'"),
    "batchnorm": (
        with_batchnorm,
        torch.ones(2, 5),
        {},
        ValueError,
        r"model: module '1' is a BatchNorm1d in train mode",
    ),
    "constant": (constant, torch.ones(2, 5), {}, ValueError, "model: its output does not depend on x"),
    "detached": (detached, torch.ones(2, 5), {}, ValueError, "model: its output does not depend on x"),
}


@pytest.mark.parametrize("name", LOCAL_ERRORS)
def test_local_lipschitz_names_what_is_wrong(name: str) -> None:
    build, x, settings, error, message = LOCAL_ERRORS[name]
    with pytest.raises(error, match=message):
        local_lipschitz(seeded(build), x, **settings)
