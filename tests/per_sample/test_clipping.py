"""Clip factors: what they bound, and what a norm that is not known does."""

from __future__ import annotations

import math

import pytest
import torch

from lipcore.per_sample.clipping import automatic_clip_factors, clip_factors

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 129])
def test_against_one_sample_at_a_time(size, dtype):
    norms = torch.rand(2 * size, generator=torch.manual_seed(0)).mul(4).to(dtype)[::2]
    factors = clip_factors(norms, 1.5)
    assert factors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert factors.tolist() == pytest.approx([min(1.0, 1.5 / n) if n else 1.0 for n in norms.tolist()], rel=1e-6)
    automatic = automatic_clip_factors(norms, 1.5, gamma=0.25)
    assert automatic.tolist() == pytest.approx([1.5 / (n + 0.25) for n in norms.tolist()], rel=1e-6)


def test_clipped_gradients_are_what_the_factors_say():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()

    def losses():
        return (model(x) - y).square().sum(1)

    def grad(i):
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses()[i], model.parameters())])

    grads = [grad(i) for i in range(8)]
    norms = torch.stack(grads).norm(dim=1)
    factors = clip_factors(norms, 3.0)
    assert 0 < (factors < 1).sum() < 8
    clipped = [g * min(1, 3.0 / g.norm()) for g in grads]
    (factors * losses()).sum().backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, torch.stack(clipped).sum(0))
    assert (norms * factors).max() <= 3.0 * (1 + 1e-15)


def test_special_norms():
    factors = clip_factors(torch.tensor([0.0, -0.0, 1e-300, 1.0, INF, NAN, -1.0], dtype=torch.float64), 1.0)
    assert factors[:5].tolist() == [1, 1, 1, 1, 0]
    assert factors[5:].isnan().all()
    assert clip_factors(torch.tensor([0.0, 5.0, INF]), INF).tolist() == [1, 1, 1]
    assert clip_factors(torch.tensor([0.0, 5.0]), 1.0, eps=1e-6)[0] == 1
    assert automatic_clip_factors(torch.tensor([0.0, INF])).tolist() == pytest.approx([100, 0])
    assert automatic_clip_factors(torch.tensor([NAN, -1.0])).isnan().all()


def test_missing_norms():
    norms = torch.tensor([2.0, NAN, 0.5, -1.0])
    assert clip_factors(norms, 1.0, missing="zero").tolist() == [0.5, 0, 1, 0]
    with pytest.raises(ValueError, match=r"norms: 2 of 4 samples have no norm.*sample 1.*missing='zero'"):
        clip_factors(norms, 1.0, missing="raise")
    assert clip_factors(norms[:1], 1.0, missing="raise").tolist() == [0.5]


def test_eps_keeps_float32_products_below_the_bound():
    norms = torch.rand(100_000, generator=torch.manual_seed(1)).mul(100).add(1)
    assert (clip_factors(norms, 1.0, eps=1e-6) * norms).max() <= 1 + 1e-7
    assert torch.equal(clip_factors(norms, 1.0, eps=1e-6), (1 / (norms + 1e-6)).clamp(max=1))


@pytest.mark.parametrize("function", [clip_factors, automatic_clip_factors])
def test_bounds_that_are_tensors(function):
    norms = torch.tensor([2.0, 4.0, 8.0])
    assert torch.equal(function(norms, torch.tensor(2.0)), function(norms, 2.0))
    assert torch.equal(function(norms, torch.tensor([2.0, 1.0, 2.0]))[::2], function(norms, 2.0)[::2])
    bad = function(norms, torch.tensor([0.0, -1.0, NAN]))
    assert bad.isnan().all()
    assert not function(norms.requires_grad_(), torch.tensor(2.0, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0], 1.0), "norms: expected a floating-point tensor.*list"),
        ((torch.ones(2, 2), 1.0), r"norms: .*float32 \[2, 2\]"),
        ((torch.ones(2, dtype=torch.int64), 1.0), "norms: .*int64"),
        ((torch.ones(2), 0.0), "max_norm: expected a number > 0, got 0.0"),
        ((torch.ones(2), NAN), "max_norm"),
        ((torch.ones(2), torch.ones(3)), r"max_norm: .*\[2\], got torch.float32 \[3\]"),
        ((torch.ones(2), torch.ones(2, dtype=torch.int32)), "max_norm"),
    ],
)
def test_refusals(arguments, words):
    for function in (clip_factors, automatic_clip_factors):
        with pytest.raises(ValueError, match=words):
            function(*arguments)


def test_refused_options():
    norms = torch.ones(2)
    for eps in (-1.0, NAN, INF):
        with pytest.raises(ValueError, match="eps"):
            clip_factors(norms, 1.0, eps=eps)
    for gamma in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="gamma"):
            automatic_clip_factors(norms, gamma=gamma)
    with pytest.raises(ValueError, match="missing: expected 'nan'"):
        clip_factors(norms, 1.0, missing="drop")
