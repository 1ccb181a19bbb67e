"""Factors that a layer's rule makes of calls, and the modules and inputs of a case."""

from __future__ import annotations

import torch
from rule_cases import Case
from torch import Tensor

from lipcore import layers


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def strided(value):
    """Every second element of something larger."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])[..., ::2]
    return wide.copy_(value)


def factors_of(module, calls, batch, scale=1.0, noncontiguous=False, seed=0):
    """Per parameter the factors of all calls, joined, and the cotangents of their outputs."""
    rule, joined, cotangents = layers.rule_for(module), {}, []
    assert rule is not None
    assert rule.refuses(module) == ""
    torch.manual_seed(seed)
    for arguments, keywords in calls:
        y = module(*arguments, **keywords)
        y = y[0] if isinstance(y, tuple) else y
        cotangent = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
        cotangents.append(cotangent)
        loss = (y * cotangent).sum() * scale
        grad = torch.autograd.grad(loss, y)[0] if y.requires_grad else cotangent * scale
        saved, extra = rule.save(module, arguments, keywords, batch)
        grad = strided(grad) if noncontiguous else grad
        for name, factor in rule.factors(module, grad, extra, *saved).items():
            joined[name] = joined[name].join(factor) if name in joined else factor
    return joined, cotangents


def make(case: Case, samples, dtype, noncontiguous=False):
    torch.manual_seed(samples)
    module = case.make().to(dtype)
    change = strided if noncontiguous else (lambda v: v)
    arguments = tuple(change(cast(a, dtype)) for a in case.inputs(samples))
    keywords = {k: cast(v, dtype) for k, v in case.keywords(samples).items()}
    return module, arguments, keywords
