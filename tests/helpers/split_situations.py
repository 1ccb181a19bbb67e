"""Situations of ranks that share the parameters which they hold alike, each beside the same training without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pipeline import run_stage, stage_of
from rank_situations import (
    STATS,
    STEPS,
    WINDOW,
    Columns,
    data_of,
    errors,
    flat_of,
    fsdp,
    made,
    merged,
    monitored,
    planned,
    train,
    truth,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import TensorStats, Trajectory
from lipcore.metric.results import Window

DDP = nn.parallel.DistributedDataParallel
#: Of a window's numbers, those that mode "updates" has.
MOVES = ("update_norm", "update_ratio", "max_abs_update", "path_length", "weight_norm", "unmoved_steps")
SNAPSHOT = {"mode": "updates", "source": "snapshot", "stats": (*MOVES, "grad_norm", "clipped_grad_norm")}


def split(wrap: Callable[[Any], Any], world: int, rank: int, kind: Any = None, **settings: Any) -> dict[str, Any]:
    """How far global windows are from those of one process, and from those without shares; what each rank keeps."""
    alike = kind is Columns
    ranks = [0] if alike else list(range(world))
    data = data_of(ranks)[0 if alike else rank]
    model = [] if kind is None else [kind]
    settings = {"stats": STATS} | settings
    shared = Trajectory(**settings, split_replicas=True)
    found = merged(wrap(made(*model)), data, metrics=[shared])
    without = merged(wrap(made(*model)), data, metrics=[whole := Trajectory(**settings)])
    expected = truth(made(*model), data_of(ranks))
    if settings.get("mode") == "updates":
        gone = ("distance", "directness", "variance")
        expected = [{k: v for k, v in e.items() if not any(word in k for word in gone)} for e in expected]
    apart = 0.0
    for one, other in zip(found, without, strict=True):
        one, other = flat_of(one), flat_of(other)
        assert one.keys() == other.keys(), one.keys() ^ other.keys()
        for key, value in other.items():
            error = 0.0 if one[key] == value else abs(one[key] - value) / max(abs(value), 1e-12)
            apart = max(apart, math.inf if math.isnan(error) and not math.isnan(value) else error)
    state = [sum(line.bytes for line in each.plan()) for each in (shared, whole)]
    copies = [sum(t.numel() for t in each._built.main.copies.prev) if each._built.main.copies else 0
              for each in (shared, whole)]  # fmt: skip
    return errors(found, expected) | {"apart": apart, "bytes": state, "copies": copies, "kept": _kept(shared)}


def _kept(trajectory: Trajectory) -> list[str]:
    return [one.name for one in trajectory._watched]


def ddp(rank: int, world: int) -> dict[str, Any]:
    return split(DDP, world, rank)


def ddp_snapshot(rank: int, world: int) -> dict[str, Any]:
    return split(DDP, world, rank, **SNAPSHOT)


def ddp_updates(rank: int, world: int) -> dict[str, Any]:
    return split(DDP, world, rank, mode="updates", stats=SNAPSHOT["stats"])


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    """Nothing is held twice, and so all is as without."""
    return split(fsdp, world, rank)


def hsdp(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    return split(lambda model: fsdp(model, mesh), world, rank)


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    """What is outside the plan is held by both."""
    mesh = init_device_mesh("cpu", (world,))
    return split(lambda model: planned(model, mesh), world, rank, Columns)


def local_windows(rank: int, world: int) -> dict[str, Any]:
    """A rank's own windows have what it keeps, and say so; rebind() keeps the shares; the open window is whole."""
    trajectory = Trajectory(stats=STATS, split_replicas=True)
    model = DDP(made())
    optimizer, monitor = monitored(model, metrics=[trajectory])
    data = data_of(range(world))[rank]
    expected = truth(made(), data_of(range(world)))
    with monitor:
        train(model, optimizer, data, lambda step: monitor.global_window(), range(WINDOW))
        own = monitor.history[0]
        before = _kept(trajectory)
        monitor.rebind()
        assert _kept(trajectory) == before
        monitor._windows.steps = None
        train(model, optimizer, data, steps=range(WINDOW, STEPS))
        window = Window(1, WINDOW + 1, STEPS, False, "global", {"trajectory": trajectory.sync()})
    places = {key.split("/")[-1] for key in own.flat("tensor")} - {"total"}
    numbers = {key: value for key, value in expected[1].items() if "cumulative" not in key and "directness" not in key}
    found = errors([window], [numbers])
    return found | {"scope": own.scope, "places": sorted(places), "kept": before,
                    "details": own["trajectory"].details["kept_by_other_ranks"]}  # fmt: skip


class Unused(nn.Module):
    """Layers that rarely run, or never, and the largest parameter among them."""

    def __init__(self, every: int = 3) -> None:
        super().__init__()
        self.large, self.a, self.b = nn.Linear(6, 60, bias=False), nn.Linear(6, 4), nn.Linear(4, 1)
        self.c, self.calls, self.every = nn.Linear(60, 1), 0, every

    def forward(self, x: Any) -> Any:
        self.calls += 1
        y = self.b(self.a(x).tanh())
        return y if self.calls % self.every else y + self.c(self.large(x))


def _without_gradients(rank: int, world: int, every: int) -> dict[str, Any]:
    data = data_of(range(world))[rank]
    windows = []
    for shares in (True, False):
        torch.manual_seed(0)
        model = DDP(Unused(every).double(), find_unused_parameters=True)
        stats = (*STATS, "clipped_grad_norm")
        windows.append(merged(model, data, metrics=[Trajectory(stats=stats, split_replicas=shares)]))
    one, other = ([flat_of(window) for window in each] for each in windows)
    keys = [mine.keys() ^ theirs.keys() for mine, theirs in zip(one, other, strict=True)]
    pairs = [(key, mine[key], theirs[key]) for mine, theirs in zip(one, other, strict=True)
             for key in theirs.keys() & mine.keys()]  # fmt: skip
    apart = [key for key, x, y in pairs if str(x) != str(y) and not math.isclose(x, y, rel_tol=1e-12)]
    gradients = sum("grad_norm.mean" in key for key in other[0])
    return {"keys": sorted(set().union(*keys)), "apart": sorted(apart), "gradients": gradients}


def sometimes_unused(rank: int, world: int) -> dict[str, Any]:
    return _without_gradients(rank, world, 3)


def unused(rank: int, world: int) -> dict[str, Any]:
    return _without_gradients(rank, world, 1000)


def frozen(rank: int, world: int) -> Any:
    """All that rank 0 keeps is frozen; what is said then is the remedy, too."""
    net = nn.Sequential(nn.Linear(6, 50, bias=False), nn.Linear(50, 2, bias=False), nn.Linear(2, 1, bias=False))
    model = DDP(net.double(), find_unused_parameters=True)
    data = data_of(range(world))[rank]
    optimizer, monitor = monitored(model, metrics=[Trajectory(stats=STATS, split_replicas=True)])
    with monitor:
        train(model, optimizer, data, lambda step: monitor.global_window(), range(WINDOW))
        net[0].requires_grad_(False)
        try:
            monitor.rebind()
        except ValueError as error:
            said = str(error)
    optimizer, monitor = monitored(model, metrics=[shared := Trajectory(stats=STATS, split_replicas=True)])
    with monitor:
        train(model, optimizer, data, lambda step: monitor.global_window(), range(WINDOW))
        return {"said": said, "kept": _kept(shared), "windows": len(monitor.history)}


def rebinds(rank: int, world: int) -> dict[str, Any]:
    """Parameters are frozen and thawed between windows, of which none has been merged yet when they are."""
    data, found = data_of(range(world))[rank], []
    for shares in (True, False):
        model = DDP(made(), find_unused_parameters=True)
        own = [Trajectory(stats=STATS, split_replicas=shares), TensorStats(every_steps=1)]
        optimizer, monitor = monitored(model, metrics=own)
        change = list(model.module.parameters())[1]
        with monitor:
            train(model, optimizer, data, steps=range(WINDOW - 1))
            change.requires_grad_(False)
            monitor.rebind()
            monitor.global_window()
            train(model, optimizer, data, steps=range(WINDOW - 1, WINDOW))
            change.requires_grad_(True)
            monitor.rebind()
            monitor.global_window()
            train(model, optimizer, data, steps=range(WINDOW, STEPS))
            monitor.global_window()
            own[0].set_reference()
            train(model, optimizer, data, steps=range(WINDOW))
            monitor.global_window()
        found.append([(dict(each.off), flat_of(each)) for each in monitor.global_history])
    off = [one for each in found for one, _ in each if one]
    pairs = [(one[1], other[1]) for one, other in zip(*found, strict=True)]
    missing = {key.split("/")[1] for one, other in pairs for key in one.keys() ^ other.keys()}
    apart = [key for one, other in pairs for key in one.keys() & other.keys()
             if str(one[key]) != str(other[key]) and not math.isclose(one[key], other[key], rel_tol=1e-9)]  # fmt: skip
    last = sorted(pairs[-1][0].keys() ^ pairs[-1][1].keys())
    return {"windows": len(pairs), "last": last, "off": off, "missing": sorted(missing), "apart": apart}


def independent(rank: int, world: int) -> Any:
    return merged(made(seed=rank), data_of([rank])[0], metrics=[Trajectory(split_replicas=True)])


def apart(rank: int, world: int) -> Any:
    return monitored(made(seed=rank), metrics=[Trajectory(split_replicas=True)], group=None)


def pipeline(rank: int, world: int) -> Any:
    """The ranks hold other parameters, of which each would leave some to the other."""
    stage = stage_of(made(), rank)
    metrics = [Trajectory(split_replicas=True)]
    optimizer, monitor = monitored(stage, metrics=metrics, prefix=f"stages.{rank}")
    with monitor:
        for x, y in data_of([0])[0][:WINDOW]:
            optimizer.zero_grad()
            run_stage(stage, rank, x, y)
            optimizer.step()
        return monitor.global_window()


def too_many(rank: int, world: int) -> Any:
    model = DDP(nn.Linear(3, 1, bias=False))
    return Trajectory(model, split_replicas=True)


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    two = (
        ddp,
        ddp_snapshot,
        ddp_updates,
        fsdp2,
        tensor_parallel,
        local_windows,
        sometimes_unused,
        unused,
        frozen,
        rebinds,
        independent,
        apart,
        pipeline,
        too_many,
    )
    for work in two if ranks == 2 else (hsdp,):
        yield work.__name__, ranks, work
