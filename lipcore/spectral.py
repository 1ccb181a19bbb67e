"""Singular values of first layers, for the sandwich of Theorem 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipcore.pullback import pull_back, push_forward

_SVD_LIMIT = 512  # smaller side; above it an SVD per window would be felt
_STEPS = 100
_MEMORY = 1 << 25  # numbers that Lanczos may keep
_SMALL = 1 << 14  # elements of one sample
_TOLERANCE, _TOLERANCE_LARGE = 1e-6, 1e-3  # of the residual; the value's own error is about its square


@dataclass(frozen=True)
class SingularValues:
    """Largest and smallest singular value of a first layer's linear map; `smallest` is None when it is not known."""

    largest: float
    smallest: float | None
    rule: str  #: how they were found


def singular_values(module: nn.Module, batch_shape: tuple[int, ...] | None) -> SingularValues | None:
    """Of the map x -> W_1 x for one sample of a batch of this shape; None for an Embedding, whose input is not a
    vector.

    Linear: by SVD, or by Lanczos iteration (then without the smallest) above 512 x 512. Convolution: from its matrix up
    to 512 inputs, else Lanczos iteration with the convolution and its transpose, to 1e-4 or better. The smallest value
    of a convolution is not estimated: iteration approaches it from above and would give an invalid bound.
    """
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    if not module.weight.isfinite().all():
        return SingularValues(math.nan, None, "W_1 is not finite")
    if isinstance(module, nn.Linear):
        weight = module.weight.detach()
        if min(weight.shape) <= _SVD_LIMIT:
            values = torch.linalg.svdvals(weight.to(torch.float64))
            # An SVD's smallest values carry an error of eps sigma_1: what is under it is zero.
            smallest = float(values[-1])
            return SingularValues(float(values[0]), smallest if smallest > 1e-14 * float(values[0]) else 0.0, "SVD")
        return SingularValues(_lanczos(module, (1, weight.shape[1])), None, "Lanczos")
    if batch_shape is not None:
        shape = (1, *batch_shape[1:])
        if math.prod(shape) <= _SVD_LIMIT:
            return SingularValues(_of_matrix(module, shape), None, "eigenvalues of W_1^T W_1")
        return SingularValues(_lanczos(module, shape), None, "Lanczos")
    return None


@torch.no_grad()
def _of_matrix(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Of a map of few inputs, written out: a handful of operations where Lanczos takes hundreds of small ones."""
    weight = module.weight.detach().to(torch.float64)  # type: ignore[operator]
    inputs = math.prod(shape)
    unit = torch.eye(inputs, dtype=torch.float64, device=weight.device).reshape(inputs, *shape[1:])
    columns = push_forward(module, weight, unit).reshape(inputs, -1)
    return math.sqrt(max(float(torch.linalg.eigvalsh(columns @ columns.T)[-1]), 0.0))


@torch.no_grad()
def _lanczos(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Square root of the largest eigenvalue of W_1^T W_1. Power iteration would need thousands of steps: the largest
    singular values of a convolution lie close together."""
    generator = torch.Generator().manual_seed(0)
    weight = module.weight.detach().to(torch.float64)  # type: ignore[operator]
    q: Tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
    q = q / q.norm()
    tolerance = _TOLERANCE if q.numel() <= _SMALL else _TOLERANCE_LARGE
    basis: list[Tensor] = [q.reshape(-1)]
    diagonal: list[float] = []
    beside: list[float] = []
    theta = 0.0
    for _ in range(min(_STEPS, _MEMORY // q.numel() + 2, q.numel())):
        w = pull_back(module, weight, push_forward(module, weight, q), shape).reshape(-1)
        diagonal.append(float(w @ basis[-1]))
        vectors = torch.stack(basis)
        for _ in range(2):  # twice is enough to stay orthogonal
            w = w - vectors.T @ (vectors @ w)
        step = float(w.norm())
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for i, value in enumerate(beside):
            tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = value
        values, eigenvectors = torch.linalg.eigh(tridiagonal)
        theta = float(values[-1])
        if step * abs(float(eigenvectors[-1, -1])) <= tolerance * theta:
            break
        beside.append(step)
        basis.append(w / step)
        q = basis[-1].reshape(shape)
    return math.sqrt(max(theta, 0.0))
