"""The noise scale of several ranks, whenever their gradients are reduced and by whichever rule: right to 1e-7 against
one process in float64 that takes every sample by itself, or left out by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rank_runs import Found, assert_right, run_situations
from reduction_situations import situations

pytestmark = pytest.mark.ci
#: Right, to this error.
RIGHT = {
    2: {"at_once_reduced": 1e-7, "at_once_synced": 1e-7, "kept_gathered": 1e-7, "kept_by_backward": 1e-7,
        "in_another_dtype": 1e-4},
    4: {"within_replicas": 1e-7, "cut_again": 1e-7},
}  # fmt: skip
_WAIT = r"fully_shard\(\) had not reduced all of its gradients yet when .* set these to True before"
_THERE = r"gradients were there already when its first backward pass began"
_RULE = r"the {0} was given a rule of its own by which gradients are reduced \(a communication hook, another divisor\)"
#: Per window, how many of its four steps are left out, and why.
LEFT_OUT = {
    "never_synced": [{_WAIT: 2}, {_THERE: 1}],
    "half_synced": [{_WAIT: 4}],
    "not_emptied": [{_THERE: 2}],
    "late_hook": [{}, {_RULE.format("DistributedDataParallel"): 3}],
    "late_divisor": [{}, {_RULE.format(r"fully_shard\(\)ed model"): 1}],
}


#: Norms are right; of the noise scale this is said.
WITHOUT_NOISE = {
    2: {"hook_on_one_rank": "on rank 1: " + _RULE.format("DistributedDataParallel")},
    4: {"stages_of_replicas": r"ranks hold other layers \(stages of a pipeline\)"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[int, Found]:
    """What every rank has found, by number of ranks."""
    return {ranks: run_situations(tmp_path_factory.mktemp("ranks"), "reduction_situations", ranks) for ranks in (2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_situation_is_in_the_table(ranks: int) -> None:
    names = [name for name, *_ in situations(ranks)]
    assert sorted(names) == sorted(
        [*RIGHT[ranks], *WITHOUT_NOISE[ranks], *((*LEFT_OUT, "old_gradients") if ranks == 2 else ())]
    )


@pytest.mark.parametrize(
    ("ranks", "name"), [pytest.param(ranks, name, id=name) for ranks, names in RIGHT.items() for name in names]
)
def test_right(runs: dict[int, Found], ranks: int, name: str) -> None:
    for numbers in runs[ranks][name]:
        assert_right(numbers, error=RIGHT[ranks][name])
        assert all(not details.get("noise_scale_skipped") for details in numbers["details"])


@pytest.mark.parametrize("name", LEFT_OUT)
def test_steps_are_left_out_by_name(runs: dict[int, Found], name: str) -> None:
    for numbers in runs[2][name]:
        assert isinstance(numbers, dict), numbers
        for reasons, said, count in zip(LEFT_OUT[name], numbers["said"], numbers["counts"], strict=True):
            assert list(said.values()) == list(reasons.values()), said
            assert all(re.search(pattern, why) for pattern, why in zip(reasons, said, strict=True)), said
            assert count == 4 - sum(reasons.values())
        assert all(numbers["norms"])


@pytest.mark.parametrize(
    ("ranks", "name"), [pytest.param(ranks, name, id=name) for ranks, names in WITHOUT_NOISE.items() for name in names]
)
def test_norms_without_a_noise_scale(runs: dict[int, Found], ranks: int, name: str) -> None:
    for numbers in runs[ranks][name]:
        assert_right(numbers)
        assert re.search(WITHOUT_NOISE[ranks][name], numbers["said"]), numbers["said"]


def test_an_old_gradient_of_a_model_that_is_sharded_as_one_is_no_new_one(runs: dict[int, Found]) -> None:
    for errors in runs[2]["old_gradients"]:
        assert len(errors) == 6, errors
        assert max(errors.values()) < 1e-12
