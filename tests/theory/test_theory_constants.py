"""Products of spectral norms, and the Lipschitz constants of single layers against their Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lipcore import local_lipschitz, theory
from lipcore.theory.layer_constants import layer_constant


def test_spectral_norm_product_bounds_every_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.LeakyReLU(),
        nn.MaxPool2d(3, 2),
        nn.Sequential(nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(3, 4), nn.GELU()),
        nn.Linear(4, 1),
        nn.Sigmoid(),
    ).eval()
    x = torch.randn(50, 1, 6, 6)
    product = theory.spectral_norm_product(model, x)
    assert (product.label, product.valid, product.note) == ("one-sided", True, "")
    assert product.value >= float(local_lipschitz(model, x).max())


def test_iterated_norms_are_said_to_be() -> None:
    product = theory.spectral_norm_product(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), torch.ones(1, 3, 15, 15))
    assert "module 0: Lanczos" in product.note


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "orthogonal"])
def test_parametrized_layers_are_measured_as_they_run(kind: str, train: bool) -> None:
    torch.manual_seed(0)
    layer, after = getattr(parametrizations, kind)(nn.Linear(3, 6)), nn.Linear(6, 1)
    model = nn.Sequential(layer, nn.Tanh(), after).train(train)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = theory.spectral_norm_product(model, torch.ones(1, 3)).value
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    weight = (model(torch.eye(3)), layer.weight)[1]  # that of the next pass
    if kind == "spectral_norm" and train:
        model.load_state_dict(state)
        with parametrize.cached():
            model(torch.eye(3))
            weight = layer.weight
    norms = [torch.linalg.matrix_norm(w.detach().double(), 2) for w in (weight, after.weight)]
    assert found == pytest.approx(float(norms[0] * norms[1]), rel=1e-6)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "unknown": (nn.LayerNorm(2), "module 1 of the chain, LayerNorm, has no known"),
    "mixing": (nn.BatchNorm1d(2), "module 1 of the chain, BatchNorm1d.*eval"),
    "a jump": (nn.Hardshrink(), "Hardshrink"),
    "softplus with a jump": (nn.Softplus(threshold=1.0), r"Softplus\(beta=1.0, threshold=1.0\)"),
    "celu that explodes": (nn.CELU(-1.0), r"CELU\(alpha=-1.0\)"),
    "random slopes": (nn.RReLU(), "RReLU"),
    "dropout that drops": (nn.Dropout(), "Dropout"),
    "two outputs": (nn.MaxPool1d(2, return_indices=True), "MaxPool1d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_without_a_constant_are_refused_by_name(name: str) -> None:
    module, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        theory.spectral_norm_product(nn.Sequential(nn.Linear(2, 2), module), torch.ones(1, 2))


def test_other_wiring_is_refused() -> None:
    class Skip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="a Skip is not a chain"):
        theory.spectral_norm_product(Skip(), torch.ones(1, 2))


ACTIVATIONS: list[nn.Module] = [
    *(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 3.0), nn.Tanh(), nn.Tanhshrink(), nn.Softshrink(0.7), nn.Softsign()),
    *(nn.Sigmoid(), nn.LogSigmoid(), nn.Hardsigmoid(), nn.SELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Identity()),
    *(nn.GELU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(), nn.LeakyReLU(-3.0), nn.PReLU(init=-2.5), nn.RReLU(2, 3)),
    *(nn.ELU(), nn.ELU(2.0), nn.ELU(-3.0), nn.CELU(0.3), nn.CELU(3.0), nn.Softplus(), nn.Softplus(0.5), nn.Softplus(5)),
]


@pytest.mark.parametrize("module", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_no_slope_is_above_an_activations_constant(module: nn.Module, dtype: torch.dtype) -> None:
    """And the constant is within 1e-4 of the largest, so that it is no guess."""
    module = module.to(dtype).eval()
    x = torch.cat([torch.linspace(-20, 20, 200_001), torch.tensor([-1e-6, 1e-6, 2.99999, 2.5414])]).to(dtype)
    x.requires_grad_()
    (slopes,) = torch.autograd.grad(module(x).sum(), x)
    found = layer_constant(module, x[None].detach())
    assert found is not None
    rounding = 2e-6 if dtype == torch.float32 else 1e-12
    assert float(slopes.abs().max()) <= found[0] * (1 + rounding)
    assert found[0] <= float(slopes.abs().max()) * (1 + 1e-4) + 1e-4


def jacobian_norm(module: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda p: module(p).flatten(), x).reshape(-1, x.numel())
    return float(torch.linalg.matrix_norm(jacobian, ord=2))


POOLS: list[tuple[nn.Module, tuple[int, ...]]] = [
    *((nn.MaxPool1d(k, s), (n,)) for k, s, n in ((2, 2, 6), (3, 2, 7), (3, 1, 5))),
    *((nn.MaxPool1d(k, s, dilation=d), (n,)) for k, s, d, n in ((3, 2, 2, 13), (2, 2, 4, 12), (3, 3, 2, 11))),
    (nn.MaxPool2d((3, 2), (2, 2), dilation=(2, 2), ceil_mode=True), (7, 6)),
    *((nn.AvgPool1d(k, s), (n,)) for k, s, n in ((2, 2, 6), (3, 1, 5), (3, 2, 7))),
    (nn.AvgPool1d(3, 1, padding=1, count_include_pad=False), (5,)),
    (nn.AvgPool1d(3, 2, ceil_mode=True), (6,)),
    (nn.AvgPool2d(2, divisor_override=1), (4, 4)),
    (nn.AvgPool2d(2, divisor_override=-3), (4, 4)),
    (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False), (6, 5)),
    (nn.AvgPool3d(2, 1), (3, 3, 3)),
    (nn.AdaptiveAvgPool2d((2, 3)), (5, 4)),
]


@pytest.mark.parametrize(("pool", "shape"), POOLS, ids=[str(pool) for pool, _ in POOLS])
def test_pooling_constants_hold(pool: nn.Module, shape: tuple[int, ...]) -> None:
    found = layer_constant(pool, torch.ones(1, 1, *shape))
    assert found is not None
    # Peaks of several widths, since random inputs seldom make one element the maximum of all its windows.
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(1, 1, *shape, generator=generator) for _ in range(10)]
    points += list(10 * torch.eye(math.prod(shape)).reshape(-1, 1, 1, *shape))
    assert max(jacobian_norm(pool, x) for x in points) <= found[0] * (1 + 1e-6)


def test_a_weight_that_is_not_finite_is_not_valid() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU(), nn.Linear(2, 1))
    for parameter in model.parameters():
        before = parameter.detach().clone()
        parameter.data.fill_(math.nan)
        if parameter.dim() > 1 or parameter is model[1].weight:
            found = theory.spectral_norm_product(model, torch.ones(1, 2))
            assert (math.isfinite(found.value), found.valid) == (False, False)
            assert "is not finite" in found.note
        parameter.data.copy_(before)
