"""Inner products of samples' gradients over all ranks against one process in float64: each situation is right to 1e-7,
or refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from dot_situations import situations
from rank_runs import Found, assert_right, run_situations

pytestmark = pytest.mark.ci
RIGHT = ("ddp", "fsdp2", "pipeline")
#: Why windows of all ranks have no such numbers.
LEFT_OUT = {
    "other_references": r"reference: rank 1 has multiplied its samples with other references than rank 0",
    "set_elsewhere": r"reference: rank 1 .* other references than rank 0, or has set them at another step",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    """What every rank has found; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "dot_situations", 2)


def test_every_situation_is_in_the_table() -> None:
    assert sorted(name for name, *_ in situations(2)) == sorted([*RIGHT, *LEFT_OUT, "set_alike_later"])


@pytest.mark.parametrize("name", RIGHT)
def test_right(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert_right(numbers)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert isinstance(numbers, dict), numbers
        assert re.search(LEFT_OUT[name], numbers["said"]), numbers["said"]


def test_windows_after_other_references_are_whole(found: Found) -> None:
    for numbers in found["set_alike_later"]:
        assert isinstance(numbers, dict), numbers
        assert numbers["whole"] == [False, False, True, True]
