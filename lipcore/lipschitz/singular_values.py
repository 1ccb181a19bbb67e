"""Singular values of first layers, for the sandwich of Theorem 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.lipschitz.pullback import pull_back, push_forward

#: Smaller side of a matrix; above it an SVD per window would be felt.
SVD_LIMIT = 512
_STEPS = 100
_MEMORY = 1 << 25  # numbers that Lanczos may keep
_SMALL = 1 << 14  # elements of one sample
_TOLERANCE, _TOLERANCE_LARGE = 1e-6, 1e-3  # of the residual; the value's own error is about its square
_ROOM = 1.05  # iterated until this multiple of the Ritz value is above all eigenvalues: 2.5 % of sigma_1
_FAILURE = 1e-9  # share of the start vectors for which the bound behind Lanczos may fail


@dataclass(frozen=True)
class SingularValues:
    """Largest and smallest singular value of a first layer's linear map; `smallest` is None when it is not known."""

    largest: float  #: exact to rounding by SVD; by Lanczos iteration an estimate that approaches sigma_1 from below
    smallest: float | None
    rule: str  #: how they were found, and whether the iteration converged
    upper: float  #: not below sigma_1; `largest` itself where that is exact

    @classmethod
    def of_details(cls, facts: Mapping[str, Any]) -> SingularValues:
        """Return those that a window's details hold; of a record, whose JSON has null for what is not finite."""
        largest, upper = (math.nan if facts[key] is None else facts[key] for key in ("largest", "upper"))
        return cls(largest, facts["smallest"], facts["rule"], upper)

    @property
    def exact(self) -> bool:
        """True where `largest` is sigma_1 to rounding."""
        return self.upper == self.largest


def has_singular_values(module: nn.Module, weight: Tensor, batch_shape: tuple[int, ...] | None) -> bool:
    """Return whether :func:`singular_values` gives any of a layer with this weight, without computing them."""
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    return isinstance(module, nn.Linear) or batch_shape is not None or not bool(weight.isfinite().all())


def singular_values(module: nn.Module, batch_shape: tuple[int, ...] | None) -> SingularValues | None:
    """Compute the singular values of the map x -> W_1 x for one sample of a batch of this shape; return None for an
    Embedding, whose input is not a vector.

    Linear: by SVD, or by Lanczos iteration (then without the smallest) above 512 x 512. Convolution: from its matrix up
    to 512 inputs, else Lanczos iteration with the convolution and its transpose, to 1e-4 or better. The smallest value
    of a convolution is not estimated: iteration approaches it from above and would give an invalid bound.

    What needs a bound of sigma_1 (a divisor of a lower bound, a factor of an upper one) takes `upper`.
    """
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    if not module.weight.isfinite().all():
        return SingularValues(math.nan, None, "W_1 is not finite", math.nan)
    if isinstance(module, nn.Linear):
        weight = module.weight.detach()
        if min(weight.shape) <= SVD_LIMIT:
            values = torch.linalg.svdvals(weight.to(torch.float64))
            # An SVD's smallest values carry an error of eps sigma_1: what is under it is zero.
            smallest = float(values[-1])
            largest = float(values[0])
            return SingularValues(largest, smallest if smallest > 1e-14 * largest else 0.0, "SVD", largest)
        return _iterated(module, (1, weight.shape[1]))
    if batch_shape is not None:
        shape = (1, *batch_shape[1:])
        if math.prod(shape) <= SVD_LIMIT:
            largest = _of_matrix(module, shape)
            return SingularValues(largest, None, "eigenvalues of W_1^T W_1", largest)
        return _iterated(module, shape)
    return None


def _iterated(module: nn.Module, shape: tuple[int, ...]) -> SingularValues:
    found = _lanczos(module, shape)
    rule = f"Lanczos, {found.steps} steps" if found.converged else f"Lanczos, not converged in {found.steps} steps"
    return SingularValues(found.value, None, rule, max(found.value, min(found.upper, norm_bound(module, shape))))


@torch.no_grad()
def norm_bound(module: nn.Module, shape: tuple[int, ...]) -> float:
    r"""Return an upper bound of sigma_1 that needs no iteration: :math:`\sqrt{\|W\|_1 \|W\|_\infty}`, and for Linear
    the Frobenius norm where that is less. The map of |W| applied to ones gives row and column sums of any convolution,
    with any padding (where padded copies add up, |a| + |b| is only larger)."""
    weight = module.weight.detach().to(torch.float64).abs()  # type: ignore[operator]
    rows = push_forward(module, weight, weight.new_ones(shape))
    columns = pull_back(module, weight, torch.ones_like(rows), shape)
    bound = math.sqrt(float(rows.max()) * float(columns.max()))
    return min(bound, float(weight.norm())) if isinstance(module, nn.Linear) else bound


@torch.no_grad()
def _of_matrix(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Compute sigma_1 of a map of few inputs from its matrix: a handful of operations where Lanczos takes hundreds of
    small ones."""
    weight = module.weight.detach().to(torch.float64)  # type: ignore[operator]
    inputs = math.prod(shape)
    unit = torch.eye(inputs, dtype=torch.float64, device=weight.device).reshape(inputs, *shape[1:])
    columns = push_forward(module, weight, unit).reshape(inputs, -1)
    return math.sqrt(max(float(torch.linalg.eigvalsh(columns @ columns.T)[-1]), 0.0))


@dataclass(frozen=True)
class _Iteration:
    value: float  #: square root of the largest Ritz value, never above sigma_1
    upper: float  #: see _lanczos
    steps: int
    converged: bool


@torch.no_grad()
def _lanczos(module: nn.Module, shape: tuple[int, ...]) -> _Iteration:
    r"""Estimate sigma_1, the square root of the largest eigenvalue of W_1^T W_1, by Lanczos iteration. Power iteration
    would need thousands of steps: the largest singular values of a convolution lie close together.

    Ritz value plus residual bounds the eigenvalue *nearest* to it, and no residual tells whether that is the largest.
    `upper` is therefore also no less than :func:`_largest_eigenvalue`, which holds for all but 1e-9 of the random
    starts.
    """
    generator = torch.Generator().manual_seed(0)
    weight = module.weight.detach().to(torch.float64)  # type: ignore[operator]
    q: Tensor = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(weight.device)
    q = q / q.norm()
    tolerance = _TOLERANCE if q.numel() <= _SMALL else _TOLERANCE_LARGE
    basis: list[Tensor] = [q.reshape(-1)]
    diagonal: list[float] = []
    beside: list[float] = []
    theta = residual = step = 0.0
    values = torch.zeros(1, dtype=torch.float64, device="cpu")
    for _ in range(min(_STEPS, _MEMORY // q.numel() + 2, q.numel())):
        w = pull_back(module, weight, push_forward(module, weight, q), shape).reshape(-1)
        diagonal.append(float(w @ basis[-1]))
        vectors = torch.stack(basis)
        for _ in range(2):  # twice is enough to stay orthogonal
            w = w - vectors.T @ (vectors @ w)
        step = float(w.norm())
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
        for i, value in enumerate(beside):
            tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = value
        values, eigenvectors = torch.linalg.eigh(tridiagonal)
        theta, residual = max(float(values[-1]), 0.0), step * abs(float(eigenvectors[-1, -1]))
        if not theta:
            break
        if residual <= tolerance * theta and _is_above(_ROOM * theta, values, [*beside, step], q.numel()):
            break
        beside.append(step)
        basis.append(w / step)
        q = basis[-1].reshape(shape)
    steps = len(diagonal)
    bound = _largest_eigenvalue(values, [*beside[: steps - 1], step], q.numel())
    upper = max(theta + residual, bound)
    return _Iteration(math.sqrt(theta), math.sqrt(upper), steps, residual <= tolerance * theta)


def _is_above(value: float, ritz: Tensor, beside: list[float], dimension: int) -> bool:
    r"""Return whether a value is above all eigenvalues, from k Lanczos steps (van Dorsselaer, Hochstenbach and van der
    Vorst 2000). With p the monic polynomial whose roots are the Ritz values, :math:`p(A) q_1 = \beta_1 \cdots \beta_k
    q_{k+1}`, so :math:`p(\lambda_1) \le \beta_1 \cdots \beta_k / |v_1 \cdot q_1|`, and p rises beyond its roots. The
    component :math:`|v_1 \cdot q_1|` of a random start is below eta with a probability of at most :math:`\eta \sqrt{2 n
    / \pi}`."""
    theta = float(ritz[-1])
    smallest = math.log(_FAILURE / math.sqrt(2 * dimension / math.pi))
    # A beta below the rounding of the iteration says no more than that.
    product = sum(math.log(max(beta, 1e-15 * theta)) for beta in beside)
    return value > theta and float((value - ritz).log().sum()) > product - smallest


def _largest_eigenvalue(ritz: Tensor, beside: list[float], dimension: int) -> float:
    """Return an upper bound of the largest eigenvalue, by bisection; infinite where it is beyond 100 times the Ritz
    value."""
    low, high = float(ritz[-1]), 100 * float(ritz[-1])
    if low <= 0:
        return 0.0
    if not _is_above(high, ritz, beside, dimension):
        return math.inf
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _is_above(middle, ritz, beside, dimension) else (middle, high)
    return high
