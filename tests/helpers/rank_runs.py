"""Situations of several ranks, one after the other in processes that are started once; what each rank has found."""

from __future__ import annotations

import datetime
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.multiprocessing import ProcessRaisedException

Found = dict[str, list[Any]]


def assert_right(numbers: Any, scope: str = "global", error: float = 1e-7) -> None:
    """What a rank has found has all numbers that there are to be, of this scope, within the error."""
    assert isinstance(numbers, dict), numbers
    assert not numbers["absent"]
    assert set(numbers["scopes"]) == {scope}
    assert numbers["error"] <= error, numbers.get("where")


def run_situations(folder: Path, module: str, ranks: int) -> Found:
    """Run what `module.situations(ranks)` gives, which may write into LIPCORE_TEST_FOLDER; what a rank raises is its
    name and message."""
    try:
        _run_in(folder, module, ranks)
    except ProcessRaisedException as error:
        # As a group is made, gloo is sometimes called by a rank of another test, which takes the port for that of a
        # group of its own that is gone.
        if "connectFullMesh" not in str(error):
            raise
        folder = folder / "again"
        folder.mkdir()
        _run_in(folder, module, ranks)
    found: Found = {}
    for name, world, _ in importlib.import_module(module).situations(ranks):
        files = [folder / f"{name}.{rank}.json" for rank in range(world)]
        found[name] = [json.loads(file.read_text()) for file in files if file.exists()]
    return found


def _run_in(folder: Path, module: str, ranks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIPCORE_TEST_FOLDER", str(folder))
        run_ranks(work_through, str(folder), module, ranks, ranks=ranks)


def work_through(rank: int, folder: str, module: str, ranks: int) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=120)
    for name, world, work in importlib.import_module(module).situations(ranks):
        if rank >= world:
            continue
        store = dist.FileStore(f"{folder}/{name}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
        try:
            found: Any = work(rank, world)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        Path(folder, f"{name}.{rank}.json").write_text(json.dumps(found, default=str))
        dist.destroy_process_group()
