"""Modes without state for each parameter, of parameters in parts, against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
from mode_situations import situations
from rank_runs import Found, assert_right, run_situations

pytestmark = pytest.mark.ci
NAMES = [name for name, *_ in situations(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    return run_situations(tmp_path_factory.mktemp("two"), "mode_situations", 2)


@pytest.mark.parametrize("name", NAMES)
def test_right(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert_right(numbers)
