"""Per-sample norms and the noise scale of ranks that hold parts of the parameters (tensor parallelism) against one
process in float64: each situation is right to 1e-7, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from parts_situations import situations
from rank_runs import Found, assert_right, run_situations

pytestmark = pytest.mark.ci
RIGHT = {
    2: (
        *("tensor_parallel", "vocabulary", "tied", "logits_in_parts", "checkpointed", "every_second_step"),
        *("late_call", "loaded_within", "own_types", "own_types_fsdp2"),
    ),
    4: ("with_fsdp2", "with_fsdp2_unequal", "four_parts"),
}
OTHERS = {
    2: (
        *("proved", "late", "last_pass", "counted", "taken_back", "heads", "heads_left_out", "sequences", "refused"),
        *("bias_whole", "bias_cut", "empty_batch"),
    ),
    4: ("scores_alone",),
}
#: Why the metric is left out of windows, or what is raised, on all ranks.
REFUSED = {
    2: {
        "other_samples": r"ranks 0, 1 hold parts of the parameters .* and have recorded other samples",
    },
    4: {
        "with_ddp": r"module 'a' \(Linear\): its input|its parameters are plain tensors .* use fully_shard\(\)",
        "part_of_the_group": r"'a.weight': the ranks hold 24 of its 48 elements .* pass as group= all ranks that hold",
    },
}
OF_PARTS = r"^ValueError: {0}: the model's parameters lie in parts on several ranks \(tensor parallelism\)"


def named(table: Any) -> list[Any]:
    return [pytest.param(ranks, name, id=name) for ranks, names in table.items() for name in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[int, Found]:
    """What every rank has found, by number of ranks."""
    return {ranks: run_situations(tmp_path_factory.mktemp("ranks"), "parts_situations", ranks) for ranks in (2, 4)}


def dicts(found: Any) -> Any:
    """What the ranks have found, none of which has raised."""
    for numbers in found:
        assert isinstance(numbers, dict), numbers
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_situation_is_in_the_table(ranks: int) -> None:
    names = [name for name, *_ in situations(ranks)]
    assert sorted(names) == sorted([*RIGHT[ranks], *OTHERS[ranks], *REFUSED[ranks]])


@pytest.mark.parametrize(("ranks", "name"), named(RIGHT))
def test_right(runs: dict[int, Found], ranks: int, name: str) -> None:
    assert len(runs[ranks][name]) == ranks
    for numbers in runs[ranks][name]:
        assert_right(numbers)
        assert all(not details.get("noise_scale_skipped") for details in numbers["details"])
        assert all(details["dropped_samples"] == 0 for details in numbers["details"])


@pytest.mark.parametrize(("ranks", "name"), named(REFUSED))
def test_refused(runs: dict[int, Found], ranks: int, name: str) -> None:
    for found in runs[ranks][name]:
        said = found if isinstance(found, str) else found["said"]
        assert re.search(REFUSED[ranks][name], said), said


def test_the_users_proof_makes_them_exact(runs: dict[int, Found]) -> None:
    for found in dicts(runs[2]["proved"]):
        assert found == {"said": {"per_sample_grad_norm": ""}, "label": "exact", "proved": True}


def test_norms_of_the_last_pass_are_refused_until_they_are_added_up(runs: dict[int, Found]) -> None:
    for found in dicts(runs[2]["last_pass"]):
        assert found["error"] <= 1e-12
        assert re.search(r"per_sample: parts .* lie on ranks 0, 1 .* call sync_norms\(\) on each", found["refused"])


def test_collectives(runs: dict[int, Found]) -> None:
    for counts in dicts(runs[2]["counted"]):
        assert counts["training"] == counts["plain"]
        assert counts["first"] == 3  # the sum over parts, maxima, sums
        assert counts["second"] == 3


def test_scores_before_what_is_taken_back_stay(runs: dict[int, Found]) -> None:
    for found in dicts(runs[2]["taken_back"]):
        assert "a later proof failed: a test" in found["off"]
        assert found["ids"] == [0, 1, 2, 10, 11, 12]


def test_gradients_that_are_sums_over_ranks_give_no_numbers(runs: dict[int, Found]) -> None:
    for found in dicts(runs[2]["heads"]):
        assert "ranks that hold layer 'norm' alike got other gradients of the same samples there" in found["said"]
        assert found["numbers"] == 0
    for name, placement in (("sequences", "S(1)"), ("heads_left_out", "S(1)")):
        for found in dicts(runs[2][name]):
            assert found["error"] <= 1e-12
            assert "total" not in found["places"]
            assert "total_of_measured" in found["places"]
            why = f"module 'norm' (LayerNorm): its input lies on its ranks as {placement}, and not whole"
            assert why in found["not_covered"]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [("bias_whole", {"a.bias"}), ("bias_cut", {f"{layer}.{key}" for layer in "bc" for key in ("weight", "bias")})],
)
def test_what_does_not_lie_as_its_layer_needs_it_can_be_left_out(
    runs: dict[int, Found], name: str, left_out: set[str]
) -> None:
    everything = {f"{layer}.{key}" for layer in "abc" for key in ("weight", "bias")}
    for found in dicts(runs[2][name]):
        assert found["total"]
        assert set(found["measured"]) == everything - left_out
        assert found["error"] <= 1e-12


def test_a_step_without_samples_is_no_step_of_the_noise_scale(runs: dict[int, Found]) -> None:
    for found in dicts(runs[2]["empty_batch"]):
        assert not found["off"]
        assert found["numbers"] > 0
        assert not found["details"]["noise_scale_skipped"]


@pytest.mark.parametrize("argument", ["normalized", "keep_factors", "methods", "reference"])
def test_what_is_not_of_parts(runs: dict[int, Found], argument: str) -> None:
    for found in dicts(runs[2]["refused"]):
        assert re.search(OF_PARTS.format(argument), found[argument]), found[argument]


def test_a_compiled_model_is_refused(runs: dict[int, Found]) -> None:
    for found in dicts(runs[2]["refused"]):
        assert "model: is compiled, and its parameters lie in parts on several ranks" in found["compiled"]


def test_each_ranks_own_scores_are_there_where_nobody_else_is_asked(runs: dict[int, Found]) -> None:
    for found in dicts(runs[4]["scores_alone"]):
        # Of the ranks of one replica's place, that of the counting rank has the scores of the samples of both replicas.
        assert found["own"] == found["counts"][0] == 12
        assert found["counts"][1:] == [24, 24]


def test_a_rank_that_comes_later_takes_part_in_the_proof(runs: dict[int, Found]) -> None:
    for found in dicts(runs[2]["late"]):
        assert found["said"] == [
            "statistics over the batch that the model may detach were not looked for: it is sharded"
        ]
