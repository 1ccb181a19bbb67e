"""Between the call that all ranks have made and its collectives: what is said in the store, and what one rank alone
raises there."""

from __future__ import annotations

from typing import Any

import pytest
from agreed_situations import WAYS, situations
from rank_runs import Found, run_situations

pytestmark = pytest.mark.ci  # two and four processes
NAMES = [f"{of.__name__}.{call}.{how}" for of, call, how in WAYS]


def test_every_situation_is_in_the_table() -> None:
    assert [name for name, *_ in situations(2)] == ["counted", "layouts", *NAMES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[int, Found]:
    """What every rank has found, by number of ranks."""
    return {ranks: run_situations(tmp_path_factory.mktemp("ranks"), "agreed_situations", ranks) for ranks in (2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_who_holds_what_takes_no_collective(runs: dict[int, Found], ranks: int) -> None:
    assert runs[ranks]["counted"] == [[3, 3]] * ranks  # the sum over parts, maxima, sums


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_say_alike_where_parts_lie(runs: dict[int, Found], ranks: int) -> None:
    for found in runs[ranks]["layouts"]:
        assert {name: each["wrong"] for name, each in found.items()} == {name: [] for name in found}
        assert [found[name]["different"] for name in ("ddp", "fsdp2", "tp")] == [1, 1, 1]
        # Bits of replicas are compared, so each place has words of its own.
        assert found["hsdp"]["different"] == ranks // 2
        assert found["both"]["different"] == ranks


@pytest.mark.parametrize("name", NAMES)
def test_an_error_of_one_rank_leaves_no_other_in_a_collective(runs: dict[int, Found], name: str) -> None:
    for found in runs[2][name]:
        assert isinstance(found, dict), found
        assert "MemoryError: none left" in found["said"]
        assert found["training"] == [True, True]
        assert found["then"]
    assert "rank 1" in runs[2][name][0]["said"]
