"""min sum_i c_i |k_i| subject to A k = b, for many b and few rows: column generation around scipy's HiGHS."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FIRST, _MORE = 100, 200  # columns that resemble the target, and of the most violated ones per round
_TOLERANCE = 1e-9


class LeastCost:
    """The programmes of one training set. Thousands of columns are offered and about as many as rows are used, so the
    solver is given those that span the space and those that resemble b, then what its dual prices ask for."""

    def __init__(self, columns: NDArray[np.float64], costs: NDArray[np.float64]) -> None:
        self._columns, self._costs = columns, costs
        self._basis: NDArray[np.int64] | None = None

    def least(self, target: NDArray[np.float64], likeness: NDArray[np.float64]) -> NDArray[np.float64]:
        """The minimiser; `likeness` orders the columns, the most similar to the target last.

        Raises:
            ModuleNotFoundError: scipy is not installed.
            RuntimeError: HiGHS gave up.
        """
        try:
            from scipy.linalg import qr
            from scipy.optimize import linprog
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "Coverage solves linear programmes with scipy, which is not installed; run: pip install "
                "'lipcore[theory]', or query(x, solve=False) for the status alone"
            ) from None
        count = len(self._costs)
        if self._basis is None:
            pivots = qr(self._columns, mode="r", pivoting=True)[1]
            self._basis = pivots[: len(self._columns)].astype(np.int64)
        offered = np.union1d(self._basis, np.argsort(likeness)[-_FIRST:])
        while True:
            a, c = self._columns[:, offered], self._costs[offered]
            both = np.hstack([a, -a])
            found = linprog(np.concatenate([c, c]), A_eq=both, b_eq=target, bounds=(0, None), method="highs")
            if found.status != 0:
                raise RuntimeError(
                    f"the linear programme of Theorem 2 ({a.shape[0]} rows, {2 * a.shape[1]} columns) was not solved: "
                    f"{found.message}"
                )
            violation = np.abs(found.eqlin.marginals @ self._columns) - self._costs
            violation[offered] = 0.0
            asked = np.flatnonzero(violation > _TOLERANCE * max(1.0, float(self._costs.max())))
            if not len(asked):
                k = np.zeros(count)
                k[offered] = found.x[: len(offered)] - found.x[len(offered) :]
                return k
            offered = np.union1d(offered, asked[np.argsort(violation[asked])[-_MORE:]])
