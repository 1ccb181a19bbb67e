"""An error that one rank raises while the ranks add up a window: no collective of any rank is left unpaired, the window
says what is left out and why, and everything else is right."""

from __future__ import annotations

from typing import Any

import pytest
from failing_situations import BROKEN, situations
from rank_runs import Found, assert_right, run_situations

pytestmark = pytest.mark.ci  # two processes, for 20 s

SAID = 'rank 1: ZeroDivisionError: no "number" here'
RAISED = [name for name, *_ in situations(2) if "." in name or name == "sketches"]
OTHERS = {"of_the_open_window", "huge"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Any:
    """What every rank has found, by situation; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "failing_situations", 2)


def test_every_situation_is_in_the_table() -> None:
    assert sorted(name for name, *_ in situations(2)) == sorted({*RAISED, *OTHERS})


@pytest.mark.parametrize("name", RAISED)
def test_other_numbers_are_right_and_the_metric_is_left_out(found: Found, name: str) -> None:
    metric, _, stage = name.partition(".")
    metric = {"sketches": "trajectory", "in_parts": "per_sample_grad_norm"}.get(metric, metric)
    assert len(found[name]) == 2
    for rank, numbers in enumerate(found[name]):
        assert_right(numbers, error=1e-12)
        for i, off in enumerate(numbers["off"]):
            here = i == BROKEN and (stage != "result" or rank == 1)
            assert sorted(off) == [metric] * here, (name, rank, i)
        # As many collectives as without an error: ranks tell it in the store.
        if stage == "told":  # nothing of it is added up
            assert len(numbers["calls"][BROKEN]) <= len(numbers["usual"][BROKEN])
        else:
            assert numbers["calls"][BROKEN] == numbers["usual"][BROKEN]
        assert [c for i, c in enumerate(numbers["calls"]) if i != BROKEN] == [
            c for i, c in enumerate(numbers["usual"]) if i != BROKEN
        ]
        assert max(map(len, numbers["usual"])) <= 3  # maxima, sums, and those of parts


@pytest.mark.parametrize("name", [name for name in RAISED if not name.endswith((".told", ".result", ".sizes_off"))])
def test_all_ranks_say_which_rank_and_why(found: Found, name: str) -> None:
    for numbers in found[name]:
        (why,) = numbers["off"][BROKEN].values()
        assert f"could not be merged, since making them raised an error ({SAID}); each rank's own" in why


def test_numbers_of_another_size_are_an_error_of_that_rank(found: Found) -> None:
    for numbers in found["trajectory.sizes_off"]:
        assert "rank 1: it has" in numbers["off"][BROKEN]["trajectory"]


def test_what_is_raised_before_the_meeting_is_told_there(found: Found) -> None:
    for numbers in found["lipschitz.told"]:
        assert numbers["off"][BROKEN] == {"lipschitz": f"on {SAID}"}


def test_a_metrics_own_call_raises_it_on_all_ranks(found: Found) -> None:
    for said, goes_on in found["of_the_open_window"]:
        assert SAID in said
        assert goes_on is True


def test_powers_beyond_float64_are_no_numbers_and_everything_else_is_right(found: Found) -> None:
    for ranks in found["huge"]:
        for size, numbers in ranks.items():
            assert numbers["off"] == {}
            beyond = {"1.0": (), "1e+60": (), "1e+100": ("kurtosis",), "1e+160": ("kurtosis", "sd")}[size]
            for name, (value, valid, note) in numbers["found"].items():
                if name in beyond:
                    assert (str(value), valid, note) == (
                        "nan",
                        False,
                        "powers of deviations leave the range of float64",
                    )
                else:
                    assert valid, (size, name)
                    assert note == ""
                    assert value == pytest.approx(numbers["expected"][name], rel=1e-10), (size, name)
