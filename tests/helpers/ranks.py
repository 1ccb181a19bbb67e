"""Several ranks on this machine, for tests of wrapped and sharded models."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch


def run_ranks(work: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Call work(rank, *arguments) in a process of its own for every rank; what one of them raises is raised here."""
    torch.multiprocessing.spawn(_work_and_leave, (work, arguments), nprocs=ranks)


def _work_and_leave(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    work(rank, *arguments)
    # Every check has passed. An interpreter that is torn down while a thread of gloo still holds one of its objects is
    # sometimes aborted ("terminate called without an active exception"), so there is no tearing down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
