"""Tables of which `make test` runs the first rows, and `make test-ci` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], count: int) -> list[Any]:
    """Return values as parameters of a test, all but the first `count` with the marker ci."""
    return [pytest.param(value, marks=[pytest.mark.ci] if i >= count else []) for i, value in enumerate(values)]
