"""How a process ends while a run is recorded: by SIGTERM, or at its exit without a close()."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

from lipcore.metric.listener import Listener

_SECONDS = 10.0  # that the end of a process is kept waiting at most
_TRIES, _PAUSE = 100, 0.02  # while the main thread is inside lipcore
#: Rooms that run for as long as a user's program does.
_PROGRAMS = ("lipcore.cli", "lipcore.demo", "lipcore.__main__")

EndKind = Literal["SIGTERM", "exception", "exit"]
OnEnd = Callable[[EndKind, str, dict[str, Any]], None]


class Endings(Listener):
    """Listener that watches the end of a process. What waits is written down then, and a signal goes on to whoever had
    it before: the process ends as it would have, or goes on where a handler of the user's lets it.

    Args:
        on_end: called with the kind of end, a sentence and facts; in another thread where it
            is a signal, since what it waits for may never come.
    """

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end, self._process = on_end, os.getpid()
        self._handler = self._handle  # one object: a bound method is a new one each time
        self._previous: Any = None
        self._tries, self._open = 0, True
        atexit.register(self._at_exit)

    def begin(self) -> None:
        """Take the signal, at the first step: trainers that have a handler for it look, when they begin, whether there
        is one."""
        here = threading.current_thread() is threading.main_thread()  # which alone may
        # A handler that is not Python's could not be called.
        if here and self._previous is None and signal.getsignal(signal.SIGTERM) is not None:
            self._previous = signal.signal(signal.SIGTERM, self._handler)

    def closed(self) -> None:
        self._open = False
        atexit.unregister(self._at_exit)
        here = threading.current_thread() is threading.main_thread()
        if here and self._previous is not None and signal.getsignal(signal.SIGTERM) is self._handler:
            signal.signal(signal.SIGTERM, self._previous)
        # Else somebody else has it, who may call this one, which then only hands the signal on.

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._open and os.getpid() == self._process:
            if _inside_lipcore(frame) and self._tries < _TRIES:
                # Its queues are being written to just now: the signal comes again when that is over.
                self._tries += 1
                threading.Timer(_PAUSE, _send_again, (number,)).start()
                return
            self._tries = 0
            working = threading.Thread(target=self._end, args=("SIGTERM", "the process was told to end (SIGTERM)", {}))
            working.daemon = True
            working.start()
            working.join(_SECONDS)
        self._hand_on(number, frame)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _at_exit(self) -> None:
        if not self._open or os.getpid() != self._process:
            return
        error = getattr(sys, "last_value", None)
        if isinstance(error, BaseException) and not hasattr(sys, "ps1"):  # a prompt has errors that end nothing
            self._end("exception", *told(error))
        else:
            self._end("exit", "the process ended without monitor.close()", {})

    def _end(self, kind: EndKind, text: str, facts: dict[str, Any]) -> None:
        try:
            self._on_end(kind, text, facts)
        except Exception as error:  # a device that has failed, say: the process ends for another reason
            print(f"lipcore could not write down all of the run: {type(error).__name__}: {error}", file=sys.stderr)


def told(error: BaseException) -> tuple[str, dict[str, Any]]:
    """Return an exception as a sentence, and where it was raised."""
    said = (str(error).splitlines() or [""])[0][:500]
    frames = traceback.extract_tb(error.__traceback__)
    facts: dict[str, Any] = {"type": type(error).__name__}
    if frames:
        last = frames[-1]
        facts["where"] = f"{last.filename}:{last.lineno} in {last.name}"
    return f"{type(error).__name__}{': ' if said else ''}{said}", facts


def _send_again(number: int) -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _inside_lipcore(frame: FrameType | None) -> bool:
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("lipcore.") and not name.startswith(_PROGRAMS):
            return True
        frame = frame.f_back
    return False
