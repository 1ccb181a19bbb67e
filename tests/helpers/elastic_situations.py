"""Situations of ranks that go on in another process group, in the same processes, with another wrapper of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from odd_situations import next_group
from rank_situations import STEPS, WINDOW, data_of, made
from sample_situations import NAME, Truth, compared, mean_loss, quiet
from torch import nn

from lipcore import Monitor, PerSampleGradNorms, Trajectory

DDP = nn.parallel.DistributedDataParallel


def monitor_of(model: nn.Module, optimizer: Any, **settings: Any) -> Monitor:
    metrics = [PerSampleGradNorms(loss_reduction="mean"), Trajectory(stats=["update_norm"])]
    return Monitor(model, optimizer, metrics, window_steps=WINDOW, timeout=20, **settings)


def gone_on(way: str, rank: int, world: int) -> Any:
    """A window in one group, the others in another one of as many ranks."""
    inner, found = made(), []
    batches = data_of(range(world))[rank]
    group = dist.new_group(list(range(world))) if way == "group" else None
    given = {} if group is None else {"group": group}
    model = DDP(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
    monitor = monitor_of(model, optimizer, **given)

    def train(steps: range) -> None:
        for x, y in (batches[step] for step in steps):
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)

    train(range(WINDOW))
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
    train(range(WINDOW, STEPS))
    monitor.close()
    if way == "remedy":
        return compared(found, Truth(made()).windows(data_of(range(world))))
    norms = found[-1][NAME]
    moved = found[-1]["trajectory"].update_norm["total"].mean.value > 0
    return {"unrecorded": norms.details["unrecorded"], "off": norms.details["noise_scale_off"], "moved": moved}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, number of ranks and work of each."""
    for way in ("remedy", "left_as_it_is", "rebind", "group"):
        yield way, ranks, quiet(functools.partial(gone_on, way))
