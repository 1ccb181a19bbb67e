"""Several threads at once, taking turns as often as Python lets them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def at_once(work: Callable[[T], None], arguments: Sequence[T]) -> None:
    """work(argument) in a thread each; what one of them raises is raised here."""
    start, raised = threading.Barrier(len(arguments)), list[BaseException]()

    def run(argument: T) -> None:
        start.wait()
        try:
            work(argument)
        except BaseException as error:
            raised.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if raised:
        raise raised[0]
