"""Windows of all ranks against one process in float64: each situation is right to 1e-7, or refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rank_runs import Found, assert_right, run_situations
from rank_situations import situations

pytestmark = pytest.mark.ci  # four processes, for 20 s

RIGHT = (
    *("ddp", "unequal_batches", "fsdp2", "tensor_parallel", "pipeline", "skipped_calls", "open_window"),
    *("a_metric_that_stops_on_one_rank", "after_rebind", "one_state_for_all", "loaded_into_the_same_monitor"),
    *("lacking_saved_again", "vocabulary", "sequence_parallel_added_up", "vocabulary_and_fsdp2"),
    *("hsdp", "tensor_parallel_and_fsdp2", "subgroups", "two_groups", "mesh_as_group"),
)
#: What the error says, on all ranks that make the call.
REFUSED = {
    "pipeline_without_prefix": r"ValueError: parameter '0.weight' has shape \[8, 6\] on rank 0 and \[1, 5\] on rank "
    r"1, .*Stages of a pipeline: give each rank names of its own with prefix=",
    "independent": r"ValueError: parameter 'a.weight' has other values on rank 1 than on rank 0, .* "
    r"pass group= \(or group=None\)",
    "fsdp1": r"ValueError: rank 0: the parameters of FullyShardedDataParallel .* use "
    r"torch.distributed.fsdp.fully_shard",
    "state_of_another_rank": r"ValueError: .*pieces: of parameter 'a.weight' the state has \[4, 6\] at \[\d, 0\] of "
    r"\[8, 6\], and this rank holds \[4, 6\] at \[\d, 0\] of \[8, 6\]. A file that one rank has written",
    "shifted_windows": r"ValueError: monitor.global_window\(\) of window 0 .*: the windows of ranks differ: steps 1 "
    r"to 4 on rank 0, steps 1 to 2 on rank 1",
}
REFUSED["other_calls"] = r"ValueError: .*: ranks are at monitor.global_window\(\) .* and trajectory.sync\(\) .rank 1."
#: What the error says on rank 0, while nothing else is wrong.
NAMED = {
    "a_rank_that_never_calls": r"window 0 over steps 1 to 4: rank 0 has waited 0.5 s for rank 1 \(rank 1 never called",
    "on_rank_0_alone": r"window 0 over steps 1 to 4: rank 0 has waited 0.5 s for rank 1 \(rank 1 never called it\)",
    "skipped_calls": r"rank 0 has waited 0.5 s for rank 1",
    # The rank that notices first speaks for all, and names itself first.
    "other_window_steps": "ranks are at different places: "
    "(?=.*rank 0 is at step 4, monitor.global_window.. of window 0 over steps 1 to 4)"
    "(?=.*rank 1 is at step 4, monitor.global_window.. with no window that waits)",
    "other_steps": r"at different places: rank \d is at step [45], monitor.*; rank \d is at step [45], monitor",
    "a_rank_that_dies": r"window 0 over steps 1 to 4: rank \d has waited [\d.]+ s for rank 3",
}
OTHERS = {"counted", "sequence_parallel", "independent_for_themselves", "saved_while_windows_wait"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    """What every rank has found, by situation; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "rank_situations", 4)


def test_every_situation_is_in_the_table() -> None:
    names = [name for name, *_ in situations(4)]
    assert len(set(names)) == len(names)
    assert set(names) == {*RIGHT, *REFUSED, *NAMED, *OTHERS}
    assert names[-1] == "a_rank_that_dies"


@pytest.mark.parametrize("name", RIGHT)
def test_right(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert_right(numbers)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(found: Found, name: str) -> None:
    errors = found[name]
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, str), error
        assert re.search(REFUSED[name], error), error


@pytest.mark.parametrize("name", NAMED)
def test_named_and_the_training_goes_on(found: Found, name: str) -> None:
    assert re.search(NAMED[name], found[name][0]["said"]), found[name][0]["said"]
    assert found[name][0]["said"].startswith("lipcore: ")
    for numbers in found[name]:
        assert numbers.get("goes_on", True)
        assert numbers.get("local", 1) > 0
        assert numbers.get("scope", "rank") == "rank"


def test_a_metric_that_has_stopped_is_left_out_with_the_reason(found: Found) -> None:
    for numbers in found["a_metric_that_stops_on_one_rank"]:
        assert "this one stops" in numbers["off"]["stopping"]
        assert "not merged over ranks" in numbers["off"]["own"]


def test_the_samples_of_another_ranks_state_are_left_out(found: Found) -> None:
    first, second = found["one_state_for_all"]
    assert not first["said"]
    assert re.match(r"per_sample_grad_norm: rank 1 of 2 goes on from the state of rank 0 of 2", second["said"][0])
    for numbers in (first, second):
        assert "rank 1 of 2 goes on from the state of rank 0" in numbers["off"][0]
        assert numbers["off"][1:] == [""]


def test_what_a_window_lacks_is_in_its_state(found: Found) -> None:
    for numbers in found["lacking_saved_again"]:
        assert "rank 1 of 2 goes on from the state of rank 0" in numbers["off"][0]
        assert numbers["off"][1:] == [""]


def test_models_that_each_rank_trains_for_itself(found: Found) -> None:
    for numbers in found["independent_for_themselves"]:
        assert numbers["error"] <= 1e-7
        assert numbers["scopes"] == ["rank", "rank"]


def test_norms_of_gradients_that_nobody_has_added_up(found: Found) -> None:
    """As after SequenceParallel, a right number would take a collective: there is none, with the reason."""
    for numbers in found["sequence_parallel"]:
        assert_right(numbers["right"])
        assert all("grad_norm" in key or "/norm" in key for key in numbers["absent"])
        trajectory, statistics = numbers["details"][:2]
        for said in (*(trajectory[f"{stage}_off"] for stage in ("grad_norm", "clipped_grad_norm")),
                     statistics["not_read"]["gradient norm.weight"]):  # fmt: skip
            assert "'norm.weight' is placed as (Partial(sum)), and the parameter is placed as (Replicate())" in said
            assert "register_post_accumulate_grad_hook" in said


def test_windows_that_wait_are_in_no_state(found: Found) -> None:
    for numbers in found["saved_while_windows_wait"]:
        assert isinstance(numbers, dict), numbers
        before, saved, again, loaded = numbers["said"]
        assert not before  # nobody has merged windows yet
        (first,) = saved
        assert "not in a state: after a resume no window of all ranks has steps 5 to 8. Call monitor.global" in first
        assert again == saved
        assert "windows that had closed when this state was saved waited" in loaded[-1]
        assert "no window of all ranks has steps 5 to 8" in loaded[-1]


def test_collectives(found: Found) -> None:
    for counts in found["counted"]:
        assert counts["training, watched=True"] == counts["training, watched=False"] > 0
        assert counts["first global_window"] <= 2  # sums, maxima
        assert counts["global_window"] <= 2
        assert counts["nothing waits"] == 0
