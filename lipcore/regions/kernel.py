"""Inner products of Kronecker activation patterns without forming them: products over layers of counts of common bits.

s(x) = s_1(x) x ... x s_{d-1}(x) has prod(n_l) entries, but <s(x), s(y)> = prod_l <s_l(x), s_l(y)>. Where layers are
skipped (residual connections) or slopes are not 0 or 1 (leaky), the gradient is multi-affine in the patterns: then
every layer's pattern gets one more entry that is always 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lipcore.regions.patterns import PackedGate, Patterns


def log_kernel(a: Patterns, b: Patterns, *, affine: bool) -> NDArray[np.float64]:
    """log <s(a_i), s(b_j)>, [N_a, N_b]; -inf where it is zero. Logarithms: a deep network's product overflows."""
    out = np.zeros((len(a), len(b)))
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        counts = _common(mine, theirs) + float(affine)
        with np.errstate(divide="ignore"):
            out += np.log(counts)
    return out


def log_norms(a: Patterns, *, affine: bool) -> NDArray[np.float64]:
    """log ||s(a_i)||, [N]."""
    out = np.zeros(len(a))
    for gate in a.layers:
        own = np.full(len(a), gate.width) if gate.kind == "index" else gate.bits().sum(axis=1)
        with np.errstate(divide="ignore"):
            out += 0.5 * np.log(own + float(affine))
    return out


def _common(a: PackedGate, b: PackedGate) -> NDArray[np.float64]:
    """How many units are active (or pick the same element) in both, exact."""
    if a.kind != "index":
        # A matrix product of zeros and ones is exact in float32 up to 2^24 units, and BLAS is quicker than popcounts.
        product: NDArray[np.float32] = a.bits().astype(np.float32) @ b.bits().astype(np.float32).T
        return product.astype(np.float64)
    mine, theirs = a.bits(), b.bits()
    rows = max(1, (1 << 24) // max(1, theirs.size))
    blocks = [
        (mine[i : i + rows, None, :] == theirs[None]).sum(axis=2, dtype=np.int64) for i in range(0, len(mine), rows)
    ]
    return np.concatenate(blocks).astype(np.float64)
