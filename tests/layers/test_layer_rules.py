"""Every layer's rule against the definition: dtype, reduction, contiguity, instruction set, reuse, ties, refusals."""

from __future__ import annotations

import pytest
import torch
from few import few
from oracle import DTYPES
from rule_cases import CASES
from rule_factors import factors_of, make
from rule_oracle import norms_sq
from torch import Tensor

from lipcore import layers
from lipcore.layers import Batch

SAMPLES = 6
# Of squared norms: norms are promised to 1e-5 and 1e-12.
TOLERANCE = {torch.float64: 2e-12}


def sampler(batch_dim, samples):
    """One sample of an argument, keeping its dimension; masks have the batch first."""

    def sample(value, b):
        if not isinstance(value, Tensor):
            return value
        dim = 0 if value.dtype == torch.bool else batch_dim
        batched = value.dim() > dim and value.shape[dim] == samples
        return value.narrow(dim, b, 1) if batched else value

    return sample


def check(factors, truth, dtype, scale=1.0):
    assert factors.keys() == truth.keys()
    tolerance = TOLERANCE.get(dtype, 1e-5)
    for name, factor in factors.items():
        got, want = factor.norms_sq() / scale**2, truth[name]
        assert got.dtype == torch.float64
        assert factor.samples == len(want)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance**2, msg=lambda m, n=name: f"{n}: {m}")


def run(name, dtype, samples=SAMPLES, reduction="sum", noncontiguous=False, times=1):
    case = CASES[name]
    made = [make(case, samples, dtype, noncontiguous) for _ in range(times)]
    module, calls = made[0][0], [(a, k) for _, a, k in made]
    scale = 1.0 if reduction == "sum" else 1 / 8  # a power of two: exact in every dtype
    batch = Batch(samples, case.batch_dim if case.own_dim else 0)
    factors, cotangents = factors_of(module, calls, batch, scale, noncontiguous)
    sample = sampler(case.batch_dim, samples)
    truth = norms_sq(module, calls, cotangents, sample, samples)
    check(factors, truth, dtype, scale)
    return factors, module


@pytest.mark.parametrize("noncontiguous", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("reduction", few(["mean", "sum"], 1))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_layer(name, dtype, reduction, noncontiguous):
    run(name, dtype, reduction=reduction, noncontiguous=noncontiguous)


@pytest.mark.parametrize("name", CASES)
def test_every_isa(name, isa):
    run(name, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_one_sample(name):
    run(name, torch.float32, samples=1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.empty_batch])
def test_no_sample(name):
    run(name, torch.float32, samples=0)


@pytest.mark.parametrize("name", CASES)
def test_called_twice(name):
    run(name, torch.float64, times=2)


@pytest.mark.parametrize("name", CASES)
def test_dense_is_the_gradient(name):
    factors, module = run(name, torch.float32)
    for key, factor in factors.items():
        dense = [factor.dense(b) for b in range(SAMPLES)]
        assert dense[0].shape == module.get_parameter(key).shape
        norms = torch.stack([d.square().sum() for d in dense])
        torch.testing.assert_close(factor.norms_sq(), norms, rtol=1e-5, atol=1e-10)


def test_frozen_parameters_have_no_factor():
    for name, case in CASES.items():
        module, arguments, keywords = make(case, SAMPLES, torch.float32)
        module.requires_grad_(False)
        batch = Batch(SAMPLES, case.batch_dim if case.own_dim else 0)
        rule = layers.rule_for(module)
        saved, extra = rule.save(module, arguments, keywords, batch)
        y = module(*arguments, **keywords)
        y = y[0] if isinstance(y, tuple) else y
        assert rule.factors(module, torch.randn_like(y), extra, *saved) == {}, name
