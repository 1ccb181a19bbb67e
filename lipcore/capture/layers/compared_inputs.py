"""What ranks that hold parts of a model are given, as numbers that differ where they are given other samples: one
gradient of both would come of it, in which nothing shows that."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.placed_call import cut_of
from lipcore.layers import Factor, Outer
from lipcore.models.tensor_parallel import PartRanks

INPUT = "input/"  #: before the name of the layer, as a row's name


def compared_parameter(coverage: ParameterCoverage, parts: PartRanks) -> str:
    """Return the name of the first weight of a layer y = x W^T + b that is cut along its outputs, so that each of the
    ranks has the whole input; "" for none."""
    for _, module, rule, names in coverage.tapped:
        cut, name = cut_of(rule, names, parts), names.get("weight", "")
        # Where a module computes the same in its own way, the factor may have the output's gradient for the input.
        if rule.fuses(module) and cut.output is not None and cut.input is None and name in parts.cuts:
            return name
    return ""


def seen_in(factor: Factor) -> Tensor | None:
    """Return a number for each sample of a layer's input, float64 [B], by its elements and their places; None where the
    factor does not have the input by sample. The size of the input is in it, so that none is near 0."""
    if not isinstance(factor, Outer) or factor.offsets is not None or factor.x.dim() != 3:
        return None
    x = factor.x.detach()
    along = (x @ _weights(x.shape[2], x.dtype, x.device)).double() @ _weights(x.shape[1], torch.float64, x.device)
    found: Tensor = along.square() + torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64).square()
    return found


@functools.lru_cache(maxsize=16)
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64, device=device).square().cos().to(dtype)
