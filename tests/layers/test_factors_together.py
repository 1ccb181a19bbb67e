"""norms_sq_of: parameters that read one gradient get their norms in one pass, and the same ones."""

from __future__ import annotations

import pytest
import torch
from cases import values

from lipcore import functional, layers
from lipcore.layers import ChannelSum, Factor, Outer, RowSum, norms_sq_of


def of(seed: int, *shape: int) -> torch.Tensor:
    return values(shape, torch.float32, seed)


GRAD, X, ROWS, OFFSETS = of(1, 3, 4, 5), of(2, 3, 4, 5), of(4, 3, 1, 5), torch.tensor([0, 2, 2, 7])
PACKED = of(3, 7, 5)

TOGETHER = {
    "scale and shift": ({"weight": RowSum(GRAD, X), "bias": RowSum(GRAD)}, "affine_norms_sq"),
    "shift and scale": ({"bias": RowSum(GRAD), "weight": RowSum(GRAD, X)}, "affine_norms_sq"),
    "packed": ({"weight": RowSum(PACKED, PACKED, OFFSETS), "bias": RowSum(PACKED, None, OFFSETS)}, "affine_norms_sq"),
    "channels": ({"weight": ChannelSum(GRAD, X), "bias": ChannelSum(GRAD)}, "channel_affine_norms_sq"),
    "linear": ({"weight": Outer(of(5, 3, 1, 9), ROWS), "bias": RowSum(ROWS)}, "outer_and_bias_norms_sq"),
}
APART = {
    "linear with a sequence": {"weight": Outer(X, GRAD), "bias": RowSum(GRAD)},
    "another gradient": {"weight": RowSum(GRAD, X), "bias": RowSum(X)},
    "equal gradients that are not the same": {"weight": RowSum(GRAD, X), "bias": RowSum(GRAD.clone())},
    "other documents": {"weight": RowSum(PACKED, PACKED, OFFSETS), "bias": RowSum(PACKED, None, torch.tensor([0, 7]))},
    "two scales": {"a": RowSum(GRAD, X), "b": RowSum(GRAD, GRAD)},
    "rows and channels": {"weight": RowSum(GRAD, X), "bias": ChannelSum(GRAD)},
    "one": {"weight": RowSum(GRAD, X)},
    "none": {},
}


def check(factors: dict[str, Factor]) -> None:
    found = norms_sq_of(factors)
    assert list(found) == list(factors)
    for name, factor in factors.items():
        torch.testing.assert_close(found[name], factor.norms_sq(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", TOGETHER)
def test_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factors, function = TOGETHER[name]
    check(factors)
    original, calls = getattr(functional, function), []
    monkeypatch.setattr(functional, function, lambda *a, **k: (calls.append(function), original(*a, **k))[1])
    for kind in {type(factor) for factor in factors.values()}:
        monkeypatch.delattr(kind, "norms_sq")
    norms_sq_of(factors)
    assert calls == [function]


@pytest.mark.parametrize("name", APART)
def test_nothing_to_share(name: str) -> None:
    check(APART[name])


def test_a_shift_is_shared_once() -> None:
    check({"a": RowSum(GRAD, X), "b": RowSum(GRAD), "c": RowSum(GRAD, GRAD), "d": RowSum(GRAD)})


def test_a_factor_of_ones_own_keeps_its_norms() -> None:
    class Doubled(RowSum):
        def norms_sq(self) -> torch.Tensor:
            return 2 * super().norms_sq()

    factors = {"weight": RowSum(GRAD, X), "bias": Doubled(GRAD)}
    check(factors)
    check({"weight": Doubled(GRAD, X), "bias": RowSum(GRAD)})


@pytest.mark.parametrize(
    "module", [torch.nn.Linear(5, 3), torch.nn.LayerNorm(5), torch.nn.GroupNorm(1, 5)], ids=lambda m: type(m).__name__
)
def test_rules_share_the_gradient(module: torch.nn.Module) -> None:
    rule = layers.rule_for(module)
    x = of(6, 3, 5)
    saved, extra = rule.save(module, (x,), {}, layers.Batch(3))
    factors = rule.factors(module, torch.ones_like(module(x)), extra, *saved)
    assert factors["weight"].norms_sq_with(factors["bias"]) is not None
    check(factors)
