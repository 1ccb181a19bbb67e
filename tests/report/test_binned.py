"""Few bins of many steps hide no point."""

from __future__ import annotations

import numpy as np
import pytest

from lipcore.report.binned import Binned
from lipcore.report.plots import drawn_columns


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize("block", [1, 64])
def test_bins_are_what_a_plain_loop_finds(steps: int, most: int, block: int) -> None:
    rng = np.random.default_rng(steps)
    values = rng.standard_normal((steps, 2))
    values[rng.random(values.shape) < 0.2] = np.nan
    values[steps // 2, 1] = np.inf
    first = 5
    binned = Binned(first, first + steps - 1, most)
    for begin in range(0, steps, block):
        part = values[begin : begin + block]
        binned.add(np.arange(first + begin, first + begin + len(part)), ["a", "b"], part)
    assert binned.bins <= most
    assert binned.ends[-1] == first + steps - 1
    for i in range(binned.bins):
        for column in range(2):
            own = values[i * binned.width : (i + 1) * binned.width, column]
            finite = own[np.isfinite(own)]
            assert binned.count[i, column] == len(finite)
            assert binned.lost[i, column] == len(own) - len(finite)
            if not len(finite):
                assert np.isnan([binned.low[i, column], binned.mean[i, column], binned.high[i, column]]).all()
                continue
            assert binned.low[i, column] == finite.min()
            assert binned.high[i, column] == finite.max()
            assert np.isclose(binned.mean[i, column], finite.mean())
            at = first + i * binned.width + int(np.nanargmax(np.where(np.isfinite(own), own, np.nan)))
            assert binned.at_high[i, column] == at
    lost = ~np.isfinite(values)
    assert binned.not_finite.tolist() == lost.sum(0).tolist()
    expected = [int(first + lost[:, c].argmax()) if lost[:, c].any() else -1 for c in range(2)]
    assert binned.first_not_finite.tolist() == expected


def test_places_that_come_later_have_columns_of_their_own() -> None:
    binned = Binned(1, 4, most=4)
    binned.add(np.array([1, 2]), ["a"], np.array([[1.0], [2.0]]), levels=["group"])
    binned.add(np.array([3, 4]), ["b", "a"], np.array([[5.0, 3.0], [6.0, 4.0]]), levels=["tensor", "group"])
    assert binned.places == ["a", "b"]
    assert binned.where("tensor") == [1]
    assert binned.high[:, 0].tolist() == [1, 2, 3, 4]
    assert np.isnan(binned.high[:2, 1]).all()
    assert binned.span(1) == (5.0, 5.5, 6.0)
    assert binned.step_of_greatest(0) == 4
    assert binned.first_and_last(0) == (1.0, 4.0)


def test_folded_steps_keep_their_extremes() -> None:
    binned = Binned(1, 128, most=1)
    three = (np.array([[number], [number + 1]]) for number in (5.0, 1.0, 9.0))
    binned.add(np.array([64, 128]), ["a"], *three)
    assert binned.span(0) == (1.0, 5.5, 10.0)


def test_steps_that_are_not_finite_are_a_gap_and_zeros_stay_on_a_logarithmic_axis() -> None:
    binned = Binned(1, 8, most=4)
    binned.add(np.arange(1, 9), ["a"], np.array([[1.0], [2], [np.nan], [np.inf], [0], [4], [5], [6]]))
    drawn = drawn_columns(binned, 0, positive=True)
    assert drawn["end"].tolist() == [2, 4, 6, 8]
    assert np.array_equal(drawn["mean"], [1.5, np.nan, 2, 5.5], equal_nan=True)
    assert np.array_equal(drawn["low"], [1, np.nan, 0, 5], equal_nan=True)
    assert np.array_equal(drawn["floor"], [1, np.nan, 1, 5], equal_nan=True)
    assert "floor" not in drawn_columns(binned, 0, positive=False)
