"""Per-sample gradients and their squared norms by definition: a float64 copy of the module, one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def in_float64(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


def gradients(
    module: nn.Module,
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
    cotangents: list[Tensor],
    sample: Callable[[Any, int], Any],
    samples: int,
) -> dict[str, Tensor]:
    """Per trainable parameter grad sum_calls <output_b, cotangent_b>, float64 [B, *shape].

    sample: one sample of an argument or a cotangent, with the dimension of samples kept.
    """
    module = copy.deepcopy(module).double()
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        module.eps = torch.finfo(torch.promote_types(cotangents[0].dtype, torch.float32)).eps
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        return {}
    out: dict[str, list[Tensor]] = {name: [] for name in named}
    for b in range(samples):
        loss = torch.zeros((), dtype=torch.float64)
        for (arguments, keywords), cotangent in zip(calls, cotangents, strict=True):
            args = [in_float64(sample(a, b)) for a in arguments]
            y = module(*args, **{k: in_float64(sample(v, b)) for k, v in keywords.items()})
            y = y[0] if isinstance(y, tuple) else y
            loss = loss + (y * in_float64(sample(cotangent, b))).sum()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, g in zip(named, grads, strict=True):
            out[name].append(torch.zeros_like(named[name]).detach() if g is None else g.to_dense())
    return {name: torch.stack(v) if v else torch.zeros(0, *named[name].shape).double() for name, v in out.items()}


def norms_sq(*arguments: Any) -> dict[str, Tensor]:
    """Per trainable parameter the squared norms of gradients(), float64 [B]."""
    return {name: rows.flatten(1).square().sum(1) for name, rows in gradients(*arguments).items()}
