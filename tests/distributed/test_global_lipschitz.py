"""Local Lipschitz constants at the samples of all ranks against one process in float64: each situation is right to
1e-7, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from lipschitz_situations import situations
from rank_runs import Found, assert_right, run_situations

pytestmark = pytest.mark.ci
RIGHT = (
    "ddp",
    "unequal_batches",
    "fsdp2",
    "fsdp2_proved",
    "fsdp2_unequal",
    "fsdp2_chain",
    "tensor_parallel_behind_first",
)
RIGHT_ON_FOUR = ("hsdp", "hsdp_proved", "subgroups", "group_of_some")
#: What window.off says on both ranks, while other metrics are merged.
LEFT_OUT = {
    "pipeline": r"stages of a pipeline\), and the constant of a stage is not that of the model",
    "tensor_parallel": r"\(tensor parallel\), of which a rank has a part",
    "context_parallel": r"exchanges activations with other ranks",
    "context_parallel_text": r"exchanges activations with other ranks",
    "sequence_parallel": r"\(tensor parallel\), of which a rank has a part",
    "expert_parallel": r"exchanges activations with other ranks",
    "other_settings": r"quantity is 'scalar' on rank 0 and 'residual' on rank 1",
}
#: What results or proofs say of lambda, while r is there.
SAID = {
    "fsdp2_past": r"more ways than W_1 x \+ b_1 of the first layer .* call lipcore.local_lipschitz on a copy",
    "fsdp2_mixing": r"rank 0: the output of a sample depends on other samples of the batch; rank 1: ",
    "fsdp2_penalty": r"depends on the input past model",
    "fsdp2_on_one_rank": r"^no metric$|^not compared .* every rank needs this metric",
    "fsdp2_output_in_another_dtype": r"is not there as a whole when the gradient comes .*output_dtype=",
}
REFUSED = {"independent": r"ValueError: parameter 'a.weight' has other values on rank 1 than on rank 0"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    of_two = run_situations(tmp_path_factory.mktemp("two"), "lipschitz_situations", 2)
    return of_two | run_situations(tmp_path_factory.mktemp("four"), "lipschitz_situations", 4)


def test_every_situation_is_in_the_table() -> None:
    assert sorted(name for name, *_ in situations(2)) == sorted([*RIGHT, *LEFT_OUT, *SAID, *REFUSED])
    assert sorted(name for name, *_ in situations(4)) == sorted(RIGHT_ON_FOUR)


@pytest.mark.parametrize("name", [*RIGHT, *RIGHT_ON_FOUR])
def test_right(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert_right(numbers)


@pytest.mark.parametrize("name", [*LEFT_OUT, *SAID])
def test_left_out(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert isinstance(numbers, dict), numbers
        assert re.search((LEFT_OUT | SAID)[name], numbers["said"]), numbers["said"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(found: Found, name: str) -> None:
    for error in found[name]:
        assert isinstance(error, str), error
        assert re.search(REFUSED[name], error), error
