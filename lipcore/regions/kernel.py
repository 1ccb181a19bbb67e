"""Inner products of Kronecker activation patterns without forming them: products over layers of counts of common bits.

s(x) = s_1(x) x ... x s_{d-1}(x) has prod(n_l) entries, but <s(x), s(y)> = prod_l <s_l(x), s_l(y)>. Where layers are
skipped (residual connections) or slopes are not 0 or 1 (leaky, abs), the gradient is multi-affine in the patterns: then
every layer's pattern gets one more entry that is always 1. A unit of abs has two entries, for slope 1 and for slope 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lipcore.regions.patterns import PackedGate, Patterns

PRIMES = (8388593, 8388587)  # the largest below 2^23
_FEW = 16  # distinct places in a pooling window up to which matrix products beat comparing entry by entry
_BLOCK_BYTES = 1 << 26


def kernel(a: Patterns, b: Patterns, *, affine: bool) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Compute the inner products <s(a_i), s(b_j)>, [N_a, N_b], in two forms: the logarithm, since a deep network's
    product overflows (-inf where it is zero); and the whole number itself modulo each prime, exact."""
    log = np.zeros((len(a), len(b)))
    whole = [np.ones((len(a), len(b))) for _ in PRIMES]
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        counts = _common(mine, theirs) + float(affine)
        with np.errstate(divide="ignore"):
            log += np.log(counts)
        whole = [modulo(product * counts, prime) for product, prime in zip(whole, PRIMES, strict=True)]
    return log, whole


def norms_modulo(a: Patterns, *, affine: bool) -> list[NDArray[np.float64]]:
    """Compute ||s(a_i)||^2 modulo each prime, [N]."""
    whole = [np.ones(len(a)) for _ in PRIMES]
    for own in _own_counts(a, affine):
        whole = [modulo(product * own, prime) for product, prime in zip(whole, PRIMES, strict=True)]
    return whole


def log_norms(a: Patterns, *, affine: bool) -> NDArray[np.float64]:
    """Compute log ||s(a_i)||, [N]."""
    out = np.zeros(len(a))
    with np.errstate(divide="ignore"):
        for own in _own_counts(a, affine):
            out += 0.5 * np.log(own)
    return out


def _own_counts(a: Patterns, affine: bool) -> Iterator[NDArray[np.float64]]:
    for gate in a.layers:
        own = np.full(len(a), gate.width) if gate.kind == "index" else _entries(gate).sum(axis=1)
        yield own + float(affine)


def _entries(gate: PackedGate) -> NDArray[Any]:
    """Return the entries in which the gradient is linear: not whether a unit is on the lower or the upper flat
    piece."""
    second = gate.second_bits() if gate.kind == "fold" else None
    return gate.bits() if second is None else np.concatenate([gate.bits(), second], axis=1)


def _common(a: PackedGate, b: PackedGate) -> NDArray[np.float64]:
    """Count the units that are active (or pick the same element) in both patterns, exactly."""
    mine = _entries(a)
    theirs = mine if a is b else _entries(b)
    if a.kind != "index":
        return _product(mine, theirs)
    out = np.zeros((len(mine), len(theirs)))
    if not out.size:
        return out
    width = max(1, _BLOCK_BYTES // (4 * (len(mine) + len(theirs))))
    for start in range(0, a.width, width):
        part = mine[:, start : start + width]
        out += _same(part, part if a is b else theirs[:, start : start + width])
    return out


def _product(mine: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.float64]:
    # A matrix product of zeros and ones is exact in float32 up to 2^24 units, and BLAS is quicker than popcounts; of
    # one matrix with itself it computes only half.
    left = mine.astype(np.float32)
    right = left if mine is theirs else theirs.astype(np.float32)
    return (left @ right.T).astype(np.float64)


def _same(mine: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.float64]:
    """Count the columns in which two rows have the same index, for all pairs of rows.

    Within a pooling window an index takes few values. Counted from the column's least they are the same few in all
    columns, and each is one product of zeros and ones.
    """
    least = np.minimum(mine.min(axis=0), theirs.min(axis=0))
    left = mine - least
    right = left if mine is theirs else theirs - least
    places = np.union1d(np.unique(left), np.unique(right))
    out = np.zeros((len(left), len(right)))
    if len(places) <= _FEW:
        for place in places:
            chosen = left == place
            out += _product(chosen, chosen if left is right else right == place)
        return out
    rows = max(1, _BLOCK_BYTES // max(1, right.size))
    for start in range(0, len(left), rows):
        out[start : start + rows] = (left[start : start + rows, None, :] == right[None]).sum(axis=2)
    return out


def modulo(values: NDArray[np.float64], prime: int) -> NDArray[np.float64]:
    """Reduce whole numbers below 2^53 to [0, prime), exactly; numpy's % takes ten times as long."""
    rest: NDArray[np.float64] = values - prime * np.floor(values / prime)
    rest[rest < 0] += prime  # the quotient was rounded up to the next whole number
    return rest
