"""Several ranks on this machine, for tests of wrapped and sharded models."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(work: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Call work(rank, *arguments) in a process of its own for every rank; what one of them raises is raised here."""
    torch.multiprocessing.spawn(_work_and_leave, (work, arguments), nprocs=ranks)


def run_ways(folder: Path, train: Callable[..., Any], ways: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Call train(rank, folder, name, **keywords) for every way on two ranks, in a process group of its own for each;
    return what the ranks have returned, which is JSON-ready, by way."""
    run_ranks(_train_in_ways, str(folder), train, ways)
    return {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)] for name in ways}


def _train_in_ways(rank: int, folder: str, train: Callable[..., Any], ways: Mapping[str, Mapping[str, Any]]) -> None:
    torch.set_num_threads(1)
    for name, keywords in ways.items():
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{name}.store", 2), rank=rank, world_size=2)
        found = train(rank, folder, name, **keywords)
        Path(folder, f"{name}.{rank}.json").write_text(json.dumps(found))
        dist.destroy_process_group()


def _work_and_leave(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    work(rank, *arguments)
    # Every check has passed. An interpreter that is torn down while a thread of gloo still holds one of its objects is
    # sometimes aborted ("terminate called without an active exception"), so there is no tearing down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
