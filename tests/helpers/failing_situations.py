"""Situations in which one rank raises an error while the ranks add up a window: the others are not left in a
collective, the metric is left out of that window by name, and all other numbers are those of a run in which nothing is
raised."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_situations import STATS, STEPS, WINDOW, Columns, data_of, flat_of, made, planned, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory, reference
from lipcore.distributed.packed import Packed
from lipcore.lipschitz.rank_part import LipschitzPart
from lipcore.metric.rank_part import RankPart
from lipcore.per_sample.rank_part import PerSamplePart
from lipcore.tensor_stats.rank_part import TensorStatsPart
from lipcore.trajectory.rank_part import TrajectoryPart
from lipcore.trajectory.sketch_part import SketchPart

DDP = nn.parallel.DistributedDataParallel
PARTS: dict[str, type[RankPart]] = {
    "trajectory": TrajectoryPart,
    "lipschitz": LipschitzPart,
    "tensor_stats": TensorStatsPart,
    "per_sample_grad_norm": PerSamplePart,
}
STAGES = {
    "trajectory": ("packed", "hear", "sizes_off"),
    "lipschitz": ("sums", "told"),
    "tensor_stats": ("sums", "result"),
    "per_sample_grad_norm": ("packed", "sums", "refused"),
}
_kept: dict[str, Any] = {}  # the run in which nothing is raised
BROKEN = 1  # the window in which it is raised, of three


def metrics(sketches: bool = False) -> list[Any]:
    trajectory = (
        Trajectory(mode="sketch", buckets=256, stats=["update_norm", "grad_norm"])
        if sketches
        else Trajectory(stats=STATS)
    )
    return [trajectory, Lipschitz(), TensorStats(every_steps=1), PerSampleGradNorms(loss_reduction="mean")]


def broken(patch: Any, kind: type[RankPart], stage: str) -> None:
    """Have the parts of this kind raise on this rank."""

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError('no "number"\nhere')

    if stage == "told":
        patch.setattr(kind, "told", property(fail))
    elif stage in ("sums", "sizes_off"):
        before = kind.packed

        def packed(self: Any) -> Packed:
            found = before(self)
            if stage == "sizes_off":
                found.largest = [*found.largest, torch.zeros(3, dtype=torch.float64)]
                return found
            return Packed(fail, found.largest)

        patch.setattr(kind, "packed", packed)
    else:
        patch.setattr(kind, stage, fail)


class Counted:
    """The numbers of collectives of each kind that this rank has made."""

    def __init__(self, patch: Any) -> None:
        self.calls: list[str] = []
        for name in ("all_reduce", "all_gather"):
            patch.setattr(dist, name, functools.partial(self._call, getattr(dist, name), name))

    def _call(self, before: Callable[..., Any], name: str, *arguments: Any, **keywords: Any) -> Any:
        self.calls.append(name)
        return before(*arguments, **keywords)


def windows_of(model: nn.Module, data: Any, chosen: list[Any], fails: Callable[[Any], None] | None) -> Any:
    """The windows of all ranks, what collectives each merge has made, and the training's next all-reduce behind it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found: list[Any] = []
    calls: list[list[str]] = []
    monitor = Monitor(model, optimizer, chosen, window_steps=WINDOW, timeout=20)
    with monitor, pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        for step in range(STEPS):
            train(model, optimizer, data, steps=[step % STEPS])
            if (step + 1) % WINDOW:
                continue
            counted.calls.clear()
            with pytest.MonkeyPatch.context() as inner:
                if fails is not None and len(found) == BROKEN:
                    fails(inner)
                found.append(monitor.global_window())
            calls.append(list(counted.calls))
            ones = torch.ones(2)
            dist.all_reduce(ones)
            assert ones.tolist() == [dist.get_world_size()] * 2
    return found, calls


def compared(found: list[Any], right: list[Any], name: str) -> dict[str, Any]:
    """The largest relative error of numbers that are to be there, and what is left out by window."""
    worst, where = 0.0, ""
    for i, (window, other) in enumerate(zip(found, right, strict=True)):
        numbers = flat_of(window)
        for key, value in flat_of(other).items():
            gone = i == BROKEN and key.startswith(f"{name}/")
            begins_anew = i > BROKEN and key.startswith((f"{name}/noise_scale", f"{name}/path_length.cumulative"))
            if gone or begins_anew or key.startswith(f"{name}/directness") or math.isnan(value):
                continue
            error = abs(numbers.get(key, math.inf) - value) / max(abs(value), 1e-12)
            worst, where = (error, f"{i} {key}") if error > worst else (worst, where)
    return {"error": worst, "where": where, "off": [window.off for window in found], "absent": [], "scopes": ["global"]}


def raised(name: str, stage: str, rank: int, world: int) -> dict[str, Any]:
    data = data_of(range(world))[rank]
    if "right" not in _kept:
        _kept["right"] = windows_of(DDP(made()), data, metrics(), None)
    right, usual = _kept["right"]
    fails = (lambda patch: broken(patch, PARTS[name], stage)) if rank == 1 else None
    found, calls = windows_of(DDP(made()), data, metrics(), fails)
    return compared(found, right, name) | {"usual": usual, "calls": calls}


def sketches(rank: int, world: int) -> dict[str, Any]:
    data = data_of(range(world))[rank]
    right, usual = windows_of(DDP(made()), data, metrics(sketches=True), None)
    fails = (lambda patch: broken(patch, SketchPart, "packed")) if rank == 1 else None
    found, calls = windows_of(DDP(made()), data, metrics(sketches=True), fails)
    return compared(found, right, "trajectory") | {"usual": usual, "calls": calls}


def in_parts(stage: str, rank: int, world: int) -> dict[str, Any]:
    """Tensor parallelism: the ranks that hold parts of samples' gradients add these up by themselves before."""
    mesh, data = init_device_mesh("cpu", (world,)), data_of([0])[0]

    def chosen() -> list[Any]:
        return [Trajectory(stats=["update_norm"]), PerSampleGradNorms(loss_reduction="mean")]

    right, usual = windows_of(planned(made(Columns), mesh), data, chosen(), None)
    fails = (lambda patch: broken(patch, PerSamplePart, stage)) if rank == 1 else None
    found, calls = windows_of(planned(made(Columns), mesh), data, chosen(), fails)
    return compared(found, right, "per_sample_grad_norm") | {"usual": usual, "calls": calls}


def of_the_open_window(rank: int, world: int) -> Any:
    """A metric's own call raises on both ranks, and not in one alone; the next call has the numbers."""
    metric = Trajectory(stats=["update_norm"])
    model = DDP(made())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: Any = []
    with Monitor(model, optimizer, [metric], window_steps=None, timeout=20):
        train(model, optimizer, data_of(range(world))[rank], steps=range(2))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                broken(patch, TrajectoryPart, "packed")
            try:
                metric.sync()
            except ValueError as error:
                found.append(str(error))
        found.append(metric.sync().update_norm["total"].last.value > 0)
    return found


def huge(rank: int, world: int) -> dict[str, Any]:
    """Outputs of 1e100 on one rank alone, of which the fourth powers leave float64, beside one process."""
    found = {}
    for size in (1.0, 1e60, 1e100, 1e160):
        net = made(lambda: nn.Linear(6, 1))
        model = DDP(net)
        batches = [each[0][0] * (size if i == 0 else 1.0) for i, each in enumerate(data_of(range(world)))]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        with Monitor(model, optimizer, [TensorStats(every_steps=1)], window_steps=1, timeout=20) as monitor:
            (model(batches[rank]).mean() / size).backward()
            optimizer.step()
            window = monitor.global_window()
        ones = torch.ones(2)
        dist.all_reduce(ones)
        assert ones.tolist() == [world] * 2
        with torch.no_grad():
            outputs = torch.cat([net(batch) for batch in batches])
        scaled = outputs / size  # in the range of float64
        n, mean, m2, _, m4, *_ = reference.tensor_stats([scaled])[0][0].tolist()
        values = window["tensor_stats"].output["(model)"]
        found[str(size)] = {
            "expected": {"mean": mean * size, "sd": math.sqrt(m2 / n) * size, "kurtosis": n * m4 / m2**2}
            | {"min": outputs.min().item(), "max": outputs.max().item()},
            "found": {name: [values[name].value, values[name].valid, values[name].note] for name in
                      ("mean", "sd", "kurtosis", "min", "max")},
            "off": window.off,
        }  # fmt: skip
    return found


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, number of ranks and work of each; those that need more ranks than there are left out."""
    for name in PARTS:
        for stage in STAGES[name]:
            yield f"{name}.{stage}", 2, functools.partial(raised, name, stage)
    yield "sketches", 2, sketches
    for stage in ("partials", "packed"):
        yield f"in_parts.{stage}", 2, functools.partial(in_parts, stage)
    yield "of_the_open_window", 2, of_the_open_window
    yield "huge", 2, huge
