"""Membership in a span of Kronecker patterns: against exact arithmetic, and where floating point cannot see it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from lipcore.regions.bounds import Bounds
from lipcore.regions.kernel import kernel, norms_modulo
from lipcore.regions.patterns import PackedGate, Patterns
from lipcore.regions.span import Span


def packed(*layers: np.ndarray) -> Patterns:
    return Patterns(
        tuple(PackedGate(str(i), "step", bits.shape[1], np.packbits(bits, axis=1)) for i, bits in enumerate(layers))
    )


def membership(known: Patterns, queried: Patterns, *, affine: bool = False) -> tuple[Span, np.ndarray]:
    span = Span(kernel(known, known, affine=affine)[1], np.arange(len(known)))
    return span, span.contains(kernel(queried, known, affine=affine)[1], norms_modulo(queried, affine=affine))


def rank(rows: list[list[int]]) -> int:
    matrix, found = [[Fraction(v) for v in row] for row in rows], 0
    for column in range(len(matrix[0])):
        pivot = next((i for i in range(found, len(matrix)) if matrix[i][column]), None)
        if pivot is None:
            continue
        matrix[found], matrix[pivot] = matrix[pivot], matrix[found]
        for i in range(found + 1, len(matrix)):
            factor = matrix[i][column] / matrix[found][column]
            matrix[i] = [a - factor * b for a, b in zip(matrix[i], matrix[found], strict=True)]
        found += 1
    return found


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_members_are_those_of_exact_elimination(seed: int, affine: bool) -> None:
    random = np.random.default_rng(seed)
    layers = [random.integers(0, 2, (30, width)).astype(np.uint8) for width in (3, 4)]
    a, b = (np.hstack([bits, np.ones((30, 1), np.uint8)]) if affine else bits for bits in layers)
    full = (a[:, :, None] * b[:, None, :]).reshape(30, -1).astype(int).tolist()
    known, base = np.arange(9), rank(full[:9])
    everything = packed(*layers)
    span, members = membership(everything.take(known), everything, affine=affine)
    truth = [rank([*full[:9], row]) == base for row in full]
    assert span.members.all()
    assert members.tolist() == truth
    assert 9 <= sum(truth) < 30


def test_more_patterns_than_a_panel_of_the_elimination() -> None:
    """150 independent patterns: sums of two that do not overlap are in their span, with one more unit they are not."""
    bits = np.zeros((150, 320), np.uint8)
    bits[np.arange(150), np.arange(150)] = 1
    bits[np.arange(150), 160 + np.arange(150)] = 1
    sums = bits[:-1] | bits[1:]
    broken = sums.copy()
    broken[:, 319] = 1
    assert membership(packed(bits), packed(sums))[1].all()
    assert not membership(packed(bits), packed(broken))[1].any()


def test_a_pattern_outside_by_a_single_entry_of_a_billion() -> None:
    """(1 - e) x (1 - e) x (1 - e) needs all eight products of 1 and e, of which one is not there."""
    width = 1000
    ones, first = np.ones(width, np.uint8), np.zeros(width, np.uint8)
    first[0] = 1
    factors = list(itertools.product([ones, first], repeat=3))
    training = packed(*(np.stack(layer) for layer in zip(*factors, strict=True)))
    query = packed(*[(ones - first)[None]] * 3)
    for count, status in ((8, "combination"), (7, "uncovered")):
        bounds = Bounds(training.take(np.arange(count)), np.ones(count), np.nan, affine=False)
        assert bounds.rank == count
        found = bounds.of(query, solve=False, advance=lambda: None)
        assert found[0].tolist() == [status]


@pytest.mark.parametrize("depth", [3, 900])
def test_lengths_that_overflow(depth: int) -> None:
    """The same bounds at any depth: layers in which all units are on change nothing but the length."""
    pytest.importorskip("scipy")
    bits = np.array([[1, 1, 0], [0, 1, 1], [0, 1, 0]], np.uint8)
    more = [np.ones((3, 10), np.uint8)] * (depth - 1)
    bounds = Bounds(packed(bits, *more), np.array([1.0, 2.0, 3.0]), 0.0, affine=False)
    query = packed(np.ones((1, 3), np.uint8), *(layer[:1] for layer in more))
    status, k, bound, relaxed, nearest = bounds.of(query, solve=True, advance=lambda: None)
    assert (status.tolist(), k.tolist(), bound.tolist()) == (["combination"], [3], [pytest.approx(6.0)])
    assert relaxed <= 6.0 * (1 + 1e-9)
    assert np.isfinite(nearest).all() == (depth == 3)


def test_lengths_beyond_all_scales_are_refused() -> None:
    layers = [np.array([[1] * 10, [1] + [0] * 9], np.uint8)] * 600
    with pytest.raises(ValueError, match=r"differ by a factor of 10\^300, more than double precision holds"):
        Bounds(packed(*layers), np.ones(2), np.nan, affine=False)
