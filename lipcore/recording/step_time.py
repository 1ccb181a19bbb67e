"""The time of a run's steps in its file: one row, which grows."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict

from lipcore.report.source import StepTime


def read_step_time(connection: sqlite3.Connection) -> StepTime:
    """Return the time of all steps that were timed; of none, from a file of before there was one."""
    row = connection.execute("select value from meta where key = 'step_time'").fetchone()
    return StepTime() if row is None else StepTime(**json.loads(row[0]))


def add_step_time(connection: sqlite3.Connection, time: StepTime) -> None:
    """Add the time of some steps."""
    text = json.dumps(asdict(read_step_time(connection) + time))
    connection.execute("insert or replace into meta values('step_time', ?)", (text,))
