"""Runs of pytest in copies of this process: what a run has to import is imported once, which is most of a short run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch  # noqa: F401  (for the copies)

_HERE = Path(__file__).resolve().parent
#: That a test module of the same name would find instead of its own.
_OWN = (str(_HERE), str(_HERE.parent / "mutants"))


def run(
    arguments: Sequence[str], folder: Path, variables: Mapping[str, str], output: Path, longest: float
) -> int | None:
    """Run pytest in a fork of this process, which must not have used torch's threads. Return its exit status, below 0
    where a signal ended it; None where it took longer than that many seconds."""
    child = os.fork()
    if child == 0:
        _become(arguments, folder, variables, output)
    end = time.monotonic() + longest
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(arguments: Sequence[str], folder: Path, variables: Mapping[str, str], output: Path) -> None:
    status = 3  # pytest's for an error of its own
    try:
        os.setsid()  # with what it starts, it can be ended as a group
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(folder)
        os.environ.update(variables)
        sys.path[:] = [path for path in sys.path if path not in _OWN]
        for name, module in list(sys.modules.items()):
            if os.path.dirname(getattr(module, "__file__", None) or "") in _OWN:
                del sys.modules[name]
        status = int(pytest.main(list(arguments)))
        sys.stdout.flush()
    finally:
        os._exit(status)
