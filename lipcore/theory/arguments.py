"""Checks of the numbers that functions of lipcore.theory take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def positive(name: str, value: Any) -> float:
    """Return a finite number above 0, or raise a ValueError that names the argument."""
    number = real(name, value, "a positive number")
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return number


def real(name: str, value: Any, expected: str = "a number") -> float:
    """Return as a float what is one number, or raise a ValueError that names the argument."""
    single = isinstance(value, Tensor) and value.numel() == 1
    if isinstance(value, (bool, str)) or not (single or hasattr(value, "__float__")):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected {expected}, got {_what(value)}") from None


def per_step(name: str, values: Any, steps: int, of: str, hint: str = "", *, zero: bool = False) -> list[float]:
    """Return one finite number above 0 (or 0, with zero=True) for each of the steps, or raise a ValueError that
    names the argument and the step."""
    expected = f"{name}: expected one value for each of {of}'s {steps} steps"
    if isinstance(values, (str, bytes, dict)) or not (isinstance(values, Sequence) or hasattr(values, "__len__")):
        raise ValueError(f"{expected}, got {values!r}; pass a sequence or a tensor [{steps}]")
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{expected}, got {_what(values)}; pass a sequence or a tensor [{steps}]")
    numbers = [real(f"{name}[{i}]", value) for i, value in enumerate(values)]
    if len(numbers) != steps:
        raise ValueError(f"{expected}, got {len(numbers)}")
    bad = [
        i for i, number in enumerate(numbers) if not ((number > 0 or (zero and not number)) and math.isfinite(number))
    ]
    if bad:
        raise ValueError(
            f"{name}: expected positive numbers, got {numbers[bad[0]]} at step {bad[0]} of {of}{hint and f' ({hint})'}"
        )
    return numbers


def _what(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"shape {list(shape)}"
