"""A rank leaves the training by an error of the model or is killed: the other one is told by name within its timeout,
goes on with its own numbers, both records have their last steps, and both processes end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lipcore

pytestmark = pytest.mark.ci
SCRIPT = Path(__file__).with_name("leaving_ranks.py")


def trained(folder: Path, kind: str) -> tuple[list[int], list[Any]]:
    """How the ranks' processes have ended, and what they were told."""
    command = [sys.executable, str(SCRIPT), str(folder), kind]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.DEVNULL) for rank in range(2)]
    ended = [rank.wait(300) for rank in ranks]
    files = [folder / f"{rank}.json" for rank in range(2)]
    return ended, [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.mark.parametrize(("kind", "ends"), [("caught", 0), ("raised", 1)])
def test_an_error_in_the_forward_pass_of_one_rank(tmp_path: Path, kind: str, ends: int) -> None:
    ended, (told, left) = trained(tmp_path, kind)
    assert ended == [0, ends]
    (said,) = (each for each in told if "merges the windows" in each)
    assert "window 2 over steps 11 to 15: rank 0 has waited 2 s for rank 1" in said
    assert left == (["caught a batch that cannot be read"] if kind == "caught" else None)
    one, other = (lipcore.open_run(tmp_path / "run", rank) for rank in range(2))
    assert [window.last_step for window in one.windows] == list(range(5, 41, 5))
    assert [window.scope for window in one.windows] == ["global"] * 2 + ["rank"] * 6
    assert one.last_step == 40
    assert other.last_step == 13
    (event,) = other.events
    assert (event.step, event.kind, event.text) == (13, "exception", "ValueError: a batch that cannot be read")


def test_the_rank_that_keeps_the_store_is_killed(tmp_path: Path) -> None:
    ended, (_, told) = trained(tmp_path, "killed")
    assert ended == [3, 0]
    (said,) = (each for each in told if "merges the windows" in each)
    assert re.search(r"lipcore: monitor.global_window\(\) of window 2.*the process group's store does not answer", said)
    assert lipcore.open_run(tmp_path / "run", 1).last_step == 40
