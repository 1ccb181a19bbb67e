"""The record of a run: a file that survives the process, and its reader."""

from lipcore.recording.record import RunRecord
from lipcore.recording.run import Event, Run, Start, open_run
from lipcore.recording.schema import RecordError
from lipcore.recording.series import Series

__all__ = ["Event", "RecordError", "Run", "RunRecord", "Series", "Start", "open_run"]
