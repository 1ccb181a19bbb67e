"""A page that is written again and again while a training goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from numbers import Real
from pathlib import Path
from typing import Any

from lipcore.report.output import write_whole
from lipcore.report.page import page_of
from lipcore.report.source import Source

Opened = Callable[[], AbstractContextManager[Source]]


def follow(opened: Opened, target: Path, seconds: float, wait: Callable[[float], object] = time.sleep) -> int:
    """Write a run's page whenever its record has changed, until Ctrl-C; return the number of pages that were written.

    The page loads itself anew in a browser; the last one does not. A run that cannot be read for once, as while another
    one takes its place, is tried again.

    Args:
        opened: opens the run.
        target: the page.
        seconds: between two looks at the record, and between two loads of the page.
        wait: sleeps for so many seconds.

    Raises:
        RecordError: the run cannot be read the first time.
        ReportError: the page cannot be written.
    """
    written, before = 0, None
    try:
        while True:
            try:
                with opened() as run:
                    state = _state(run.path)
                    if state != before:
                        page = page_of(run, reload_seconds=seconds)
            except (RuntimeError, ValueError):
                if not written:
                    raise
            else:
                if state != before:
                    write_whole(page, target)
                    written, before = written + 1, state
            wait(seconds)
    except KeyboardInterrupt:
        if written:
            with opened() as run:
                write_whole(page_of(run), target)
        return written


def checked_seconds(seconds: Any) -> float:
    """Return a time; ValueError where it is none."""
    if not isinstance(seconds, Real) or not 0.1 <= float(seconds) < math.inf:
        raise ValueError(f"seconds: expected a number >= 0.1, got {seconds!r}")
    return float(seconds)


def _state(path: Path) -> list[tuple[int, int]]:
    """Return what changes when something is written: sizes and times of the record and of its log."""
    files = (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-writer"))
    found = (file.stat() if file.exists() else None for file in files)
    return [(0, 0) if one is None else (one.st_size, one.st_mtime_ns) for one in found]
