"""Situations of what ranks do between the call that all of them have made and its collectives: who holds what is said
in the store; what one rank alone raises leaves no other in a collective."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from rank_situations import STEPS, WINDOW, Columns, data_of, fsdp, made, planned
from sample_situations import collectives, mean_loss, monitored, quiet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import PerSampleGradNorms, Trajectory
from lipcore.distributed.layouts import layout_of, place_of
from lipcore.distributed.ownership import describe
from lipcore.models.torch_internals import shard_of

NAME = "per_sample_grad_norm"


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


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    for work in (counted, layouts):
        yield work.__name__, ranks, quiet(work)
