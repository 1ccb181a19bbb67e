"""What numbers made from sketches are worth: the spread of the slices of a group's buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lipcore.metric.columns import Numbers
from lipcore.trajectory.table import COLUMN, M2

Row = Sequence[float]


def relative_errors(pieces: Numbers, groups: Numbers, split: int, row_group: Sequence[int]) -> dict[str, Numbers]:
    """Return the standard error over the value of each quantity, for every group and the total.

    Args:
        pieces: rows of the ledger, `split` for every sketch.
        groups: rows of the groups.
        row_group: to which of the groups each sketch belongs.
    """
    rows = groups.tolist()
    by_group: list[list[list[Row]]] = [[] for _ in rows]
    for i, group in enumerate(row_group):
        by_group[group].append(pieces[i * split : (i + 1) * split].tolist())
    errors = [_of_several(sketches) for sketches in by_group]
    errors.append(_of_total(rows, errors))
    return {quantity: np.array([error[quantity] for error in errors]) for quantity in errors[-1]}


def _of_several(sketches: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Return the error of a group that has several sketches, which are independent."""
    errors = [_of_group(sketch) for sketch in sketches]
    if len(errors) == 1:
        return errors[0]
    added = [[math.fsum(piece[i] ** (1 if i == M2 else 2) for piece in sketch) for i in range(len(sketch[0]))]
             for sketch in sketches]  # fmt: skip
    rows: list[Row] = [[one if i == M2 else math.sqrt(one) for i, one in enumerate(row)] for row in added]
    return _of_total(rows, errors)


def _of_group(pieces: Sequence[Row]) -> dict[str, float]:
    split = len(pieces)

    def spread(column: str, power: int) -> float:
        """Return the relative error of the sum, over the slices of a sketch, of a column's values to this power."""
        squares = [piece[COLUMN[column]] ** power for piece in pieces]
        mean = sum(squares) / split
        if not mean > 0:
            return 0.0
        variance = sum((square - mean) ** 2 for square in squares) / (split - 1)
        return math.sqrt(variance / split) / mean

    path = spread("path", 1)
    return {
        "update_norm": path,
        "update_ratio": path,
        "path_length": path,
        "distance": spread("distance", 2) / 2,
        "variance": spread("m2", 1),
    }


def _of_total(groups: list[Row], errors: list[dict[str, float]]) -> dict[str, float]:
    """Return the error of the total: the groups' errors are independent."""

    def combined(quantity: str, column: str, power: int) -> float:
        whole = sum(row[COLUMN[column]] ** power for row in groups)
        if not whole > 0:
            return 0.0
        shares = (row[COLUMN[column]] ** power / whole for row in groups)
        weighted = (share * error[quantity] for share, error in zip(shares, errors, strict=True))
        return math.sqrt(sum(error**2 for error in weighted))

    path = combined("path_length", "path", 2)  # of the squares, in which groups add up
    return {
        "update_norm": path,
        "update_ratio": path,
        "path_length": path,
        "distance": combined("distance", "distance", 2),
        "variance": combined("variance", "m2", 1),
    }
