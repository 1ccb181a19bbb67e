"""Situations of what ranks do between the call that all of them have made and its collectives: who holds what is said
in the store; what one rank alone raises leaves no other in a collective."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_situations import STEPS, WINDOW, Columns, data_of, fsdp, made, planned
from sample_situations import collectives, mean_loss, monitored, quiet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import PerSampleGradNorms, Trajectory
from lipcore.distributed.layouts import layout_of, place_of
from lipcore.distributed.ownership import Ownership, describe
from lipcore.models.tensor_parallel import PartRanks
from lipcore.models.torch_internals import shard_of
from lipcore.per_sample.part_rows import PassRows
from lipcore.trajectory.rank_part import TrajectoryPart


class Uneven(nn.Module):
    """Dimensions that no number of ranks divides."""

    def __init__(self, size: int = 7) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(size, size), nn.Linear(size, size), nn.LayerNorm(size)


class Even(Uneven):
    """FSDP2 cuts nothing unevenly that is in parts already."""

    def __init__(self) -> None:
        super().__init__(8)


def train(model: Any, optimizer: Any, data: Any, steps: range) -> None:
    for x, y in (data[step] for step in steps):
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()


def counted(rank: int, world: int) -> list[int]:
    """Collectives of the first and the second merge: under tensor parallelism, with FSDP2 too where there are four."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = planned(made(Columns), mesh["tp"])
    model = fsdp(model, mesh["dp"]) if world > 2 else model
    metrics = [PerSampleGradNorms(loss_reduction="mean"), Trajectory()]
    optimizer, monitor = monitored(model, metrics=metrics)
    data, found = data_of([0])[0], []
    with monitor:
        for start in (0, WINDOW):
            train(model, optimizer, data, range(start, min(start + WINDOW, STEPS)))
            found.append(collectives(monitor.global_window))
            assert not monitor.global_history[-1].off
    return found


def layouts(rank: int, world: int) -> dict[str, Any]:
    """What each rank says of where parts lie, beside what each of them holds; how many different words there are."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    found = {}
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
    makers: dict[str, Callable[[], nn.Module]] = {
        "ddp": lambda: made(Uneven),
        "fsdp2": lambda: fully_shard(made(Uneven), mesh=init_device_mesh("cpu", (world,))),
        "hsdp": lambda: fully_shard(made(Uneven), mesh=mesh),
        "tp": lambda: parallelize_module(made(Uneven), init_device_mesh("cpu", (world,)), plan),
        "both": lambda: fully_shard(parallelize_module(made(Even), mesh["tp"], plan), mesh=mesh["dp"]),
    }  # fmt: skip
    for name, make in makers.items():
        held = [(key, "group", parameter) for key, parameter in make().named_parameters()]
        words = json.dumps(describe(held, ranks=range(world)))
        here = [layout_of(p) for *_, p in held if hasattr(p, "placements")]
        lies = [shard_of(p)[::-1] for *_, p in held if hasattr(p, "placements")]
        said: list[Any] = [None] * world
        dist.all_gather_object(said, (words, here, lies))
        whole = [tuple(p.shape) for *_, p in held if hasattr(p, "placements")]
        wrong = [
            (key, other) for i, (key, layout) in enumerate(zip(whole, here, strict=True)) for other in range(world)
            if layout is None or (other in layout["mesh"] and place_of(layout, key, other) != said[other][2][i])
        ]  # fmt: skip
        found[name] = {"different": len({each[0] for each in said}), "wrong": wrong}
    return found


def fail(*_: Any, **__: Any) -> Any:
    raise MemoryError("none left")


def no_memory(patch: Any) -> None:
    """Let there be no memory on this rank for what collectives are made in, nor for zeros of another kind."""
    before = torch.zeros
    patch.setattr(torch, "zeros", lambda *size, **settings: fail() if math.prod(
        size[0] if size and not isinstance(size[0], int) else size) else before(*size, **settings))  # fmt: skip


#: What is broken on rank 1 while it makes a call.
BROKEN: dict[str, Callable[[Any], None]] = {
    "memory": no_memory,
    "last_pass": lambda patch: patch.setattr(PartRanks, "counts", property(fail)),
    "rows": lambda patch: patch.setattr(PassRows, "partial", fail),
    "owners": lambda patch: patch.setattr(Ownership, "of", fail),
    "packed": lambda patch: patch.setattr(TrajectoryPart, "packed", fail),
}


def said_by(call: Callable[[], Any], rank: int, how: str) -> dict[str, Any]:
    """What a call says where something is broken on rank 1, and whether it has numbers in the next call; the training's
    next collective is one of all ranks each time."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            BROKEN[how](patch)
        try:
            call()
            found["said"] = "nothing"
        except Exception as error:
            found["said"] = f"{type(error).__name__}: {error}"
    for _ in range(2):
        ones = torch.ones(2)
        dist.all_reduce(ones)
        found.setdefault("training", []).append(ones.tolist() == [dist.get_world_size()] * 2)
        found["then"] = found.get("then") or bool(call())
    return found


def of_parts(call: str, how: str, rank: int, world: int) -> dict[str, Any]:
    """A call of a metric of single samples under tensor parallelism."""
    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    metric = PerSampleGradNorms(loss_reduction="mean", prove=False)
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        for x, y in data_of([0])[0][:2]:
            metric.set_ids(range(len(x)))
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        calls: dict[str, Callable[[], Any]] = {
            "sync_norms": lambda: bool((metric.sync_norms(timeout=20) > 0).all()),
            "sync_scores": lambda: len(metric.sync_scores(timeout=20)) == len(x),
        }
        return said_by(calls[call], rank, how)


def of_all(call: str, how: str, rank: int, world: int) -> dict[str, Any]:
    """A call of metrics under DDP."""
    model = nn.parallel.DistributedDataParallel(made())
    norms = PerSampleGradNorms(loss_reduction="mean", prove=False)
    sketched = call == "sync_sketches"
    moves = Trajectory(mode="sketch", buckets=256, keep_every=1) if sketched else Trajectory()
    optimizer, monitor = monitored(model, metrics=[norms, moves], window_steps=None if call == "sync" else 1)
    with monitor:
        for x, y in data_of(range(world))[rank][:2]:
            norms.set_ids(range(len(x)))
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        calls: dict[str, Callable[[], Any]] = {
            "sync": lambda: moves.sync(timeout=20).update_norm["total"].last.value > 0,
            "sync_sketches": lambda: len(moves.sync_sketches(timeout=20).steps) > 0,
            "sync_scores": lambda: len(norms.sync_scores(timeout=20)) == len(x),
            "global_window": lambda: monitor.global_window() is not None,
        }
        return said_by(calls[call], rank, how)


WAYS = (
    *((of_parts, "sync_norms", how) for how in ("memory", "last_pass")),
    *((of_parts, "sync_scores", how) for how in ("memory", "rows")),
    *((of_all, "sync", how) for how in ("memory", "owners", "packed")),
    (of_all, "sync_sketches", "memory"),
    *((of_all, call, "memory") for call in ("sync_scores", "global_window")),
    (of_all, "global_window", "owners"),
)


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    for work in (counted, layouts):
        yield work.__name__, ranks, quiet(work)
    for of, call, how in WAYS if ranks == 2 else ():
        yield f"{of.__name__}.{call}.{how}", ranks, quiet(functools.partial(of, call, how))
