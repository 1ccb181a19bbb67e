"""The table of costs in docs/distributed.md is what bench/rank_costs.py has written, and that is what plan() says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "bench" / "rank_costs.py"
FOUND = json.loads(FILE.with_suffix(".json").read_text())
ROWS: list[dict[str, Any]] = FOUND["fsdp2"]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(FILE))


def test_the_table_is_made_of_the_file(script: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert "\n".join(script["table"](ROWS)) in page
    assert "\n".join(script["split_table"](FOUND["ddp"])) in page


def test_bytes_of_each_element_are_those_of_plan(script: dict[str, Any]) -> None:
    names = list(script["shapes_of"]("7B"))[:3]
    for row in ROWS:
        assert script["kept"](names, script["MODES"][row["mode"]])[1] == row["bytes_per_element"]


def test_shapes_are_those_of_the_models(script: dict[str, Any]) -> None:
    assert {row["model"]: row["elements"] for row in ROWS} == {"7B": 6_738_415_616, "70B": 68_976_648_192}
    assert script["part_of"]((1000, 3), 64) == 16 * 3


@pytest.mark.parametrize(
    ("stats", "most"),
    [(("update_norm", "weight_norm"), 5e6), (("update_norm", "weight_norm", "grad_norm", "clipped_grad_norm"), 10e6)],
)
def test_a_logging_step_after_1000_steps_sends_what_was_promised(
    script: dict[str, Any], stats: tuple[str, ...], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7B: by a window's step as counted in some, since each step has as many numbers."""
    names = list(script["shapes_of"]("7B"))
    counted = []
    for steps in (2, 4):
        monkeypatch.setitem(script["sent"].__globals__, "WINDOW", steps)
        counted.append(script["sent"](names, {"mode": "updates", "stats": stats}))
    each_step = (counted[1] - counted[0]) / 2
    assert each_step > 0
    assert counted[0] + 998 * each_step <= most


@pytest.mark.ci
def test_the_file_is_what_the_script_finds(script: dict[str, Any]) -> None:
    assert script["rows"]() == ROWS
    assert script["split_rows"]() == FOUND["ddp"]
