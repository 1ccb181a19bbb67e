"""Situations of several ranks on this machine, each beside one process in float64 that has all ranks' data."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pipeline import STAGES, run_stage, stage_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lipcore
from lipcore import Monitor, PerSampleGradNorms, Trajectory
from lipcore.metric import Metric
from lipcore.metric.results import Window

STEPS, WINDOW = 8, 4
STATS = (
    *("update_norm", "update_ratio", "max_abs_update", "path_length", "weight_norm", "distance", "directness"),
    *("variance", "unmoved_steps", "grad_norm", "clipped_grad_norm"),
)
CLIP = 0.3
Data = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """Two hidden layers of sizes that two ranks can cut evenly, and one that they cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Columns(nn.Module):
    """A layer cut by columns, one cut by rows, and one outside the plan."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Words(nn.Module):
    """A vocabulary of 8 words, of which the numbers of a batch are made, and a norm over each word of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(8, 6), nn.LayerNorm(6)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        words = self.norm(self.words((3 * x).round().long().remainder(8)))
        return self.c(torch.tanh(self.b(torch.tanh(self.a(words)))).mean(1))


def made(kind: Callable[[], nn.Module] = Net, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().double()


def data_of(ranks: Sequence[int], sizes: Mapping[int, int] | None = None) -> list[Data]:
    """Batches of every rank, STEPS of them."""
    found = []
    for rank in ranks:
        generator = torch.Generator().manual_seed(100 + rank)
        size = (sizes or {}).get(rank, 3)
        found.append([
            (torch.randn(size, 6, generator=generator).double(), torch.randn(size, 1, generator=generator).double())
            for _ in range(STEPS)
        ])  # fmt: skip
    return found


# ---- one process, by definition


def truth(
    model: nn.Module, batches: Sequence[Data], prefix: Mapping[str, str] | None = None, clips: float = CLIP
) -> list[dict[str, float]]:
    """Numbers of every window of a run whose gradient is the mean of the ranks', in float64."""
    names = [(prefix or {}).get(name, name) for name, _ in model.named_parameters()]
    points, grads, clipped = [snapshot(model)], [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for data in batches:
            x, y = data[step]
            (F.mse_loss(model(x), y) / len(batches)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        nn.utils.clip_grad_norm_(model.parameters(), clips)
        clipped.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        points.append(snapshot(model))
    places = {name: [i] for i, name in enumerate(names)}
    for i, name in enumerate(names):
        places.setdefault(lipcore.by_block(name), []).append(i)
    places["total"] = list(range(len(names)))
    return [numbers(places, points, grads, clipped, begin) for begin in range(0, STEPS, WINDOW)]


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def numbers(
    places: Mapping[str, list[int]], points: list[Any], grads: list[Any], clipped: list[Any], begin: int
) -> dict[str, float]:
    end, out = begin + WINDOW, {}
    for place, members in places.items():
        at = [torch.cat([point[i].flatten() for i in members]) for point in points]
        updates = [float((at[t] - at[t - 1]).norm()) for t in range(1, end + 1)]
        window = updates[begin:]
        ratios = [update / float(at[t].norm()) for t, update in enumerate(window, begin + 1)]
        mean = torch.stack(at[begin : end + 1]).mean(0)
        most = [float((at[t] - at[t - 1]).abs().max()) for t in range(begin + 1, end + 1)]
        found = {
            "update_norm.last": window[-1],
            "update_norm.mean": sum(window) / WINDOW,
            "update_norm.max": max(window),
            "update_ratio.last": ratios[-1],
            "update_ratio.mean": sum(ratios) / WINDOW,
            "max_abs_update.last": most[-1],
            "max_abs_update.max": max(most),
            "path_length.sum": sum(window),
            "path_length.cumulative": sum(updates),
            "distance.last": float((at[end] - at[0]).norm()),
            "directness.last": float((at[end] - at[0]).norm()) / sum(updates),
            "variance.last": sum(float((point - mean).square().sum()) for point in at[begin : end + 1]) / (WINDOW + 1),
            "weight_norm.last": float(at[end].norm()),
            "unmoved_steps.sum": float(sum(update == 0 for update in window)),
        }
        for name, each in (("grad_norm", grads), ("clipped_grad_norm", clipped)):
            norms = [float(torch.cat([g[i].flatten() for i in members]).norm()) for g in each[begin:end]]
            found |= {f"{name}.last": norms[-1], f"{name}.mean": sum(norms) / WINDOW, f"{name}.max": max(norms)}
        out |= {f"trajectory/{quantity}/{place}": value for quantity, value in found.items()}
    return out


def flat_of(window: Window) -> dict[str, float]:
    return window.flat("tensor") | window.flat("group")


def errors(windows: Sequence[Any], expected: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The largest relative error over all windows, and keys that are absent."""
    worst, absent = 0.0, []
    for window, numbers in zip(windows, expected, strict=True):
        found = flat_of(window)
        for key, value in numbers.items():
            if key not in found:
                absent.append(key)
                continue
            error = abs(found[key] - value) / max(abs(value), 1e-12)
            worst = max(worst, math.inf if math.isnan(error) else error)
    return {"error": worst, "absent": absent[:5], "scopes": [window.scope for window in windows]}


# ---- several ranks


def monitored(model: nn.Module, **settings: Any) -> tuple[Any, Monitor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"window_steps": WINDOW, "metrics": [Trajectory(stats=STATS)], "timeout": 20} | settings
    return optimizer, Monitor(model, optimizer, **settings)


def train(
    model: nn.Module,
    optimizer: Any,
    data: Data,
    after: Callable[[int], None] = lambda step: None,
    steps: Sequence[int] = range(STEPS),
) -> None:
    for step in steps:
        optimizer.zero_grad()
        x, y = data[step]
        F.mse_loss(model(x), y).backward()
        clip(model)
        optimizer.step()
        after(step + 1)


def clip(model: nn.Module) -> None:
    if len({getattr(p, "device_mesh", None) for p in model.parameters()}) == 1:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        return
    # torch refuses plain tensors beside DTensors, and DTensors of several meshes.
    grads: list[Any] = [p.grad for p in model.parameters()]
    whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    norm = torch.cat([grad.flatten() for grad in whole]).norm()
    for grad in grads:
        grad.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))


def merged(model: nn.Module, data: Data, **settings: Any) -> list[Any]:
    """The global windows of a run that asks for one at every step."""
    optimizer, monitor = monitored(model, **settings)
    found: list[Any] = []

    def after(step: int) -> None:
        window = monitor.global_window()
        if window is not None:
            found.append(window)

    with monitor:
        train(model, optimizer, data, after)
    return found


def ddp(rank: int, world: int) -> dict[str, Any]:
    model, ranks = made(), range(world)
    expected = truth(made(), data_of(ranks))
    return errors(merged(nn.parallel.DistributedDataParallel(model), data_of(ranks)[rank]), expected)


def unequal_batches(rank: int, world: int) -> dict[str, Any]:
    sizes = {0: 2, 1: 7}
    expected = truth(made(), data_of(range(world), sizes))
    return errors(merged(nn.parallel.DistributedDataParallel(made()), data_of(range(world), sizes)[rank]), expected)


def fsdp(model: Any, mesh: Any = None) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in (model.a, model.b, model):
        fully_shard(layer, **({} if mesh is None else {"mesh": mesh}))
    return model


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    expected = truth(made(), data_of(range(world)))
    return errors(merged(fsdp(made()), data_of(range(world))[rank]), expected)


def state_of_another_rank(rank: int, world: int) -> Any:
    """Each rank loads the other one's state, and then its own, which fits whatever was tried before."""
    model = fsdp(made())
    optimizer, monitor = monitored(model)
    with monitor:
        train(model, optimizer, data_of(range(world))[rank], steps=range(WINDOW - 1))
        states: list[Any] = [None] * world
        dist.all_gather_object(states, monitor.state_dict())
        monitor.load_state_dict(states[rank])
        try:
            monitor.load_state_dict(states[1 - rank])
        finally:
            monitor.load_state_dict(states[rank])
    return {}


def one_state_for_all(rank: int, world: int) -> dict[str, Any]:
    """All ranks load rank 0's state in the middle of a window: its samples are its own, the movement is everybody's."""
    data = data_of(range(world))[rank]
    expected = truth(made(), data_of(range(world)))
    model = nn.parallel.DistributedDataParallel(made())
    metrics = [Trajectory(stats=STATS), PerSampleGradNorms(loss_reduction="mean")]
    optimizer, monitor = monitored(model, metrics=metrics)
    found, said = [], []
    with monitor:
        train(model, optimizer, data, steps=range(WINDOW - 1))
        states: list[Any] = [None] * world
        dist.all_gather_object(states, monitor.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monitor.load_state_dict(states[0])
        said = [str(warning.message) for warning in caught]
        for step in range(WINDOW - 1, STEPS):
            train(model, optimizer, data, steps=[step])
            window = monitor.global_window()
            if window is not None:
                found.append(window)
    off = [window.off.get("per_sample_grad_norm", "") for window in found]
    return errors(found, expected) | {"off": off, "said": said}


def lacking_saved_again(rank: int, world: int) -> dict[str, Any]:
    """A window lacks samples of a rank when it is saved once more, and a fresh Monitor goes on with it."""
    data = data_of(range(world))[rank]
    expected = truth(made(), data_of(range(world)))
    model = nn.parallel.DistributedDataParallel(made())

    def metrics() -> list[Any]:
        return [Trajectory(stats=STATS), PerSampleGradNorms(loss_reduction="mean")]

    optimizer, monitor = monitored(model, metrics=metrics())
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, data, steps=range(WINDOW - 2))
        states: list[Any] = [None] * world
        dist.all_gather_object(states, monitor.state_dict())
        monitor.load_state_dict(states[0])
        train(model, optimizer, data, steps=[WINDOW - 2])
        state = monitor.state_dict()
        monitor.close()
        monitor = Monitor(model, optimizer, metrics(), window_steps=WINDOW, timeout=20)
        monitor.load_state_dict(state)
        with monitor:
            for step in range(WINDOW - 1, STEPS):
                train(model, optimizer, data, steps=[step])
                if (window := monitor.global_window()) is not None:
                    found.append(window)
    return errors(found, expected) | {"off": [window.off.get("per_sample_grad_norm", "") for window in found]}


def loaded_into_the_same_monitor(rank: int, world: int) -> dict[str, Any]:
    """The training goes back behind a window that has closed, on all ranks: one that was merged, then one that
    waits."""
    data = data_of(range(world))[rank]
    expected = truth(made(), data_of(range(world)))
    model = nn.parallel.DistributedDataParallel(made())
    optimizer, monitor = monitored(model)
    with monitor:
        train(model, optimizer, data, steps=range(WINDOW))
        monitor.global_window()
        saved = monitor.state_dict(), copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        for merges in (True, False):
            train(model, optimizer, data, steps=range(WINDOW, STEPS))
            if merges:
                monitor.global_window()
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(copy.deepcopy(saved[2]))  # it goes on in the tensors that it is given
            monitor.load_state_dict(saved[0])
        train(model, optimizer, data, steps=range(WINDOW, STEPS))
        monitor.global_window()
    return errors(monitor.global_history, expected)


def saved_while_windows_wait(rank: int, world: int) -> dict[str, Any]:
    """What a state does not have is said when it is saved and when it is loaded, once windows are merged at all."""
    model = nn.parallel.DistributedDataParallel(made())
    optimizer, monitor = monitored(model)
    data, said = data_of(range(world))[rank], []
    with monitor, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, data, steps=range(WINDOW))
        monitor.state_dict()
        said.append([str(warning.message) for warning in caught])
        monitor.global_window()
        train(model, optimizer, data, steps=range(WINDOW))
        state = monitor.state_dict()
        said.append([str(warning.message) for warning in caught])
        monitor.load_state_dict(state)  # of this very run, whose windows still wait
        said.append([str(warning.message) for warning in caught])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with monitored(model)[1] as another:
            another.load_state_dict(state)
        said.append([str(warning.message) for warning in caught])
    return {"said": said}


def hsdp(rank: int, world: int) -> dict[str, Any]:
    expected = truth(made(), data_of(range(world)))
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    return errors(merged(fsdp(made(), mesh), data_of(range(world))[rank]), expected)


def planned(model: nn.Module, mesh: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    expected = truth(made(Columns), data_of([0]))
    return errors(merged(planned(made(Columns), init_device_mesh("cpu", (world,))), data_of([0])[0]), expected)


def tensor_parallel_and_fsdp2(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    replicas = range(2)
    expected = truth(made(Columns), data_of(replicas))
    model = fsdp(planned(made(Columns), mesh["tp"]), mesh["dp"])
    return errors(merged(model, data_of(replicas)[mesh["dp"].get_local_rank()]), expected)


def vocabulary_in_parts(model: nn.Module, mesh: Any, *, sequence: bool = False) -> Any:
    """Cut the vocabulary, of whose gradient torch gives each rank the whole; with `sequence`, give each rank a part of
    the positions between layers, so that the norm's gradient is a sum that nobody has added up."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    between = Shard(1) if sequence else Replicate()
    plan = {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "a": ColwiseParallel(input_layouts=between),
        "b": RowwiseParallel(),
    }
    return parallelize_module(model, mesh, {**plan, "norm": SequenceParallel()} if sequence else plan)


def statistics(windows: Sequence[Any]) -> list[dict[str, float]]:
    """Of gradients as TensorStats has them; without means, which are sums of rounding errors behind a norm."""
    return [{k: v for k, v in flat_of(window).items() if "/gradient." in k and ".mean" not in k} for window in windows]


def vocabulary(rank: int, world: int, *, sequence: bool = False, added: bool = False) -> dict[str, Any]:
    """Gradients that lie otherwise on the ranks than their parameters, of Trajectory and TensorStats."""
    data, twin = data_of([0])[0], made(Words)
    expected, every = truth(made(Words), [data]), {"outputs": [], "every_steps": 1}
    optimizer, monitor = monitored(twin, metrics=[lipcore.TensorStats(**every)], group=None)
    with monitor:
        train(twin, optimizer, data)
    model = vocabulary_in_parts(made(Words), init_device_mesh("cpu", (world,)), sequence=sequence)
    for parameter in model.parameters() if added else ():
        parameter.register_post_accumulate_grad_hook(redistribute)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        windows = merged(model, data, metrics=[Trajectory(stats=STATS), lipcore.TensorStats(**every)])
    found = errors(windows, [e | s for e, s in zip(expected, statistics(list(monitor.history)), strict=True)])
    details = [dict(window[name].details) for window in windows for name in ("trajectory", "tensor_stats")]
    return found | {"details": details, "right": errors(windows, [right_without_norms(each) for each in expected])}


def redistribute(parameter: Any) -> None:
    if hasattr(parameter, "placements"):
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def right_without_norms(numbers: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in numbers.items() if "grad_norm" not in key}


def sequence_parallel(rank: int, world: int) -> dict[str, Any]:
    return vocabulary(rank, world, sequence=True)


def sequence_parallel_added_up(rank: int, world: int) -> dict[str, Any]:
    return vocabulary(rank, world, sequence=True, added=True)


def vocabulary_and_fsdp2(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    expected = truth(made(Words), data_of(range(2)))
    model = fsdp(vocabulary_in_parts(made(Words), mesh["tp"], sequence=True), mesh["dp"])
    return errors(merged(model, data_of(range(2))[mesh["dp"].get_local_rank()]), expected)


def pipeline(rank: int, world: int, prefixes: Sequence[str] = ("stages.0", "stages.1")) -> dict[str, Any]:
    """Two stages as a schedule runs them, without clipping, which stages would have to do together."""
    stage, twin = stage_of(made(), rank), made()
    of_stage = {f"{name}.{kind}": f"{at}.{kind}" for name, at in STAGES.items() for kind in ("weight", "bias")}
    expected = truth(twin, data_of([0]), of_stage, clips=math.inf)
    optimizer, monitor = monitored(stage, prefix=prefixes[rank])
    found = []
    with monitor:
        for x, y in data_of([0])[0]:
            optimizer.zero_grad()
            run_stage(stage, rank, x, y)
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    return errors(found, expected)


def pipeline_without_prefix(rank: int, world: int) -> dict[str, Any]:
    return pipeline(rank, world, ("", ""))


def subgroups(rank: int, world: int) -> dict[str, Any]:
    """Two models, each on two ranks with a group of its own."""
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    groups = [dist.new_group(half) for half in halves]
    mine = 0 if rank in halves[0] else 1
    expected = truth(made(seed=mine), data_of(halves[mine]))
    model = nn.parallel.DistributedDataParallel(made(seed=mine), process_group=groups[mine])
    data = data_of(halves[mine])[halves[mine].index(rank)]
    return errors(merged(model, data, group=groups[mine]), expected)


def two_groups(rank: int, world: int) -> dict[str, Any]:
    """One Trajectory over all ranks, then over half of them, then over all again: others own its parts each time."""
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    mine = [dist.new_group(half) for half in halves][0 if rank in halves[0] else 1]
    expected = truth(made(), data_of(range(world)))
    trajectory = Trajectory(stats=STATS)
    optimizer, monitor = monitored(model := nn.parallel.DistributedDataParallel(made()), metrics=[trajectory])
    with monitor:
        monitor._windows.steps = None
        train(model, optimizer, data_of(range(world))[rank], steps=range(WINDOW))
        found = [trajectory.sync(), trajectory.sync(mine), trajectory.sync()]
    windows = [Window(0, 1, WINDOW, False, "global", {"trajectory": each}) for each in found]
    return errors(windows, expected[:1] * 3)


def mesh_as_group(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
    ranks = mesh["b"].mesh.tolist()
    group = mesh["b"].get_group()
    expected = truth(made(), data_of(ranks))
    model = nn.parallel.DistributedDataParallel(made(), process_group=group)
    return errors(merged(model, data_of(ranks)[ranks.index(rank)], group=mesh["b"]), expected)


def independent(rank: int, world: int) -> Any:
    return merged(made(seed=rank), data_of([rank])[0])


def independent_for_themselves(rank: int, world: int) -> dict[str, Any]:
    """group=None: every rank reads its own windows."""
    model = made(seed=rank)
    expected = truth(made(seed=rank), data_of([rank]))
    optimizer, monitor = monitored(model, group=None)
    with monitor:
        train(model, optimizer, data_of([rank])[0])
    return errors(list(monitor.history), expected)


def fsdp1(rank: int, world: int) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(made(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer, monitor = monitored(model)
    with monitor:
        train(model, optimizer, data_of(range(world))[rank], steps=range(WINDOW))
        return monitor.global_window()


def shifted_windows(rank: int, world: int) -> Any:
    """One rank closes a window by hand in between."""
    optimizer, monitor = monitored(model := nn.parallel.DistributedDataParallel(made()))

    def after(step: int) -> None:
        if rank == 1 and step == 2:
            monitor.close_window()
        monitor.global_window() if step >= WINDOW else None

    with monitor:
        train(model, optimizer, data_of(range(world))[rank], after, range(6))


def other_window_steps(rank: int, world: int) -> dict[str, Any]:
    """Told at once, in spite of the timeout; the training goes on."""
    model, said = nn.parallel.DistributedDataParallel(made()), []
    optimizer, monitor = monitored(model, window_steps=4 + 2 * rank, timeout=60)

    def after(step: int) -> None:
        try:
            monitor.global_window()
        except RuntimeError as error:
            said.append(str(error))

    with monitor:
        train(model, optimizer, data_of(range(world))[rank], after, range(5))
        return {"said": "".join(said), "goes_on": trained_on(model, optimizer, data_of(range(world))[rank])}


def trained_on(model: Any, optimizer: Any, data: Data) -> bool:
    """Whether the training's next collectives are what they should be."""
    train(model, optimizer, data, steps=range(2))
    numbers = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(numbers)
    ranks = dist.get_world_size()
    return numbers.item() == ranks * (ranks + 1) / 2


def a_rank_that_never_calls(rank: int, world: int) -> dict[str, Any]:
    optimizer, monitor = monitored(model := nn.parallel.DistributedDataParallel(made()), timeout=0.5)
    data = data_of(range(world))[rank]
    said = ""
    with monitor:
        train(model, optimizer, data, steps=range(WINDOW))
        if rank == 0:
            try:
                monitor.global_window()
            except RuntimeError as error:
                said = str(error)
        goes_on = trained_on(model, optimizer, data)
        local = monitor.history[0]
    return {"said": said, "goes_on": goes_on, "scope": local.scope, "local": len(local.flat())}


def on_rank_0_alone(rank: int, world: int) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(made())
    data, said = data_of(range(world))[rank], ""
    if rank == 0:
        optimizer, monitor = monitored(model, timeout=0.5)
        with monitor:
            train(model, optimizer, data, steps=range(WINDOW))
            try:
                monitor.global_window()
            except RuntimeError as error:
                said = str(error)
            goes_on = trained_on(model, optimizer, data)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(model, optimizer, data, steps=range(WINDOW))
        goes_on = trained_on(model, optimizer, data)
    return {"said": said, "goes_on": goes_on}


def skipped_calls(rank: int, world: int) -> dict[str, Any]:
    """A rank misses its first call; at the next one all windows are merged."""
    optimizer, monitor = monitored(model := nn.parallel.DistributedDataParallel(made()), timeout=0.5)
    expected, said = truth(made(), data_of(range(world))), ""
    with monitor:
        train(model, optimizer, data_of(range(world))[rank], steps=range(WINDOW))
        if rank == 0:
            try:
                monitor.global_window()
            except RuntimeError as error:
                said = str(error)
        train(model, optimizer, data_of(range(world))[rank], steps=range(WINDOW, STEPS))
        newest = monitor.global_window()
    assert newest is monitor.global_history[-1]
    return {"said": said} | errors(monitor.global_history, expected)


def open_window(rank: int, world: int) -> dict[str, Any]:
    """trajectory.sync(), of a window that began after another one had closed by itself and was merged."""
    trajectory = Trajectory(stats=STATS)
    optimizer, monitor = monitored(model := fsdp(made()), metrics=[trajectory], window_steps=WINDOW)
    expected = truth(made(), data_of(range(world)))
    with monitor:
        data = data_of(range(world))[rank]
        train(model, optimizer, data, lambda step: monitor.global_window(), range(STEPS - 1))
        monitor._windows.steps = None  # the last step closes nothing
        train(model, optimizer, data, steps=range(STEPS - 1, STEPS))
        found = trajectory.sync()
    assert {window.scope for window in monitor.history} == {"shard"}
    window = Window(1, WINDOW + 1, STEPS, False, "global", {"trajectory": found})
    return errors([window], expected[1:])


def other_steps(rank: int, world: int) -> dict[str, Any]:
    """A rank has counted a step more, in which it trained nothing."""
    model, said = nn.parallel.DistributedDataParallel(made()), ""
    optimizer, monitor = monitored(model, timeout=60)
    with monitor:
        train(model, optimizer, data_of(range(world))[rank], steps=range(WINDOW))
        if rank == 1:
            monitor.step()
        try:
            monitor.global_window()
        except RuntimeError as error:
            said = str(error)
        return {"said": said, "goes_on": trained_on(model, optimizer, data_of(range(world))[rank])}


def other_calls(rank: int, world: int) -> Any:
    model = nn.parallel.DistributedDataParallel(made())
    optimizer, monitor = monitored(model, window_steps=WINDOW)
    with monitor:
        train(model, optimizer, data_of(range(world))[rank], steps=range(WINDOW))
        return monitor.metrics["trajectory"].sync() if rank else monitor.global_window()  # type: ignore[attr-defined]


class Stopping(Trajectory):
    """Stops on rank 1, where its step raises."""

    name = "stopping"

    def observe_step(self) -> None:
        if dist.get_rank() == 1:
            raise ValueError("this one stops")
        super().observe_step()

    @property
    def step_call(self) -> Callable[[], object]:
        return self.observe_step


class OfOnesOwn(Trajectory):
    """Has no part in the windows of all ranks, as metrics that do not say what it is."""

    name = "own"
    rank_part = Metric.rank_part


def a_metric_that_stops_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    model, expected = nn.parallel.DistributedDataParallel(made()), truth(made(), data_of(range(world)))
    optimizer, monitor = monitored(model, metrics=[Stopping(), Trajectory(stats=STATS), OfOnesOwn()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, data_of(range(world))[rank])
    try:
        monitor.close()
    except ValueError:
        monitor.close()
    assert monitor.global_window() is monitor.global_history[-1]
    assert list(monitor.global_history[-1]) == ["trajectory"]
    return errors(monitor.global_history, expected) | {"off": monitor.global_history[-1].off}


def after_rebind(rank: int, world: int) -> dict[str, Any]:
    """What was not merged before is given up; later windows are merged, with new owners."""
    model = fsdp(made())
    optimizer, monitor = monitored(model)
    data = data_of(range(world))[rank]
    expected = truth(made(), data_of(range(world)))[1]
    with monitor:
        train(model, optimizer, data, steps=range(WINDOW))
        monitor.rebind()
        train(model, optimizer, data, steps=range(WINDOW, STEPS))
        monitor.global_window()
    # A window since the reference was not merged: only what one rank has alone (a layer of one row) knows its path.
    since = ("path_length.cumulative", "directness.last")
    lost = {key for key in expected if any(word in key for word in since) and "/c" not in key}
    assert not lost & flat_of(monitor.global_history[-1]).keys()
    return errors(monitor.global_history, [{key: value for key, value in expected.items() if key not in lost}])


def counted(rank: int, world: int) -> dict[str, Any]:
    """Collectives with and without a Monitor, in training steps and in global_window()."""
    from lipcore.models.torch_internals import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls: list[str]

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "c10d" in function.namespace:
                self.calls.append(str(function))
            return function(*args, **(kwargs or {}))

    def of(work: Callable[[], Any]) -> int:
        mode = Count()
        mode.calls = []
        with mode:
            work()
        return len(mode.calls)

    data, found = data_of(range(world))[rank], {}
    for watched in (False, True):
        model = fsdp(made())
        optimizer, monitor = monitored(model)
        if not watched:
            monitor.close()
        train(model, optimizer, data, steps=range(1))
        found[f"training, watched={watched}"] = of(lambda: train(model, optimizer, data, steps=range(1, WINDOW)))
        if watched:
            found["first global_window"] = of(monitor.global_window)
            train(model, optimizer, data, steps=range(WINDOW))
            found["global_window"] = of(monitor.global_window)
            found["nothing waits"] = of(monitor.global_window)
            assert len(monitor.global_history) == 2
    return found


def a_rank_that_dies(rank: int, world: int) -> dict[str, Any]:
    """Nothing can follow it in these processes."""
    model = made()
    optimizer, monitor = monitored(model, timeout=1)
    with monitor:
        train(model, optimizer, data_of([0])[0], steps=range(WINDOW))
        if rank == world - 1:
            os._exit(0)
        try:
            monitor.global_window()
        except RuntimeError as error:
            return {"said": str(error), "local": len(monitor.history[0].flat())}
    return {}


def default_metrics(kind: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    def run(rank: int, world: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(rank, world)

    return run


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs no more; the last one leaves a rank dead."""
    assert ranks == 4
    for work in (ddp, unequal_batches, fsdp2, tensor_parallel, pipeline, pipeline_without_prefix, independent,
                 independent_for_themselves, fsdp1, shifted_windows, other_window_steps, a_rank_that_never_calls,
                 on_rank_0_alone, skipped_calls, open_window, other_steps, other_calls,
                 a_metric_that_stops_on_one_rank, after_rebind, counted, state_of_another_rank,
                 one_state_for_all, lacking_saved_again, saved_while_windows_wait,
                 loaded_into_the_same_monitor, vocabulary, sequence_parallel,
                 sequence_parallel_added_up):  # fmt: skip
        yield work.__name__, 2, work
    for work in (
        hsdp,
        tensor_parallel_and_fsdp2,
        vocabulary_and_fsdp2,
        subgroups,
        two_groups,
        mesh_as_group,
        a_rank_that_dies,
    ):
        yield work.__name__, 4, work
