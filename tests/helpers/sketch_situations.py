"""Situations of several ranks for Trajectory(mode="sketch"), each beside one float64 process that sketches each part of
each parameter once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_situations import STEPS, WINDOW, Columns, Data, data_of, errors, fsdp, made, planned, snapshot
from sample_situations import quiet
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lipcore
from lipcore import Monitor, Trajectory
from lipcore.functional import sketch
from lipcore.models.torch_internals import shard_of
from lipcore.trajectory.sketch_places import start_of

BUCKETS, SEED = 256, 3
STATS = ("update_norm", "update_ratio", "path_length", "weight_norm", "distance", "directness", "variance", "grad_norm")
DDP = nn.parallel.DistributedDataParallel


def sketched(**settings: Any) -> Trajectory:
    given = {"mode": "sketch", "buckets": BUCKETS, "seed": SEED, "keep_every": 1, "stats": STATS} | settings
    return Trajectory(**given)


def trained(model: nn.Module, batches: Sequence[Data], kind: Callable[[], nn.Module]) -> list[list[Tensor]]:
    """All points of one process with all data."""
    twin = made(kind)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    points = [snapshot(twin)]
    for step in range(STEPS):
        optimizer.zero_grad()
        for data in batches:
            x, y = data[step]
            (F.mse_loss(twin(x), y) / len(batches)).backward()
        optimizer.step()
        points.append(snapshot(twin))
    return points


def pieces_of(model: nn.Module) -> list[tuple[int, int, Any, Any, int]]:
    """Rank that counts it, number of the parameter, shape and offset of each different piece, and how many ranks have
    it."""
    mine = []
    for i, parameter in enumerate(model.parameters()):
        whole = tuple(parameter.shape)
        place: Any = shard_of(parameter) if hasattr(parameter, "placements") else (whole, (0,) * len(whole))
        mine.append((i, tuple(place[0]), tuple(place[1])))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {}
    for piece in dict.fromkeys(piece for theirs in everyone for piece in theirs):
        holders = [rank for rank, theirs in enumerate(everyone) if piece in theirs]
        found[piece] = (holders[0], *piece, len(holders))
    return list(found.values())


def of_all(model: nn.Module, points: list[list[Tensor]]) -> tuple[list[dict[str, float]], Tensor]:
    """Numbers of windows, and the sketches of the whole model at all points."""
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    starts, after = [], 0
    for tensor in points[0]:
        starts.append(after)
        after += -(-tensor.numel() // 64) * 64
    rows: dict[str, dict[Any, list[Tensor]]] = {}
    for rank, i, shape, offset, copies in pieces_of(model):
        at = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
        first = starts[i] + start_of(points[0][i].shape, shape, offset)
        each = [sketch([point[i][at].contiguous()], [first], buckets=BUCKETS, seed=SEED) for point in points]
        of_group = rows.setdefault(lipcore.by_block(names[i]), {})
        of_group.setdefault((rank, copies), []).append(torch.stack(each))
    groups = {name: torch.stack([sum(each) for each in of.values()], dim=1) for name, of in rows.items()}  # type: ignore[arg-type]
    whole = sum(group.sum(1) for group in groups.values())
    groups["total"] = torch.cat(list(groups.values()), dim=1)
    weights = {
        place: [
            float(sum(point[i].square().sum() for i, n in enumerate(names) if place in ("total", lipcore.by_block(n))))
            ** 0.5
            for point in points
        ]
        for place in groups
    }
    windows = []
    for begin in range(0, STEPS, WINDOW):
        found = {}
        for place, at_points in groups.items():
            found |= {
                f"trajectory/{key}/{place}": value
                for key, value in numbers(at_points, begin, weights[place][begin + WINDOW]).items()
            }
        windows.append(found)
    return windows, whole  # type: ignore[return-value]


def numbers(at: Tensor, begin: int, weight: float) -> dict[str, float]:
    """What follows from sketches [points, sketches, buckets] that have no element in common."""
    end = begin + WINDOW
    norm = lambda tensor: float(tensor.square().sum().sqrt())  # noqa: E731
    updates = [norm(at[t] - at[t - 1]) for t in range(1, end + 1)]
    window = updates[begin:]
    deviations = at[begin : end + 1] - at[begin : end + 1].mean(0)
    return {
        "update_norm.last": window[-1],
        "update_norm.mean": sum(window) / WINDOW,
        "update_norm.max": max(window),
        "update_ratio.last": window[-1] / norm(at[end]),
        "path_length.sum": sum(window),
        "path_length.cumulative": sum(updates),
        "distance.last": norm(at[end] - at[0]),
        "directness.last": norm(at[end] - at[0]) / sum(updates),
        "variance.last": float(deviations.square().sum()) / (WINDOW + 1),
        "weight_norm.last": weight,
    }


def merged(model: nn.Module, data: Data, **settings: Any) -> tuple[list[Any], Any]:
    """The global windows of a run, and the kept sketches of all ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found: list[Any] = []
    trajectory = sketched(**settings)
    with Monitor(model, optimizer, metrics=[trajectory], window_steps=WINDOW, timeout=20) as monitor:
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = data[step]
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
        return found, trajectory.sync_sketches()


def compared(model: nn.Module, data: Sequence[Data], own: Data, kind: Any, **settings: Any) -> dict[str, Any]:
    points = trained(model, data, kind)
    expected, whole = of_all(model, points)
    windows, kept = merged(model, own, **settings)
    out = errors(windows, expected)
    out["sketches"] = float((kept.matrix - whole).norm() / whole.norm())
    far = []
    for place in ("total", "a", "b"):
        members = [
            i
            for i, (name, _) in enumerate(model.named_parameters())
            if place in ("total", lipcore.by_block(name.removeprefix("module.")))
        ]
        at = [torch.cat([point[i].flatten() for i in members]) for point in points]
        distance = windows[-1]["trajectory"]["distance"][place].last
        true = float((at[-1] - at[0]).norm())
        far.append(abs(distance.value - true) / max(distance.error, 0.02 * true))
        assert distance.label == "estimate"
    return out | {"far": max(far), "grad_norm": windows[-1]["trajectory"]["grad_norm"]["total"].last.value}


def ddp(rank: int, world: int) -> dict[str, Any]:
    batches = data_of(range(world))
    return compared(DDP(made()), batches, batches[rank], type(made()))


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    batches = data_of(range(world))
    found = compared(fsdp(made()), batches, batches[rank], type(made()))
    # In one process, which has one sketch of everything.
    twin = made()
    trajectory = sketched(model=twin)
    points = trained(twin, batches, type(twin))
    for point in points[1:]:
        with torch.no_grad():
            for parameter, value in zip(twin.parameters(), point, strict=True):
                parameter.copy_(value)
        trajectory.update()
    whole = merged(fsdp(made()), batches[rank])[1]
    found["of one process"] = float((whole.matrix - trajectory.sketches.matrix).norm() / whole.matrix.norm())
    return found


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    data = data_of([0])
    return compared(planned(made(Columns), init_device_mesh("cpu", (world,))), data, data[0], Columns)


def one_group(rank: int, world: int) -> dict[str, Any]:
    """Parts and copies of parameters in one group."""
    data = data_of([0])
    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    windows, _ = merged(model, data[0], groups=lambda name: "all")
    points = trained(model, data, Columns)
    expected, _ = of_all(model, points)
    totals = [{key: value for key, value in window.items() if key.endswith("/total")} for window in expected]
    totals = [window | {key.replace("/total", "/all"): value for key, value in window.items()} for window in totals]
    return errors(windows, totals)


def open_window(rank: int, world: int) -> dict[str, Any]:
    """sync() in the middle of a window, and the window's close after it."""
    batches = data_of(range(world))
    model = fsdp(made())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trajectory, found = sketched(), []
    expected, _ = of_all(model, trained(model, batches, type(made())))
    with Monitor(model, optimizer, metrics=[trajectory], window_steps=STEPS, timeout=20):
        for x, y in batches[rank][:WINDOW]:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        synced = trajectory.sync().flat("group")
    worst = max(abs(synced[key] - value) / abs(value) for key, value in expected[0].items())
    return {"error": worst, "absent": found, "scopes": ["global"]}


def pipeline(rank: int, world: int) -> dict[str, Any]:
    """Two stages; whose sketches are not those of one model."""
    stage = nn.Linear(4, 3 + rank).double()
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    metrics = [sketched()]
    with Monitor(stage, optimizer, metrics=metrics, window_steps=1, prefix=f"stages.{rank}", timeout=20) as monitor:
        stage(torch.ones(2, 4).double()).square().sum().backward()
        optimizer.step()
        window = monitor.global_window()
    assert window is not None
    return {"said": window.off["trajectory"]}


def other_seeds(rank: int, world: int) -> dict[str, Any]:
    """Each rank has a hash of its own."""
    model = DDP(made())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, metrics=[sketched(seed=rank)], window_steps=1, timeout=20) as monitor:
        model(torch.ones(2, 6).double()).square().sum().backward()
        optimizer.step()
        window = monitor.global_window()
    assert window is not None
    return {"said": window.off["trajectory"]}


def hsdp(rank: int, world: int) -> dict[str, Any]:
    batches = data_of(range(world))
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    return compared(fsdp(made(), mesh), batches, batches[rank], type(made()))


def tensor_parallel_and_fsdp2(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    batches = data_of(range(2))
    model = fsdp(planned(made(Columns), mesh["tp"]), mesh["dp"])
    return compared(model, batches, batches[mesh["dp"].get_local_rank()], Columns)


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    two = (ddp, fsdp2, tensor_parallel, one_group, open_window, pipeline, other_seeds)
    for work in two if ranks == 2 else (hsdp, tensor_parallel_and_fsdp2):
        yield work.__name__, ranks, quiet(work)
