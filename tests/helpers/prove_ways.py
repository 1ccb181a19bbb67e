"""Ways to wrap a model in which all ranks run a proof together: what it says, and that training does not notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from prove_situations import NAME, batch_of, local, made, monitored, train
from rank_situations import Columns, fsdp, planned
from sample_situations import quiet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import PerSampleGradNorms, Trajectory

DDP = nn.parallel.DistributedDataParallel


def plain() -> nn.Module:
    return made(drops=False)


def hsdp(world: int) -> Any:
    return fsdp(plain(), init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))


def late_hsdp(world: int) -> Any:
    """A replica begins when the other has made its first pass, in which it finds itself alone."""
    model = hsdp(world)
    time.sleep(2.0 * (torch.distributed.get_rank() // (world // 2)))
    return model


def tensor_parallel(world: int) -> Any:
    torch.manual_seed(0)
    return planned(Columns().double(), init_device_mesh("cpu", (world,)))


def static_graph(world: int) -> Any:
    return DDP(plain(), static_graph=True)


def compiled_ddp(world: int) -> Any:
    return torch.compile(DDP(plain()), backend="aot_eager")


def compiled_fsdp2(world: int) -> Any:
    return torch.compile(fsdp(plain()), backend="aot_eager")


#: How a model is wrapped, on how many ranks, and before which steps proofs begin.
WAYS: dict[str, tuple[Callable[[int], Any], int, tuple[int, ...]]] = {
    "hsdp": (hsdp, 4, (0, 2)),
    "late_hsdp": (late_hsdp, 4, (2,)),
    "tensor_parallel": (tensor_parallel, 2, (0, 2)),
    "static_graph": (static_graph, 2, (0, 2)),
    "compiled_ddp": (compiled_ddp, 2, (0,)),
    "compiled_fsdp2": (compiled_fsdp2, 2, (0,)),
}


def proved(rank: int, world: int, make: Callable[[int], Any], at: int) -> dict[str, Any]:
    """Answers of proofs before step `at` and two steps later, and whether weights are those of a training without."""
    found: dict[str, Any] = {"answers": [], "kept": ""}
    weights = []
    alike = make is tensor_parallel  # all ranks have the same samples
    for asks in (False, True):
        torch._dynamo.reset()
        model = make(world)
        optimizer, monitor = monitored(model, [PerSampleGradNorms(loss_reduction="mean"), Trajectory()])
        for step in range(6):
            if asks and step in (at, at + 2):
                try:
                    found["answers"].append(monitor.prove(batch_of(0 if alike else rank, 100 + step))[NAME])
                except Exception as error:
                    found["answers"].append(f"{type(error).__name__}: {error}")
            train(model, optimizer, 0 if alike else rank, range(step, step + 1))
        try:
            monitor.close()
        except Exception as error:
            found["kept"] = f"{type(error).__name__}: {error}"
        weights.append([local(p).tolist() for p in model.parameters()])
        if asks:
            norms = [window[NAME].norm for window in monitor.history if NAME in window.results]
            found["labels"] = [each["total"].mean.label for each in norms if "total" in each]
    return found | {"weights": weights[0] == weights[1]}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    for name, (make, world, steps) in WAYS.items():
        for at in steps if world == ranks else ():
            work = quiet(lambda rank, world, make=make, at=at: proved(rank, world, make, at))  # type: ignore[misc]
            yield f"{name}_at_{at}", world, work
