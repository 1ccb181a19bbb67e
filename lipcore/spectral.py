"""Singular values of first layers, for the sandwich of Theorem 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipcore.pullback import pull_back, push_forward

_SVD_LIMIT = 512  # smaller side; above it an SVD per window would be felt
_ITERATIONS = 200
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class SingularValues:
    """Largest and smallest singular value of a first layer's linear map; `smallest` is None when it is not known."""

    largest: float
    smallest: float | None
    rule: str  #: how they were found


def singular_values(module: nn.Module, batch_shape: tuple[int, ...] | None) -> SingularValues | None:
    """Of the map x -> W_1 x for one sample of a batch of this shape; None for an Embedding, whose input is not a
    vector.

    Linear: by SVD, or by power iteration (then without the smallest) above 512 x 512. Convolution: power iteration with
    the convolution and its transpose, to 1e-6; its smallest value is not estimated, since iteration approaches it from
    above and would give an invalid bound.
    """
    if isinstance(module, nn.Linear):
        weight = module.weight.detach()
        if min(weight.shape) <= _SVD_LIMIT:
            values = torch.linalg.svdvals(weight.to(torch.float64))
            # An SVD's smallest values carry an error of eps sigma_1: what is under it is zero.
            smallest = float(values[-1])
            return SingularValues(float(values[0]), smallest if smallest > 1e-14 * float(values[0]) else 0.0, "SVD")
        return SingularValues(_power_iteration(module, (1, weight.shape[1])), None, "power iteration")
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and batch_shape is not None:
        return SingularValues(_power_iteration(module, (1, *batch_shape[1:])), None, "power iteration")
    return None


@torch.no_grad()
def _power_iteration(module: nn.Module, shape: tuple[int, ...]) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = module.weight.detach().to(torch.float64)  # type: ignore[operator]
    x: Tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
    previous = 0.0
    for _ in range(_ITERATIONS):
        x = x / x.norm()
        y = push_forward(module, weight, x)
        sigma = float(y.norm())
        if sigma == 0.0 or abs(sigma - previous) <= _TOLERANCE * sigma:
            return sigma
        previous = sigma
        x = pull_back(module, weight, y, shape)
    return previous
