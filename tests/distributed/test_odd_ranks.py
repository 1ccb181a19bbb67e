"""Several ranks in situations that are none of the ways to cut a model: right to 1e-7, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from odd_situations import situations
from rank_runs import Found, assert_right, run_situations

pytestmark = pytest.mark.ci  # four processes, for 20 s

RIGHT = (
    *("offload", "offload_samples", "offload_lambda", "offload_hsdp", "between_forward_and_backward", "noise_between"),
    *("between_in_hsdp", "hsdp_samples", "accumulated", "checkpointed", "compiled", "zero_redundancy", "zero_by_hand"),
    *("made_before_the_group", "one_group_after_another", "two_models", "shared_by_fewer", "samples_where_fewer_share"),
)
REFUSED = {
    "averaged_now_and_then": r"ValueError: trajectory: ranks that hold the same parameters have moved them by other ",
    "zero_by_hand_behind": r"ValueError: trajectory: .* have moved them by other .* do both in step\(\) of one object",
    "averaged_with_sketches": r"ValueError: trajectory: ranks that hold the same parameters have moved them by other ",
}
OTHERS = {
    *("offload_bits", "reduced_by_hand", "destroyed", "sharded_late", "closed_and_merged_again", "gone_back"),
    *("one_replica_watched", "gathered_when_looked_at", "stepped_within"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Any:
    """What every rank has found, by situation; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "odd_situations", 4)


def test_every_situation_is_in_the_table() -> None:
    names = [name for name, *_ in situations(4)]
    assert sorted(names) == sorted({*RIGHT, *REFUSED, *OTHERS})


@pytest.mark.parametrize("name", RIGHT)
def test_right(found: Found, name: str) -> None:
    assert found[name]
    for numbers in found[name]:
        assert_right(numbers)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(found: Found, name: str) -> None:
    assert len(found[name]) == 2
    for error in found[name]:
        assert isinstance(error, str), error
        assert re.match(REFUSED[name], error), error


def test_offloading_and_all_metrics_leave_the_training_as_it_is(found: Found) -> None:
    for numbers in found["offload_bits"]:
        assert isinstance(numbers, dict), numbers
        assert numbers["same"]
        answer, *off = numbers["off"]
        assert answer == {"per_sample_grad_norm": "", "lipschitz": ""}
        assert off == [{}, {}]


def test_steps_within_the_backward_pass_have_their_own_samples(found: Found) -> None:
    for numbers in found["stepped_within"]:
        assert_right(numbers)
        assert numbers["samples"] == [2 * 3 * 4] * 2
        assert [re.match("optimizers have stepped within", why) for (why,) in numbers["noise"]].count(None) == 0


def test_a_process_group_that_is_gone_makes_no_part_a_whole(found: Found) -> None:
    for numbers in found["destroyed"]:
        assert isinstance(numbers, dict), numbers
        for kind, each in numbers.items():
            assert each["scopes"] == [kind] * 3
            assert each["merged"] == 0
            assert re.match("global_window: torch.distributed.destroy_process_group.. was called", each["said"])


def test_gradients_that_are_reduced_by_hand_are_left_out_by_name(found: Found) -> None:
    for numbers in found["reduced_by_hand"]:
        assert isinstance(numbers, list), numbers
        told, *others = numbers
        assert_right(told["right"])
        assert told["why"] == ["", ""]
        for each in others:
            assert not each["there"]
            assert all("had other gradients where these are read" in why for why in each["why"])
        assert [each["gradients"] for each in numbers] == [[False, False]] * 3


def test_a_model_that_is_sharded_late_is_named_and_trains_on(found: Found) -> None:
    for numbers in found["sharded_late"]:
        assert isinstance(numbers, dict), numbers
        assert numbers["same"]
        assert "after lipcore has looked at it; call rebind()" in numbers["said"]


def test_gathered_parameters_are_looked_at_in_parts(found: Found) -> None:
    for numbers in found["gathered_when_looked_at"]:
        assert isinstance(numbers, dict), numbers
        assert numbers["error"] <= 1e-7
        assert numbers["alone"] <= 1e-9
        assert not any(numbers["off"])
        assert all("cumulative" in key or "directness" in key for key in numbers["absent"])  # behind rebind()


def test_one_replica_alone_proves_nothing(found: Found) -> None:
    for rank, numbers in enumerate(found["one_replica_watched"]):
        assert isinstance(numbers, dict), numbers
        assert numbers["same"]
        assert len(numbers["why"]) == (2 if rank < 2 else 0)
        for (why,) in numbers["why"]:
            assert "not all of its ranks have this metric, or were here in time; call Monitor.prove()" in why


@pytest.mark.parametrize(("name", "steps"), [("closed_and_merged_again", [6, 7]), ("gone_back", [1, 4])])
def test_a_slow_rank_that_has_passed_by_before_is_waited_for(found: Found, name: str, steps: list[int]) -> None:
    for numbers in found[name]:
        assert numbers == {"steps": steps, "scope": "global"}
