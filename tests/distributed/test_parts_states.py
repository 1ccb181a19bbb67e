"""What becomes of scores, waiting windows, copies and states where ranks hold parts of the parameters."""

from __future__ import annotations

import re
from typing import Any

import pytest
from parts_states import situations
from rank_runs import Found, run_situations

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Found:
    return run_situations(tmp_path_factory.mktemp("ranks"), "parts_states", 2)


@pytest.fixture(params=[name for name, *_ in situations(2)])
def found(request: Any, runs: Found) -> tuple[str, list[Any]]:
    """What two ranks have found, neither of which has raised."""
    assert [type(each) for each in runs[request.param]] == [dict, dict], runs[request.param]
    return request.param, runs[request.param]


EXPECTED: dict[str, Any] = {
    "squares_that_do_not_add_up": {"ids": []},
    "frozen": {"steps": [1, 2], "places": [["a", "b", "c", "total"], ["a", "b", "total"]], "ids": 18},
    "proof_fails_within": {  # of DDP the first step is proved by then
        "ddp": [{"samples of it were taken back: a test": 1}, 0.0],
        "parts": [{"samples of it were taken back: a test": 2}, 0.0],
    },
    "waits_in_a_state": {"ids": 24},
    "from_one_process": {"ids": 18},
}


def test_found(found: tuple[str, list[Any]]) -> None:
    name, ranks = found
    for each in ranks:
        if name in EXPECTED:
            assert each == EXPECTED[name]
        elif name == "other_ids_once":
            assert re.search("have recorded other samples .* are left out of the scores", each["said"])
            assert each["ids"] == [10, 11, 12, 20, 21, 22]
        elif name == "other_blocks":
            assert each["norms"][0] == pytest.approx(each["norms"][1], rel=1e-12)
        else:
            assert name == "copied"
            assert re.search("^ValueError: other: ranks hold parts of these samples", each["merge"])
            assert re.search("^RuntimeError: .* this is a copy of a metric", each["sync_norms"])
