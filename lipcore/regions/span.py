"""Test whether a pattern is a linear combination of others, decided in whole numbers.

Kronecker patterns have prod(n_l) entries: one that differs from the span of the others in a single entry is at an angle
of 1e-8 or less to it, which floating point cannot tell from 0. The Gram matrix is whole, so its elimination can be done
modulo a prime, where nothing rounds: the pattern lies in the span iff the square of its distance is 0. A distance that
is not 0 is taken for 0 where the prime divides it; with two primes near 2^23 that is one case in 10^13.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lipcore.regions.kernel import PRIMES, modulo

Whole = NDArray[np.float64]  # of whole numbers in [0, prime)
_PANEL = 64  # a sum of 64 products of two numbers below 2^23 is exact in float64


def independent(gram: NDArray[np.float64], least_sq: float) -> NDArray[np.int64]:
    """Find indices of patterns (of length 1 each), each further from the span of those before it than `least_sq`,
    squared, until no other is: Cholesky's method with pivots."""
    left, rows = np.diag(gram).copy(), np.zeros_like(gram)
    chosen: list[int] = []
    while len(chosen) < len(gram):
        found = int(np.argmax(left))
        if left[found] <= least_sq:
            break
        done = rows[: len(chosen)]
        row = (gram[found] - done[:, found] @ done) / np.sqrt(left[found])
        rows[len(chosen)] = row
        left = left - row * row
        chosen.append(found)
        left[chosen] = 0.0
    return np.array(chosen, dtype=np.int64)


class Span:
    """Span of some of N patterns.

    Args:
        gram: of all of them, modulo each prime.
        basis: indices of those that span.
    """

    def __init__(self, gram: list[Whole], basis: NDArray[np.int64]) -> None:
        self._factors = [_Factors(part[np.ix_(basis, basis)], prime) for part, prime in zip(gram, PRIMES, strict=True)]
        self.members = self.contains([part[:, basis] for part in gram], [np.diag(part) for part in gram])  #: bool [N]

    def contains(self, cross: list[Whole], own: list[Whole]) -> NDArray[np.bool_]:
        """Say which patterns lie in the span, bool [Q], from their inner products with the basis, [Q, R], and with
        themselves, [Q], modulo each prime."""
        distances = [f.distances_sq(*both) for f, *both in zip(self._factors, cross, own, strict=True)]
        inside: NDArray[np.bool_] = np.all([found == 0 for found in distances], axis=0)
        return inside


class _Factors:
    """Factors K = L D L^T modulo a prime, L with unit diagonal; columns of dependent patterns are left out (zero)."""

    def __init__(self, gram: Whole, prime: int) -> None:
        self.prime = prime
        self._left = gram.copy()
        count = len(gram)
        self._pivots = np.zeros(count)  # D, 0 for the columns left out
        self._inverses = np.zeros(count)
        for start in range(0, count, _PANEL):
            stop = min(start + _PANEL, count)
            panel = self._left[start:, start:stop]
            for i in range(stop - start):
                pivot = int(panel[i, i])
                if pivot == 0:  # in a Gram matrix: the pattern is a combination of those before it
                    panel[:, i] = 0
                    continue
                inverse = pow(pivot, -1, prime)
                self._pivots[start + i], self._inverses[start + i] = pivot, inverse
                row = panel[i, i + 1 :].copy()
                panel[:, i] = modulo(panel[:, i] * inverse, prime)
                panel[i:, i + 1 :] = modulo(panel[i:, i + 1 :] - panel[i:, i, None] * row, prime)
            below = panel[stop - start :]
            scaled = modulo(below * self._pivots[start:stop], prime)
            rest = self._left[stop:, stop:]
            rest[...] = modulo(rest - scaled @ below.T, prime)

    def distances_sq(self, cross: Whole, own: Whole) -> Whole:
        """Compute ||s||^2 - kappa^T K^+ kappa for kappa [Q, N] and ||s||^2 [Q]: the squared distance from the span."""
        cross, own, prime = cross.copy(), own.copy(), self.prime
        count = cross.shape[1]
        for start in range(0, count, _PANEL):
            stop = min(start + _PANEL, count)
            for i in range(start, stop):
                weight = cross[:, i].copy() * bool(self._pivots[i])
                own = modulo(own - weight * modulo(weight * self._inverses[i], prime), prime)
                cross[:, i] = weight
                ahead = self._left[i + 1 : stop, i]
                cross[:, i + 1 : stop] = modulo(cross[:, i + 1 : stop] - weight[:, None] * ahead, prime)
            done = cross[:, start:stop] @ self._left[stop:, start:stop].T
            cross[:, stop:] = modulo(cross[:, stop:] - done, prime)
        return own
