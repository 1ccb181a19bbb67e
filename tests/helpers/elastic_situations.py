"""Situations of ranks that go on in another process group, in the same processes, with another wrapper of the model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from odd_situations import next_group
from rank_situations import WINDOW, Columns, data_of, fsdp, made, planned
from sample_situations import NAME, Truth, compared, mean_loss, quiet
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

from lipcore import Monitor, PerSampleGradNorms, Trajectory

DDP = nn.parallel.DistributedDataParallel


def monitor_of(model: nn.Module, optimizer: Any, **settings: Any) -> Monitor:
    metrics = [PerSampleGradNorms(loss_reduction="mean"), Trajectory(stats=["update_norm"])]
    return Monitor(model, optimizer, metrics, window_steps=WINDOW, timeout=20, **settings)


def trained(model: nn.Module, optimizer: Any, monitor: Monitor, data: Any, *, ids: bool = False) -> list[Any]:
    """Return the windows of all ranks that a training on these batches brings."""
    norms: Any = monitor.metrics[NAME]
    found = []
    for x, y in data:
        if ids:
            norms.set_ids(range(len(x)))
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()
        if (window := monitor.global_window()) is not None:
            found.append(window)
    return found


def gone_on(way: str, rank: int, world: int) -> Any:
    """A window in one group, the others in another one of as many ranks."""
    inner = made()
    batches = data_of(range(world))[rank]
    group = dist.new_group(list(range(world))) if way == "group" else None
    given = {} if group is None else {"group": group}
    model = DDP(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    monitor = monitor_of(model, optimizer, **given)

    found = trained(model, optimizer, monitor, batches[:WINDOW])
    dist.barrier()
    dist.destroy_process_group()
    next_group(rank, world)
    model = DDP(inner)
    if way == "rebind":
        monitor.rebind()
    if way == "group":
        try:
            monitor.global_window()
        except ValueError as error:
            return str(error)
    if way == "remedy":
        state = monitor.state_dict()
        monitor.close()
        monitor = monitor_of(model, optimizer)
        monitor.load_state_dict(state)
    found += trained(model, optimizer, monitor, batches[WINDOW:])
    monitor.close()
    if way == "remedy":
        return compared(found, Truth(made()).windows(data_of(range(world))))
    norms = found[-1][NAME]
    moved = found[-1]["trajectory"].update_norm["total"].mean.value > 0
    return {"unrecorded": norms.details["unrecorded"], "off": norms.details["noise_scale_off"], "moved": moved}


def cut(world: int, plan: bool) -> nn.Module:
    """A model on a mesh of two dimensions, each with process groups of its own."""
    if plan:
        return planned(made(Columns), init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))["tp"])
    return fsdp(made(), init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "fs")))


def words_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def on_a_mesh(way: str, rank: int, world: int) -> Any:
    """A window in one group, the others in another one, behind a model of which each rank holds parts."""
    batches, plan = data_of([0] if way == "plan" else range(world)), way == "plan"
    mine = batches[0 if plan else rank]
    model = cut(world, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    monitor = monitor_of(model, optimizer)
    norms: Any = monitor.metrics[NAME]

    found = trained(model, optimizer, monitor, mine[:WINDOW], ids=True)
    state = {"model": model.state_dict(), "lipcore": monitor}
    state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    folder = os.path.join(os.environ["LIPCORE_TEST_FOLDER"], f"saved_{way}")
    dcp.save(state, checkpoint_id=folder)
    dist.barrier()
    dist.destroy_process_group()
    next_group(rank, world)
    calls: dict[str, Callable[[], Any]] = (
        {"sync_norms": norms.sync_norms, "sync_scores": norms.sync_scores}
        if plan
        else {"Monitor": lambda: monitor_of(model, optimizer), "rebind": monitor.rebind}
    )
    said = {name: words_of(call) for name, call in calls.items()}
    monitor.close()
    model = cut(world, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    blank = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    monitor = monitor_of(model, optimizer)
    dcp.load(blank | {"lipcore": monitor}, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, blank["optimizer"])
    found += trained(model, optimizer, monitor, mine[WINDOW:], ids=True)
    monitor.close()
    truth = Truth(made(Columns) if plan else made())
    return {"said": said, **compared(found, truth.windows(batches))}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, number of ranks and work of each."""
    for way in ("remedy", "left_as_it_is", "rebind", "group"):
        yield way, ranks, quiet(functools.partial(gone_on, way))
    for way in ("plan", "fsdp2"):
        yield f"mesh_{way}", ranks, quiet(functools.partial(on_a_mesh, way))
