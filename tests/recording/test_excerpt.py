"""The last steps of a record as a record of its own."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from recorded_runs import recorded

from lipcore.recording import open_run
from lipcore.recording.excerpt import write_excerpt


def test_it_has_the_last_steps_in_whole_blocks(tmp_path: Path) -> None:
    recorded(tmp_path / "a", steps=700, windows=1).close()
    connection = sqlite3.connect(tmp_path / "a" / "rank0.lipcore", isolation_level=None)
    write_excerpt(connection, tmp_path / "part.lipcore", steps=200)
    connection.close()
    with open_run(tmp_path / "part.lipcore") as run:
        steps = run.series("update_norm").steps.tolist()
    assert steps[0] == 257  # blocks of 256 steps, and step 501 is the first that was asked for
    assert steps == list(range(steps[0], 701))
