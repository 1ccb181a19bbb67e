"""What ranks send of a window: one packed all-reduce against one per tensor, and against every rank's numbers gathered
as Python objects. Two ranks of gloo on this machine, each with a thread."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lipcore.distributed.group import Group, found_group
from lipcore.distributed.packed import Packed, reduced

_PARAMETERS, _STEPS, _RANKS, _ROUNDS = 291, 100, 2, 15  # a model of 7 billion elements
_WAYS = ("packed", "one all-reduce per tensor", "all_gather_object")


def _numbers(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of squares of single steps, one tensor per parameter, and maxima."""
    generator = torch.Generator().manual_seed(rank)
    sums = [torch.rand(_STEPS, 2, generator=generator, dtype=torch.float64) for _ in range(_PARAMETERS)]
    return sums, [torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(_PARAMETERS)]


def _packed(sums: list[Tensor], largest: list[Tensor], group: Group) -> tuple[list[Tensor], list[Tensor]]:
    (together,) = reduced([Packed(sums, largest)], group)
    return together.sums, together.largest


def _one_by_one(sums: list[Tensor], largest: list[Tensor], group: Group) -> tuple[list[Tensor], list[Tensor]]:
    found = [tensor.clone() for tensor in sums], [tensor.clone() for tensor in largest]
    for tensors, operation in zip(found, (dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=True):
        for tensor in tensors:
            dist.all_reduce(tensor, operation, group=group.handle)
    return found


def _objects(sums: list[Tensor], largest: list[Tensor], group: Group) -> tuple[list[Tensor], list[Tensor]]:
    everyone: list[Any] = [None] * group.size
    dist.all_gather_object(everyone, (sums, largest), group=group.handle)
    added = [torch.stack(each).sum(0) for each in zip(*(theirs[0] for theirs in everyone), strict=True)]
    return added, [torch.stack(each).amax(0) for each in zip(*(theirs[1] for theirs in everyone), strict=True)]


def _check(found: tuple[list[Tensor], list[Tensor]]) -> None:
    """Compare with the numbers of all ranks."""
    everyone = [_numbers(rank) for rank in range(_RANKS)]
    for i in range(_PARAMETERS):
        torch.testing.assert_close(found[0][i], sum(theirs[0][i] for theirs in everyone), rtol=1e-14, atol=0)
        assert torch.equal(found[1][i], torch.stack([theirs[1][i] for theirs in everyone]).amax(0))


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", _RANKS), rank=rank, world_size=_RANKS)
    group = found_group("auto")
    assert group is not None
    sums, largest = _numbers(rank)
    calls: list[Callable[..., Any]] = [_packed, _one_by_one, _objects]
    for call in calls:
        _check(call(sums, largest, group))
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    for _ in range(_ROUNDS):
        for way, call in zip(_WAYS, calls, strict=True):
            dist.barrier()
            start = time.perf_counter()
            call(sums, largest, group)
            times[way].append(time.perf_counter() - start)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def bench_packed_reduce(benchmark: Any, report: Any, tmp_path: Path) -> None:
    def run() -> None:
        torch.multiprocessing.spawn(_work, (str(tmp_path),), nprocs=_RANKS)

    benchmark.pedantic(run, rounds=1, iterations=1)
    times = json.loads((tmp_path / "times.json").read_text())
    what = f"a window of {_PARAMETERS} parameters and {_STEPS} steps over {_RANKS} gloo ranks"
    mine = 1e3 * statistics.median(times["packed"])
    report.add(f"{what}: packed", mine, "ms", bytes=8 * _PARAMETERS * (2 * _STEPS + 4))
    for way in _WAYS[1:]:
        ratio = statistics.median(b / a for a, b in zip(times["packed"], times[way], strict=True))
        report.add(f"{what}: {way}, of the packed one's time", ratio, "x", target=1.0, better="higher")
