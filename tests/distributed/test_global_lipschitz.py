"""Local Lipschitz constants at the samples of all ranks against one process in float64: each situation is right to
1e-7, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from lipschitz_situations import situations
from rank_runs import Found, assert_right, run_situations

pytestmark = pytest.mark.ci
RIGHT = ("ddp", "unequal_batches", "fsdp2")
RIGHT_ON_FOUR = ("hsdp", "subgroups", "group_of_some")
#: What window.off says on both ranks, while other metrics are merged.
LEFT_OUT = {
    "pipeline": r"stages of a pipeline\), and the constant of a stage is not that of the model",
    "tensor_parallel": r"\(tensor parallel\), of which a rank has a part",
    "other_settings": r"quantity is 'scalar' on rank 0 and 'residual' on rank 1",
}
REFUSED = {"independent": r"ValueError: parameter 'a.weight' has other values on rank 1 than on rank 0"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    of_two = run_situations(tmp_path_factory.mktemp("two"), "lipschitz_situations", 2)
    return of_two | run_situations(tmp_path_factory.mktemp("four"), "lipschitz_situations", 4)


def test_every_situation_is_in_the_table() -> None:
    assert sorted(name for name, *_ in situations(2)) == sorted([*RIGHT, *LEFT_OUT, *REFUSED])
    assert sorted(name for name, *_ in situations(4)) == sorted(RIGHT_ON_FOUR)


@pytest.mark.parametrize("name", [*RIGHT, *RIGHT_ON_FOUR])
def test_right(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert_right(numbers)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert isinstance(numbers, dict), numbers
        assert re.search(LEFT_OUT[name], numbers["said"]), numbers["said"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(found: Found, name: str) -> None:
    for error in found[name]:
        assert isinstance(error, str), error
        assert re.search(REFUSED[name], error), error
