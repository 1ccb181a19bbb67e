"""Tables of which `make test` runs the first rows, and `make test-ci` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], count: int) -> list[Any]:
    """Return values as parameters of a test, all but the first `count` with the marker ci."""
    return [_late(value) if i >= count else value for i, value in enumerate(values)]


def spread(values: Iterable[Any], step: int) -> list[Any]:
    """Return values as parameters of a test, all but every `step`-th with the marker ci: for products, whose first rows
    are alike. Rows of several parameters are `pytest.param`s."""
    return [_late(value) if i % step else value for i, value in enumerate(values)]


def _late(value: Any) -> Any:
    row = value if hasattr(value, "marks") else pytest.param(value)
    return row._replace(marks=[*row.marks, pytest.mark.ci])
