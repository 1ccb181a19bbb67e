"""Per-sample norms and the noise scale of all ranks against one process in float64 that takes every sample by itself:
each situation is right to 1e-7, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rank_runs import Found, assert_right, run_situations
from sample_situations import situations

pytestmark = pytest.mark.ci
RIGHT = {
    2: (
        *("ddp", "summed_loss", "unequal_batches", "one_sample_each", "empty_rank", "empty_step"),
        "accumulated",
        *("fsdp2", "fsdp2_unequal", "independent_for_themselves", "pipeline"),
        *("every_second_step", "late_call", "loaded_within"),
    ),
    4: ("hsdp", "subgroups"),
}
#: Norms are right; of the noise scale this is said.
WITHOUT_NOISE = {
    2: {
        "reduced_by_hand": r"other gradients of parameters that they hold alike when the backward pass is over",
        "module_inside": r"no DistributedDataParallel and not fully_shard\(\)ed here, .* pass the wrapped module",
        "communication_hook": r"the DistributedDataParallel was given a rule of its own by which gradients are reduced",
        "other_divisor": r"the fully_shard\(\)ed model was given a rule of its own by which gradients are reduced",
    },
    4: {
        "group_of_some": r"the mean over ranks 0, 1, 2, 3, and the window is that of ranks (0, 1|2, 3); pass .* group="
    },
}
#: Norms that a rank cannot know: the other ranks' windows say so.
LEFT_OUT = {
    "context_parallel": r"exchanges activations with other ranks \(tensor, sequence, context or expert parallelism\)",
    "context_parallel_sharded": r"exchanges activations with other ranks",
    "context_parallel_sharded_asked": r"exchanges activations with other ranks",
    "sequence_parallel": r"module 'norm' \(LayerNorm\): its input lies on its ranks as S\(1\), and not whole",
    "expert_parallel": r"exchanges activations with other ranks \(tensor, sequence, context or expert parallelism\)",
}
OTHERS = {"scores_by_id", "taken_back", "left_over", "counted"}
#: What the error says, on both ranks.
REFUSED = {
    "independent": r"ValueError: parameter 'a.weight' has other values on rank 1 than on rank 0, .* group=",
    # The rank that notices first speaks for both, and names itself first.
    "joined": r"RuntimeError: .* at different places: "
    r"(?=.*rank 0 is at step 8, .* 5 to 8)(?=.*rank 1 is at step 4, .* 1 to 4)",
}


def named(table: Any) -> list[Any]:
    return [pytest.param(ranks, name, id=name) for ranks, names in table.items() for name in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[int, Found]:
    """What every rank has found, by number of ranks."""
    return {}


def found_of(runs: dict[int, Found], ranks: int, name: str, tmp_path_factory: Any) -> list[Any]:
    if ranks not in runs:
        runs[ranks] = run_situations(tmp_path_factory.mktemp("ranks"), "sample_situations", ranks)
    return runs[ranks][name]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_situation_is_in_the_table(ranks: int) -> None:
    names = [name for name, *_ in situations(ranks)]
    of_two = [*REFUSED, *LEFT_OUT, *OTHERS] if ranks == 2 else []
    assert sorted(names) == sorted([*RIGHT[ranks], *WITHOUT_NOISE[ranks], *of_two])


@pytest.mark.parametrize(("ranks", "name"), named(RIGHT))
def test_right(runs: dict[int, Found], ranks: int, name: str, tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, ranks, name, tmp_path_factory):
        assert_right(numbers, "rank" if "themselves" in name else "global")
        assert all(not details.get("noise_scale_skipped") for details in numbers["details"])


@pytest.mark.parametrize(("ranks", "name"), named(WITHOUT_NOISE))
def test_norms_without_a_noise_scale(runs: dict[int, Found], ranks: int, name: str, tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, ranks, name, tmp_path_factory):
        assert isinstance(numbers, dict), numbers
        assert re.search(WITHOUT_NOISE[ranks][name], numbers["said"]), numbers["said"]
        assert numbers.get("error", 0.0) <= 1e-7
        assert not numbers.get("absent")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(runs: dict[int, Found], name: str, tmp_path_factory: Any) -> None:
    for error in found_of(runs, 2, name, tmp_path_factory):
        assert isinstance(error, str), error
        assert re.search(REFUSED[name], error), error


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(runs: dict[int, Found], name: str, tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, 2, name, tmp_path_factory):
        assert isinstance(numbers, dict), numbers
        assert re.search(LEFT_OUT[name], numbers["said"]), numbers["said"]


def test_scores_of_all_ranks(runs: dict[int, Found], tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, 2, "scores_by_id", tmp_path_factory):
        assert isinstance(numbers, dict), numbers
        assert numbers["error"] <= 1e-7


def test_all_ranks_take_back_what_one_takes_back(runs: dict[int, Found], tmp_path_factory: Any) -> None:
    for numbers in found_of(runs, 2, "taken_back", tmp_path_factory):
        assert isinstance(numbers, dict), numbers
        assert "a later proof failed: a test" in numbers["off"]
        assert "a later proof failed: a test" in numbers["first"]
        assert numbers["nan"]


def test_a_step_that_is_wrong_on_one_rank_is_left_out_on_all(runs: dict[int, Found], tmp_path_factory: Any) -> None:
    first, second = found_of(runs, 2, "left_over", tmp_path_factory)
    assert isinstance(first, dict), first
    assert "gradients were there already" in first["said"]
    assert first == second


def test_collectives(runs: dict[int, Found], tmp_path_factory: Any) -> None:
    for counts in found_of(runs, 2, "counted", tmp_path_factory):
        assert isinstance(counts, dict), counts
        assert counts["training"] == counts["plain"]
        assert counts["first"] == 2  # maxima, sums
        assert counts["second"] == 2
