"""Situations of what ranks that hold parts of the parameters (tensor parallelism) are given: the same samples, other
ones under the same ids, or parts of the sequences that a plan brings together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rank_situations import made
from sample_situations import NAME, mean_loss, monitored, quiet
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import PerSampleGradNorms


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.tanh(self.a(x)))
        return found


def squares(x: Tensor) -> list[Tensor]:
    """The norms of single samples in one process."""
    model, found = made(Pair), []
    for i in range(len(x)):
        model.zero_grad()
        mean_loss(model(x[i : i + 1]), torch.zeros(1, *x.shape[1:])).backward()
        found.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt())
    return found


def said_by(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except ValueError as error:
        return [str(error)]
    return []


def given(way: str, rank: int, world: int) -> dict[str, Any]:
    """The error of the norms, or what each call says."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64)
    mine = {"halves": x.chunk(world, 1)[rank], "other": x + rank, "other_order": x.roll(rank, 0)}.get(way, x)
    plan = {
        "a": ColwiseParallel(input_layouts=Shard(1) if way == "halves" else Replicate()),
        "b": RowwiseParallel(),
    }
    model = parallelize_module(made(Pair), init_device_mesh("cpu", (world,)), plan)
    norms = PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[norms], window_steps=1)
    found: dict[str, Any] = {"said": []}
    with monitor:
        norms.set_ids(range(len(mine)))
        mean_loss(model(mine), torch.zeros(x.shape)).backward()
        found["said"] += said_by(norms.sync_norms)
        optimizer.step()
        found["said"] += said_by(norms.sync_scores)
        window = monitor.global_window()
    found["off"] = window[NAME].details.get("norms_off", "")
    found["numbers"] = len(window[NAME].flat())
    if not found["said"]:
        found["error"] = float((norms.per_sample - torch.stack(squares(x))).abs().max())
    return found


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, number of ranks and work of each."""
    for way in ("same", "halves", "other", "other_order"):
        yield way, ranks, quiet(functools.partial(given, way))
