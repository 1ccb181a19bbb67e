"""Quantiles of Student's t without scipy."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=128)  # a window of every so many steps asks for the same one
def t_quantile(confidence: float, freedom: int) -> float:
    """Return the t for which |T| <= t has probability `confidence`, T with a whole number of degrees of freedom >= 1.

    By bisection in theta = arctan(t / sqrt(freedom)), to 1e-12 of t below confidence 0.9999.

    >>> round(t_quantile(0.95, 10), 6)
    2.228139
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _probability(theta: float, freedom: int) -> float:
    """Return P(|T| <= sqrt(freedom) tan(theta)): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    cosine, odd = math.cos(theta), freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
