"""Solver of min sum_i c_i |k_i| subject to A k = b, for one A and many b: a simplex method that starts where a former
one ended.

The dual, max b^T y subject to |A^T y| <= c, has the same corners for every b. So each programme starts at the best of
the corners that were optimal for others and follows edges to its own (the dual simplex method with steepest edges).
HiGHS, which cannot be given a corner through scipy, takes 10 to 60 times as long; it is asked where rounding spoilt a
result, which is certified before it is returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_TOLERANCE = 1e-9  # of columns and targets of length 1
_CERTIFIED = 1e-7  # relative, of the equations and of the gap between primal and dual
_REFRESH = 100  # pivots between fresh inverses
_KEPT_BYTES = 1 << 26


@dataclass
class _Corner:
    """Vertex of the dual: the columns whose constraints are tight, and at which side."""

    basis: NDArray[np.int64]
    side: Floats  #: +1 or -1 for each column of the basis
    y: Floats


class LeastCost:
    """Solver for the programmes of one training set: columns A [rank, N] of full row rank, costs [N] >= 0."""

    def __init__(self, columns: Floats, costs: Floats) -> None:
        self._rows = np.ascontiguousarray(columns.T)  # a column of A is one stretch of memory
        self._scale = float(costs.max()) if len(costs) and costs.max() > 0 else 1.0
        self._costs = costs / self._scale
        rank = columns.shape[0]
        self._limit = 1000 + 50 * rank
        self._kept = max(8, _KEPT_BYTES // (24 * max(1, rank)))
        self._corners: list[_Corner] = []
        self._ys = np.empty((self._kept, rank))

    def least(self, target: Floats) -> tuple[NDArray[np.int64], Floats]:
        """Find the columns and their factors k at the minimum; all other factors are 0.

        Raises:
            ModuleNotFoundError: scipy is not installed.
            RuntimeError: neither method solved it.
        """
        try:
            from scipy.optimize import linprog
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "Coverage solves linear programmes with the help of scipy, which is not installed; run: pip install "
                "'lipcore[theory]', or query(x, solve=False) for the status alone"
            ) from None
        corner = self._follow(self._best_corner(target), target)
        if corner is not None:
            factors: Floats = np.linalg.solve(self._rows[corner.basis].T, target).astype(np.float64, copy=False)
            if self._certified(corner, factors, target):
                self._keep(corner)
                return corner.basis, factors
        both = np.concatenate([self._rows, -self._rows]).T
        found = linprog(np.tile(self._costs, 2), A_eq=both, b_eq=target, bounds=(0, None), method="highs")
        if found.status != 0:
            raise RuntimeError(
                f"the linear programme of Theorem 2 ({both.shape[0]} rows, {both.shape[1]} columns) was not solved: "
                f"{found.message}"
            )
        count = len(self._costs)
        return np.arange(count), found.x[:count] - found.x[count:]

    def _best_corner(self, target: Floats) -> _Corner:
        """Choose the corner to start from. Every corner's b^T y is a lower bound of the minimum: the highest is the
        nearest."""
        if not self._corners:
            self._keep(self._first_corner())
        return self._corners[int(np.argmax(self._ys[: len(self._corners)] @ target))]

    def _keep(self, corner: _Corner) -> None:
        if len(self._corners) < self._kept:
            self._ys[len(self._corners)] = corner.y
            self._corners.append(corner)

    def _first_corner(self) -> _Corner:
        """Find a corner that is optimal for some target, by the primal simplex method, for which any basis will do,
        since k has no sign."""
        from scipy.linalg import qr

        rank = self._rows.shape[1]
        basis = qr(self._rows.T, mode="r", pivoting=True)[1][:rank].astype(np.int64)
        factors = np.random.default_rng(0).uniform(0.5, 1.5, rank)  # generic: no factor becomes 0 by accident
        target = self._rows[basis].T @ factors
        for pivots in range(self._limit):
            if pivots % _REFRESH == 0:
                inverse = np.linalg.inv(self._rows[basis].T)
                factors = inverse @ target
            side = np.where(factors < 0, -1.0, 1.0)
            y = (side * self._costs[basis]) @ inverse
            prices = self._rows @ y
            excess = np.abs(prices) - self._costs
            excess[basis] = -1.0
            entering = int(np.argmax(excess))
            if excess[entering] <= _TOLERANCE:
                return _Corner(basis, side, y)
            direction = np.sign(prices[entering])
            column = inverse @ self._rows[entering]
            change = direction * column
            with np.errstate(divide="ignore", invalid="ignore"):
                distance = np.where(factors * change > 0, factors / change, np.inf)
            # The cost falls past a factor's change of sign until the slopes gained outweigh the excess.
            order = np.argsort(distance)
            slope = -excess[entering] + np.cumsum(2 * self._costs[basis[order]] * np.abs(change[order]))
            leaving = order[min(int(np.searchsorted(slope, 0.0)), rank - 1)]
            step = distance[leaving]
            if not np.isfinite(step):
                break
            factors = factors - step * change
            factors[leaving] = step * direction
            _exchange(inverse, column, leaving)
            basis[leaving] = entering
        return _Corner(basis, side, np.full(rank, np.nan))  # refused by the certificate: HiGHS takes over

    def _follow(self, start: _Corner, target: Floats) -> _Corner | None:
        """Follow edges on which b^T y grows from a corner to the optimal one; None when rounding is in the way."""
        basis, side = start.basis.copy(), start.side.copy()
        costs, rows = self._costs, self._rows
        for pivots in range(self._limit):
            if pivots % _REFRESH == 0:
                inverse: Floats = np.linalg.inv(rows[basis].T).astype(np.float64, copy=False)
                y = (side * costs[basis]) @ inverse
                prices, factors = rows @ y, inverse @ target
                lengths_sq = np.square(inverse).sum(axis=1)
            wrong = -side * factors  # > 0: the factor's sign is not that of the price
            score = np.where(wrong > _TOLERANCE, wrong * wrong / lengths_sq, 0.0)
            leaving = int(np.argmax(score))
            if score[leaving] == 0.0:
                return _Corner(basis, side, y)
            edge = -side[leaving] * inverse[leaving]
            slopes = rows @ edge
            with np.errstate(divide="ignore", invalid="ignore"):
                room = np.where(np.abs(slopes) > 1e-11, (np.copysign(costs, slopes) - prices) / slopes, np.inf)
            room[basis] = np.inf
            room[basis[leaving]] = 2 * costs[basis[leaving]]  # to the other side of its own constraint
            room = np.maximum(room, 0.0)
            nearest = np.flatnonzero(room <= room.min() + 1e-13)
            entering = int(nearest[np.argmax(np.abs(slopes[nearest]))])
            step = room[entering]
            y = y + step * edge
            prices = prices + step * slopes
            if entering == basis[leaving]:
                side[leaving] = -side[leaving]
                continue
            column = inverse @ rows[entering]
            if abs(column[leaving]) < 1e-12:
                return None
            factor = factors[leaving] / column[leaving]
            factors = factors - factor * column
            factors[leaving] = factor
            side[leaving] = np.sign(slopes[entering])
            lengths_sq = _exchange(inverse, column, leaving, lengths_sq)
            basis[leaving] = entering
        return None

    def _certified(self, corner: _Corner, factors: Floats, target: Floats) -> bool:
        """Say whether a solution is certified: k meets the equations, y is feasible, and their costs are equal."""
        left = np.abs(factors @ self._rows[corner.basis] - target).max(initial=0.0)
        beyond = (np.abs(self._rows @ corner.y) - self._costs).max(initial=0.0)
        primal, dual = float(np.abs(factors) @ self._costs[corner.basis]), float(target @ corner.y)
        return bool(left <= _CERTIFIED and beyond <= _CERTIFIED and primal - dual <= _CERTIFIED * max(1e-3, primal))


def _exchange(inverse: Floats, column: Floats, leaving: int, lengths_sq: Floats | None = None) -> Floats | None:
    """Update the basis' inverse in place after `column` (in coordinates of the basis) took the place of `leaving`,
    and the squared lengths of its rows."""
    row = inverse[leaving] / column[leaving]
    factor = column.copy()
    factor[leaving] -= 1.0
    if lengths_sq is not None:
        lengths_sq = lengths_sq - 2 * factor * (inverse @ row) + np.square(factor) * (row @ row)
        lengths_sq = np.maximum(lengths_sq, 1e-12)
    inverse -= factor[:, None] * row
    return lengths_sq
