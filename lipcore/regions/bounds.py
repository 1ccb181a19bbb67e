"""Bounds by combinations of training patterns: the programme of Theorem 2 in kernel form, and the relaxation beside it.

Patterns are scaled to length 1, and their lengths, products over layers that overflow in deep networks, kept as
logarithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lipcore.regions.kernel import kernel, log_norms, norms_modulo
from lipcore.regions.least_cost import LeastCost
from lipcore.regions.patterns import Patterns
from lipcore.regions.span import Span, independent

Floats = NDArray[np.float64]
_DEPENDENT = 1e-9  # squared distance from the others' span under which a training pattern is used only if it is 0
_DOUBT = 1e-6  # squared distance from the span from which on a pattern is outside, whatever was rounded
_ROUNDING = 1e-15  # of an inner product of patterns of length 1
_RANGE = 600.0  # logarithm of the largest ratio of pattern lengths: exp(709) overflows


class Bounds:
    """Bounds from the regions with the given patterns and constants, one constant per region.

    Args:
        patterns: different ones.
        constants: each region's local Lipschitz constant.
        log_map: log ||M||, or NaN where it is not known.
        affine: a constant entry is added to every layer's pattern.
    """

    def __init__(self, patterns: Patterns, constants: Floats, log_map: float, *, affine: bool) -> None:
        self._affine, self._log_map = affine, log_map
        log_norm = log_norms(patterns, affine=affine)
        # Where all units of a layer are off the pattern is zero, and so is the gradient: no help for other inputs.
        used = np.flatnonzero(np.isfinite(log_norm))
        known = patterns.take(used)
        log_gram, whole = kernel(known, known, affine=affine)
        gram = np.exp(log_gram - log_norm[used, None] - log_norm[used])
        basis = independent(gram, _DEPENDENT)
        self.rank = len(basis)
        self._span = Span(whole, basis)
        kept = self._span.members
        self._basis = (np.cumsum(kept) - 1)[basis]  # among those kept
        used, gram = used[kept], gram[np.ix_(kept, kept)]
        self._used, self._log_norm, self._slopes = patterns.take(used), log_norm[used], constants[used]
        self._unit = float(self._log_norm.max()) if len(used) else 0.0  # lengths are counted from the longest
        if len(used) and self._unit - self._log_norm.min() > _RANGE:
            digits = (self._unit - self._log_norm.min()) / np.log(10)
            raise ValueError(
                "model: the lengths of its training inputs' activation patterns differ by a factor of "
                f"10^{digits:.0f}, more than double precision holds; the network is too deep for Coverage"
            )
        self._costs = self._slopes * np.exp(self._unit - self._log_norm)
        eigenvalues, vectors = np.linalg.eigh(gram) if len(gram) else (np.zeros(0), np.zeros((0, 0)))
        eigenvalues, vectors = eigenvalues[len(gram) - self.rank :], vectors[:, len(gram) - self.rank :]
        # The rank is known exactly: what rounding made of the least eigenvalues is still theirs.
        roots = np.sqrt(np.maximum(eigenvalues, _ROUNDING))
        self._rounding = _ROUNDING * self.rank / float(roots.min(initial=1.0)) ** 2
        self._whiten = vectors / roots
        self._programme = LeastCost((vectors * roots).T, self._costs)

    def of(self, queried: Patterns, *, solve: bool, advance: Callable[[], None]) -> tuple[NDArray[Any], ...]:
        """Compute status, k, bound, relaxed and nearest of patterns that are not those of a training point."""
        log_norm = log_norms(queried, affine=self._affine)
        zero = ~np.isfinite(log_norm)
        safe = np.where(zero, 0.0, log_norm)
        log_kappa, whole = kernel(queried, self._used, affine=self._affine)
        kappa = np.exp(log_kappa - safe[:, None] - self._log_norm)
        inside = kappa @ self._whiten  # coordinates in the span
        outside_sq = np.clip(1.0 - np.square(inside).sum(axis=1), 0.0, None)
        spanned = (outside_sq <= _DOUBT) & ~zero
        doubtful = np.flatnonzero(spanned)
        own = norms_modulo(queried.take(doubtful), affine=self._affine)
        spanned[doubtful] = self._span.contains([part[np.ix_(doubtful, self._basis)] for part in whole], own)
        status = np.where(spanned | zero, "combination", "uncovered").astype("<U11")
        k = np.zeros(len(queried), dtype=np.int64)
        bound = np.where(zero, 0.0, np.where(spanned, np.nan, np.inf))
        near = self._nearest(kappa, safe)
        # Every candidate is a bound: the least one counts. NaN stays where ||M|| is not known.
        left_out = np.where(spanned, 0.0, np.maximum(outside_sq, self._rounding))
        squares = _times(np.abs(inside @ self._whiten.T) @ self._costs, safe - self._unit)
        squares = squares + _times(np.sqrt(left_out), self._log_map + safe)
        relaxed = np.fmin(np.fmin(_times(np.ones(len(queried)), self._log_map + safe), near), squares)
        relaxed[zero] = near[zero] = 0.0
        for i in range(len(queried)):
            if solve and spanned[i]:
                columns, scaled = self._programme.least(inside[i])
                bound[i] = _times(np.abs(scaled) @ self._costs[columns], safe[i] - self._unit)
                k[i] = int((np.abs(scaled) > 1e-9).sum())
                relaxed[i] = np.fmin(relaxed[i], bound[i])
            advance()
        return status, k, bound, relaxed, near

    def _nearest(self, kappa: Floats, log_norm: Floats) -> Floats:
        """Compute the minimum over regions of lambda_j + ||M|| ||s - s_j||."""
        if not len(self._slopes) or np.isnan(self._log_map):
            return np.full(len(kappa), np.nan)
        longer = np.maximum(log_norm[:, None], self._log_norm)
        mine, theirs = np.exp(log_norm[:, None] - longer), np.exp(self._log_norm - longer)
        distance = np.sqrt(np.maximum(mine**2 + theirs**2 - 2 * kappa * mine * theirs, _ROUNDING))
        nearest: Floats = (self._slopes + _times(distance, self._log_map + longer)).min(axis=1)
        return nearest


def _times(scale: Any, log_factor: Any) -> Any:
    """Compute scale exp(log_factor), where exp alone may overflow; infinity where the product does, which is a
    bound."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.exp(np.log(scale) + log_factor)
