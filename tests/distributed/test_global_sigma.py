"""Singular values of a first weight that ranks hold in parts, in windows of all ranks: those of the whole weight in one
process, or not known, with the reason."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from rank_runs import Found, run_situations
from sigma_situations import situations

pytestmark = pytest.mark.ci
#: How many numbers the ranks add up.
RIGHT = {"fsdp2": 21, "more_inputs": 320, "convolution": 90, "asked_for": 135_460}
ON_FOUR = {"hsdp": 21, "tensor_parallel_and_fsdp2": 21, "by_inputs_and_fsdp2": 48}
TENSOR_PARALLEL = {"tensor_parallel": 21, "tensor_parallel_by_inputs": 36}
UNKNOWN = {
    "images_of_other_shapes": r"ranks have samples of the shapes \[2, 5, 5\] and \[2, 5, 6\]",
    "too_many_inputs": r"W_1 \[600, 520\], and would add up 135,460 numbers.*\(1.08 MB; up to 1.05 MB.*\(sigma=True\)",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    of_two = run_situations(tmp_path_factory.mktemp("two"), "sigma_situations", 2)
    return of_two | run_situations(tmp_path_factory.mktemp("four"), "sigma_situations", 4)


def test_every_situation_is_in_the_table() -> None:
    names = [name for ranks in (2, 4) for name, *_ in situations(ranks)]
    assert sorted(names) == sorted([*RIGHT, *ON_FOUR, *TENSOR_PARALLEL, *UNKNOWN, "other_settings", "a_sequence"])


@pytest.mark.parametrize("name", [*RIGHT, *ON_FOUR, *TENSOR_PARALLEL])
def test_those_of_the_whole_weight(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert isinstance(numbers, dict), numbers
        assert len(numbers["found"]) == 2
        for one, whole in zip(numbers["found"], numbers["expected"], strict=True):
            assert one["largest"] == one["upper"] == pytest.approx(whole["largest"], rel=1e-7)
            if whole["smallest"] is not None:
                assert one["smallest"] == pytest.approx(whole["smallest"], rel=1e-7)
        count = (RIGHT | ON_FOUR | TENSOR_PARALLEL)[name]
        assert f"ranks add up {count:,} numbers" in numbers["plan"][0]


@pytest.mark.parametrize("name", [*RIGHT, "hsdp"])
def test_corollary_1(found: Found, name: str) -> None:
    """The bound that sigma_1 is for, heuristic: W_1 moves, and may not be all that stands on the input."""
    for numbers in found[name]:
        bound, product, label, note = numbers["bound"]
        assert math.isfinite(bound)
        assert bound == pytest.approx(product, rel=1e-7)
        assert label == "heuristic"
        assert "nothing has shown that the output depends on the model's input by way of W_1 alone" in note


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_tensor_parallelism_has_nothing_else(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert "(tensor parallel), of which a rank has a part" in numbers["off"]
        assert math.isnan(numbers["bound"][0])


@pytest.mark.parametrize("name", UNKNOWN)
def test_not_known_with_the_reason(found: Found, name: str) -> None:
    for numbers in found[name]:
        for one in numbers["found"]:
            assert math.isnan(one["largest"])
            assert re.search(UNKNOWN[name], one["rule"]), one["rule"]


def test_other_settings(found: Found) -> None:
    for error in found["other_settings"]:
        assert "sigma is False on rank 0 and True on rank 1" in error


def test_places_are_those_of_one_process(found: Found) -> None:
    assert found["a_sequence"] == [{"place": ["model:Linear"], "layer": "Linear"}] * 2
