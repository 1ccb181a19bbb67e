"""The terminal while a run is followed: drawn anew, left by a key, and as it was afterwards."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from lipcore.cli.top.reading import Pace, Seen, look
from lipcore.cli.top.view import lines_of
from lipcore.recording import RecordError, open_run

_LOOK = 0.2  # seconds between two looks at the keyboard and the size of the terminal
_LEAVE = ("q", "Q", "\x04")  # the last is Ctrl-D
_WIDTH, _HEIGHT = 80, 40  # where there is no terminal


def top(run: Path, rank: int, seconds: float) -> None:
    """Show a run until a key or Ctrl-C ends it; once, where the output is no terminal.

    Raises:
        RecordError, ValueError: the run cannot be read the first time.
    """
    # Variables that say the size would hold it at what it was when the shell was started.
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    console, pace = Console(highlight=False, _environ=environment), Pace()
    with open_run(run, rank) as opened:
        seen = look(opened, pace)
    if not console.is_terminal:
        for line in lines_of(seen, _WIDTH, _HEIGHT, ascii_only=_ascii(console), live=False):
            print(line.plain.rstrip())
        return

    def drawn() -> Group:
        width, height = console.size
        return Group(*lines_of(seen, width, height, ascii_only=_ascii(console)))

    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(drawn(), console=console, screen=True, auto_refresh=False) as live,
    ):
        before, due = console.size, time.monotonic() + seconds
        while not pressed(_LOOK):
            if time.monotonic() >= due:
                seen, due = _again(run, rank, pace, seen), time.monotonic() + seconds
            elif console.size == before:
                continue
            before = console.size
            live.update(drawn(), refresh=True)


def _again(run: Path, rank: int, pace: Pace, before: Seen) -> Seen:
    """Read the run anew; its file may be another one by now, or none yet."""
    try:
        with open_run(run, rank) as opened:
            return look(opened, pace)
    except (RecordError, ValueError) as error:
        return Seen(before.name, 0, False, trouble=f"Cannot be read just now: {error}")


def _ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Read keys one by one for a while; give a function that waits, and says whether a key was one to leave by."""
    try:
        import select
        import termios
        import tty

        file = sys.stdin.fileno()
        old = termios.tcgetattr(file)
    except (ImportError, OSError, ValueError, termios.error):  # no keyboard: Ctrl-C is left
        yield _wait
        return
    try:
        tty.setcbreak(file)

        def pressed(seconds: float) -> bool:
            if not select.select([file], [], [], seconds)[0]:
                return False
            keys = os.read(file, 64).decode(errors="replace")
            return not keys or any(keys.startswith(key) for key in _LEAVE)

        yield pressed
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, old)


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return False
