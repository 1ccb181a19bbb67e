"""Proofs that ranks run together beside other ways to wrap a model: right, or told by name on all ranks alike; the
training goes on bit for bit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prove_ways import WAYS, situations
from rank_runs import Found, run_situations

pytestmark = pytest.mark.ci
_STATIC = r"the first pass of DistributedDataParallel\(static_graph=True\) allows no other backward pass"
_TOLD = "^$|^rank 0: .+; rank 1: .+$"  # the same on both ranks, as is asserted for all
#: The answers of a proof before the first step and of one after others, and those of proofs two steps later.
ANSWERS = {
    "hsdp_at_0": ("", ""),
    "hsdp_at_2": ("", ""),
    "late_hsdp_at_2": ("", ""),
    "static_graph_at_0": (f"rank 0: {_STATIC}; rank 1: {_STATIC}", ""),
    "static_graph_at_2": ("", ""),
    "compiled_ddp_at_0": (_TOLD, _TOLD),
    "compiled_fsdp2_at_0": ("", ""),
    "tensor_parallel_at_0": ("", ""),
    "tensor_parallel_at_2": ("", ""),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    """What every rank has found, of 2 and of 4."""
    of_two = run_situations(tmp_path_factory.mktemp("two"), "prove_ways", 2)
    return of_two | run_situations(tmp_path_factory.mktemp("four"), "prove_ways", 4)


def test_every_situation_is_in_the_table() -> None:
    names = [name for ranks in (2, 4) for name, *_ in situations(ranks)]
    assert sorted(names) == sorted(ANSWERS)
    assert {name.rpartition("_at_")[0] for name in names} == set(WAYS)


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_said_and_that_the_training_goes_on(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert isinstance(numbers, dict), numbers
        assert numbers["weights"]
        for answer, words in zip(numbers["answers"], ANSWERS[name], strict=True):
            assert re.search(words, answer, re.DOTALL) if words else not answer
        assert numbers["answers"] == found[name][0]["answers"]


@pytest.mark.parametrize(
    "name", ["hsdp_at_0", "hsdp_at_2", "late_hsdp_at_2", "static_graph_at_2", "tensor_parallel_at_2"]
)
def test_windows_after_a_proof_are_exact(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert numbers["labels"][1] == "exact"
