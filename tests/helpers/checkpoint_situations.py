"""Checkpoints of torch.distributed.checkpoint, saved by some ranks and loaded by others, beside one process that goes
through without one."""

from __future__ import annotations

import datetime
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rank_situations import STATS, Net, fsdp, made
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory

STEPS, WINDOW, BATCH = 14, 7, 12
SHARDED = {"fsdp2", "hsdp", "root"}
Numbers = dict[str, float]


class Row(NamedTuple):
    """Who saves after `at` steps, who loads, and of which metrics."""

    name: str
    before: str  # how the model is cut when it is saved
    ranks: int
    after: str  # and when it is loaded
    then: int
    at: int = 10
    metrics: str = "all"
    how: str = "save"
    settings: tuple[tuple[str, Any], ...] = ()


ROWS = [
    Row("fsdp2 2 to 2", "fsdp2", 2, "fsdp2", 2),
    Row("fsdp2 2 to 3", "fsdp2", 2, "fsdp2", 3),
    Row("fsdp2 2 to 1", "fsdp2", 2, "plain", 1),
    Row("ddp 2 to 2", "ddp", 2, "ddp", 2),
    Row("ddp 2 to 3", "ddp", 2, "ddp", 3),
    Row("ddp 2 to 1", "ddp", 2, "plain", 1),
    Row("ddp 1 to 2", "plain", 1, "ddp", 2),
    Row("fsdp2 1 to 2", "plain", 1, "fsdp2", 2),
    Row("fsdp2 3 to 2", "fsdp2", 3, "fsdp2", 2),
    Row("fsdp2 2 to fsdp2 1", "fsdp2", 2, "fsdp2", 1),
    Row("ddp 3 to 2", "ddp", 3, "ddp", 2),
    Row("ddp 2 to fsdp2 3", "ddp", 2, "fsdp2", 3),
    Row("fsdp2 2 to ddp 3", "fsdp2", 2, "ddp", 3),
    Row("hsdp 4 to 4", "hsdp", 4, "hsdp", 4),
    Row("hsdp 4 to fsdp2 2", "hsdp", 4, "fsdp2", 2),
    Row("fsdp2 2 to hsdp 4", "fsdp2", 2, "hsdp", 4),
    Row("tensor parallel 2 to 2", "tensor_parallel", 2, "tensor_parallel", 2, metrics="trajectory"),
    Row("tensor parallel 2 to 1", "tensor_parallel", 2, "plain", 1, metrics="trajectory"),
    Row("samples in parts 2 to 2", "tensor_parallel", 2, "tensor_parallel", 2, metrics="samples"),
    Row("samples in parts 2 to 1", "tensor_parallel", 2, "plain", 1, metrics="samples"),
    Row("samples, whole 1 to parts 2", "plain", 1, "tensor_parallel", 2, metrics="samples"),
    Row("samples in parts, at a window's end, 2 to 1", "tensor_parallel", 2, "plain", 1, at=7, metrics="samples"),
    Row("async, fsdp2 2 to 2", "fsdp2", 2, "fsdp2", 2, how="async"),
    Row("async, fsdp2 2 to 3", "fsdp2", 2, "fsdp2", 3, how="async"),
    Row("amid a pass, fsdp2 2 to 2", "root", 2, "root", 2, how="amid"),
    Row("amid a pass, fsdp2 2 to 1", "root", 2, "plain", 1, how="amid"),
    Row("amid a pass, tensor stats, fsdp2 2 to 1", "root", 2, "plain", 1, metrics="tensor_stats", how="amid"),
    Row("at a window's end, fsdp2 2 to 3", "fsdp2", 2, "fsdp2", 3, at=7),
    Row("at a window's end, ddp 2 to 1", "ddp", 2, "plain", 1, at=7),
    Row("tensor stats, fsdp2 2 to 2", "fsdp2", 2, "fsdp2", 2, metrics="tensor_stats"),
    Row("tensor stats, fsdp2 2 to 1", "fsdp2", 2, "plain", 1, metrics="tensor_stats"),
    Row("tensor stats, fsdp2 2 to 3", "fsdp2", 2, "fsdp2", 3, metrics="tensor_stats"),
    Row("tensor stats, ddp 2 to 3", "ddp", 2, "ddp", 3, metrics="tensor_stats"),
    Row("tensor stats, ddp 2 to 1", "ddp", 2, "plain", 1, metrics="tensor_stats"),
    Row("tensor stats, ddp 1 to 2", "plain", 1, "ddp", 2, metrics="tensor_stats"),
    Row("updates without copies, fsdp2 2 to 3", "fsdp2", 2, "fsdp2", 3, metrics="updates"),
    Row("sliding windows, ddp 2 to 3", "ddp", 2, "ddp", 3, settings=(("window_blocks", 7),)),
    Row("sliding windows, fsdp2 2 to 2", "fsdp2", 2, "fsdp2", 2, settings=(("window_blocks", 7),)),
    Row("sliding windows, fsdp2 2 to 3", "fsdp2", 2, "fsdp2", 3, settings=(("window_blocks", 7),)),
    Row("split replicas, ddp 2 to 2", "ddp", 2, "ddp", 2, metrics="split"),
    Row("split replicas, sliding windows", "ddp", 2, "ddp", 2, metrics="split", settings=(("window_blocks", 7),)),
    Row("long windows, fsdp2 2 to 3", "fsdp2", 2, "fsdp2", 3, settings=(("window_steps", 14),)),
]


def cut(kind: str, model: Any) -> Any:
    if kind == "fsdp2":
        return fsdp(model)
    if kind == "root":  # all there is is gathered between the forward and the backward pass
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model)
    if kind == "hsdp":
        return fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "tensor_parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return parallelize_module(model, mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})
    return model


def metrics_of(kind: str) -> list[Any]:
    if kind == "updates":
        return [Trajectory(mode="updates")]
    trajectory = Trajectory(stats=STATS, split_replicas=kind == "split")
    if kind == "split":
        return [trajectory]
    if kind == "trajectory":
        return [trajectory]
    if kind == "samples":
        return [PerSampleGradNorms(loss_reduction="mean")]
    if kind == "tensor_stats":  # by itself: a proof of per-sample norms runs passes in which outputs are not seen
        return [TensorStats(every_steps=1)]
    return [trajectory, PerSampleGradNorms(loss_reduction="mean"), Lipschitz()]


def batch(step: int, rank: int, ranks: int, alike: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 6, generator=generator).double(), torch.randn(BATCH, 1, generator=generator).double()
    ids = torch.arange(BATCH) + BATCH * (step % 2)
    return (x, y, ids) if alike else tuple(part.chunk(ranks)[rank] for part in (x, y, ids))  # type: ignore[return-value]


class Run:
    """A training of one of the rows, on this rank."""

    def __init__(self, row: Row, kind: str) -> None:
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.alike = "tensor_parallel" in (row.before, row.after)  # all ranks have the whole batch
        torch.manual_seed(0)
        self.model = cut(kind, made(Net))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        settings = {"window_steps": WINDOW, "timeout": 5} | dict(row.settings)
        self.monitor = Monitor(self.model, self.optimizer, metrics_of(row.metrics), **settings)
        self.windows: list[Any] = []
        self.own: list[Any] = []

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "lipcore": self.monitor}

    def load(self, folder: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def train(self, begin: int, end: int, amid: Callable[[], object] = lambda: None) -> None:
        """Train from step to step; `amid` is called between the forward and the backward pass of the first."""
        norms = self.monitor.metrics.get("per_sample_grad_norm")
        for step in range(begin, end):
            self.optimizer.zero_grad()
            x, y, ids = batch(step, self.rank, self.ranks, self.alike)
            if norms is not None:
                norms.set_ids(ids)
            loss = F.mse_loss(self.model(x), y)
            if step == begin:
                amid()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.3) if not self.alike else None
            self.optimizer.step()
            if (window := self.monitor.global_window()) is not None:
                self.windows.append(window)
            while (own := self.monitor.pop_window()) is not None:
                self.own.append(own)


def flat(windows: list[Any]) -> list[Numbers]:
    return [window.flat("tensor") | window.flat("group") for window in windows]


def result(run: Run, since: int) -> dict[str, Any]:
    windows = [window for window in run.windows if window.last_step > since]
    own = [window for window in run.own if window.last_step > since]
    found = {"global": flat(windows), "own": flat(own), "scopes": [window.scope for window in windows]}
    found["off"] = [dict(window.off) for window in windows]
    found["details"] = [window["trajectory"].details for window in windows if "trajectory" in window.results]
    norms = run.monitor.metrics.get("per_sample_grad_norm")
    if norms is not None:
        scores = norms.sync_scores(timeout=5)
        ids = torch.arange(2 * BATCH)
        found["scores"] = [scores.lookup(ids).count.tolist(), scores.lookup(ids).mean.tolist()]
        window = windows[-1] if windows else None
        there = window is not None and "per_sample_grad_norm" in window
        found["noise"] = window["per_sample_grad_norm"].details if there else {}
    return found


def whole(row: Row) -> dict[str, Any]:
    """What one process finds that nothing interrupts."""
    run = Run(row, "plain")
    with run.monitor:
        run.train(0, STEPS)
        return result(run, row.at)


def save(row: Row, folder: str) -> Any:
    """Save in the middle, and go on to the end."""
    run = Run(row, row.before)
    with run.monitor:
        run.train(0, row.at)
        if row.how == "async":
            group = dist.new_group(backend="gloo")  # a thread speaks over it, beside the training
            future = dcp.async_save(run.state(), checkpoint_id=folder, process_group=group)
            run.train(row.at, STEPS)
            future.result()
        else:
            # Model and optimizer say here what they have, which a pass does not change; lipcore when it is saved.
            saves = functools.partial(dcp.save, run.state(), checkpoint_id=folder)
            if row.how == "amid":
                run.train(row.at, STEPS, amid=saves)
            else:
                saves()
                run.train(row.at, STEPS)
        return result(run, row.at)


def load(row: Row, folder: str) -> Any:
    """Go on from there."""
    run = Run(row, row.after)
    with run.monitor, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.load(folder)
        said = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
        run.train(row.at, STEPS)
        return result(run, row.at) | {"said": said}


def phases(rows: list[Row], folder: str) -> list[tuple[str, int, Callable[[], Any]]]:
    found: list[tuple[str, int, Callable[[], Any]]] = []
    for row in rows:
        place = f"{folder}/{row.name}/checkpoint"
        found.append((f"{row.name}/saved", row.ranks, functools.partial(save, row, place)))
        found.append((f"{row.name}/loaded", row.then, functools.partial(load, row, place)))
    return found


def work_through(rank: int, folder: str, names: list[str], tasks: Callable[..., Any] = phases) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, world, work in tasks([row for row in ROWS if row.name in names], folder):
        place = Path(folder, name)
        if rank < world:
            place.mkdir(parents=True, exist_ok=True)
            store = dist.FileStore(f"{place}/store", world)
            patience = datetime.timedelta(seconds=60)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
            try:
                found: Any = work()
            except BaseException as error:
                found = {"error": f"{type(error).__name__}: {error}"}
                import traceback

                found["trace"] = traceback.format_exc()
            Path(place, f"{rank}.json").write_text(json.dumps(found, default=str))
            dist.destroy_process_group()


def expected_of(row: Row, numbers: Numbers, phase: str, off: Iterable[str] = ()) -> Numbers:
    """What a window of all ranks has of what one process finds: docs/distributed.md says what is left out; `off`: the
    metrics of which the window says why."""
    cut = row.before if phase == "saved" else row.after
    gone = [f"{name}/" for name in off]
    if not SHARDED.isdisjoint((cut, row.before)):
        gone += ["lipschitz/local_lipschitz", "lipschitz/sandwich"]
    if row.metrics == "updates":
        gone += [f"trajectory/{name}" for name in ("normalized_update_rms", "momentum_norm", "second_moment_norm")]
    if "window_blocks" in str(row) and ("fsdp2" in (row.before, row.after) or row.metrics == "split"):
        gone += ["trajectory/path_length.cumulative", "trajectory/directness"]
    return {key: value for key, value in numbers.items() if not key.startswith(tuple(gone))}


def left_out(row: Row) -> list[str]:
    """Which metrics the first window after the load does not have over all ranks, for a warning that says why."""
    other = row.ranks != row.then or row.before != row.after
    stats = row.metrics == "tensor_stats" and row.then > 1 and "fsdp2" in (row.before, row.after)
    sliding = dict(row.settings).get("window_blocks") and "fsdp2" in (row.before, row.after)
    found = (("tensor_stats", stats), ("trajectory", sliding), ("per_sample_grad_norm", row.metrics == "samples"))
    names = [name for name, left in found if left]
    return names if other and row.at % WINDOW else []


def lacks_scores(row: Row) -> bool:
    """Whether scores lack the samples of the open window, which ranks had not added up."""
    return "per_sample_grad_norm" in left_out(row)


def apart(found: Numbers, expected: Numbers) -> dict[str, Any]:
    """The largest relative error, where it is, and what is not there; quantiles are right to a bin."""
    worst, where, absent = 0.0, "", []
    for key, value in expected.items():
        if key not in found:
            absent.append(key)
            continue
        allowed = 1e-6 if ".p50" in key or ".p99" in key else 1.0
        if found[key] == value:
            continue
        error = allowed * abs(found[key] - value) / max(abs(value), 1e-9)
        if math.isnan(error) and not (math.isnan(value) and math.isnan(found[key])):
            error = math.inf
        if error > worst:
            worst, where = error, key
    return {"error": worst, "where": where, "absent": absent}


def stages(rank: int) -> Any:
    torch.manual_seed(rank)
    return nn.Sequential(nn.Linear(3, 3)).double()


def both_ways(rank: int) -> Any:
    """Tensor parallelism inside FSDP2, on a mesh of two by two ranks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    model = made(Net)
    parallelize_module(model, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def one_more(rank: int) -> Any:
    return nn.Sequential(stages(0), nn.Linear(3, 1).double())


def trajectory() -> list[Any]:
    return [Trajectory()]


def split() -> list[Any]:
    return [Trajectory(split_replicas=True)]


def sketch() -> list[Any]:
    return [Trajectory(mode="sketch", buckets=256)]


#: One run by several numbers of ranks, three of them in one window: how the model is cut, ranks, and the last step.
CHAIN = (("fsdp2", 2, 8), ("fsdp2", 3, 9), ("fsdp2", 2, 11), ("fsdp2", 2, 12), ("plain", 1, 13), ("ddp", 2, STEPS))


def chained(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row, begin = Row("chain", "", 0, "", 0), 0
    for kind, world, end in CHAIN:
        if rank < world:
            store = dist.FileStore(f"{folder}/store{end}", world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            run = Run(row, kind)
            with run.monitor:
                if begin:
                    run.load(f"{folder}/{begin}")
                run.train(begin, end)
                if end < STEPS:
                    dcp.save(run.state(), checkpoint_id=f"{folder}/{end}")
                else:
                    Path(folder, f"{rank}.json").write_text(json.dumps(result(run, begin), default=str))
            dist.barrier()
            dist.destroy_process_group()
        begin = end


def models_apart(rank: int, folder: str) -> None:
    """Each rank trains a model of its own, and goes on from its own part of one checkpoint."""
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

    def train(monitor: Monitor, model: nn.Module, begin: int, end: int) -> None:
        for step in range(begin, end):
            x, y, _ = batch(step, rank, 2, alike=False)
            model.zero_grad()
            F.mse_loss(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * (rank + 1) * parameter.grad)  # type: ignore[operator]
            monitor.step()

    model = made(Net, seed=rank)
    metrics = [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]
    monitor = Monitor(model, metrics=metrics, window_steps=WINDOW, group=None)
    train(monitor, model, 0, 10)
    dcp.save({"lipcore": monitor}, checkpoint_id=f"{folder}/checkpoint")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    train(monitor, model, 10, STEPS)
    again = made(Net, seed=5)
    metrics = [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]
    resumed = Monitor(again, metrics=metrics, window_steps=WINDOW, group=None)
    again.load_state_dict(weights)
    dcp.load({"lipcore": resumed}, checkpoint_id=f"{folder}/checkpoint")
    train(resumed, again, 10, STEPS)
    for name in ("trajectory", "per_sample_grad_norm"):
        one, other = (str(found.history[-1][name].to_dict()) for found in (monitor, resumed))
        assert one == other, name
    assert resumed.history[-1].steps == WINDOW
    dist.barrier()


Made = tuple[Callable[[int], Any], Callable[[], list[Any]]]
#: Who saves, how many load what, and what is said there.
REFUSED: dict[str, tuple[int, Made, int, Made, str]] = {
    "stages without a prefix": (
        *(2, (stages, trajectory), 2, (stages, trajectory)),
        r"ValueError: .*copies.*: parameter '0.weight' has other values in the checkpoint than .* prefix=|^went on$",
    ),
    "meshes of some ranks": (
        *(4, (both_ways, trajectory), 2, (lambda rank: fsdp(made(Net)), trajectory)),
        r"ValueError: trajectory: the state was saved by 4 ranks .* and cannot be cut anew: parameter 'c.weight' lies "
        r"on a mesh of ranks \d, \d out of 0, 1, 2, 3. Load it with the ranks, meshes and placements of then; to go on "
        "without it",
    ),
    "sketches": (
        *(2, (lambda rank: fsdp(made(Net)), sketch), 3, (lambda rank: fsdp(made(Net)), sketch)),
        r"ValueError: trajectory: .* cannot be cut anew: mode 'sketch' .* leave the monitor out of the load",
    ),
    "shares of other ranks": (
        *(2, (lambda rank: made(Net), split), 3, (lambda rank: made(Net), split)),
        r"ValueError: trajectory: the state was saved by 2 ranks of which each kept its share of the parameters .* and "
        r"rank \d of 3 has another share now. Load it with as many ranks, and with split_replicas as it was",
    ),
    "shares and none": (
        *(2, (lambda rank: made(Net), split), 2, (lambda rank: made(Net), trajectory)),
        r"ValueError: trajectory: .*each kept its share.*|Missing key in checkpoint state_dict",
    ),
    "another parameter": (
        *(2, (lambda rank: stages(0), trajectory), 2, (lambda rank: one_more(0), trajectory)),
        r"Missing key in checkpoint state_dict: lipcore.copies.all.trajectory.0.0.weight.prev",
    ),
    "another metric": (
        *(2, (lambda rank: stages(0), lambda: [Trajectory(mode="updates")]), 3),
        *((lambda rank: stages(0), lambda: [TensorStats()]),),
        r"ValueError: metrics: the state has \['trajectory'\], this monitor has \['tensor_stats'\]",
    ),
}


def refusals(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, (ranks, (model, metrics), then, (other_model, other_metrics), _) in REFUSED.items():
        place = Path(folder, name)
        place.mkdir(exist_ok=True)
        for phase, world in (("save", ranks), ("load", then)):
            if rank >= world:
                continue
            patience = datetime.timedelta(seconds=60)
            store = dist.FileStore(f"{place}/{phase}", world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
            net = (model if phase == "save" else other_model)(rank)
            chosen = (metrics if phase == "save" else other_metrics)()
            monitor = Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1), chosen)
            before = str(monitor.state_dict()["alike"])
            if phase == "save":
                dcp.save({"lipcore": monitor}, checkpoint_id=f"{place}/checkpoint")
            else:
                try:
                    dcp.load({"lipcore": monitor}, checkpoint_id=f"{place}/checkpoint")
                    said = "went on"
                except BaseException as error:  # torch's own is no Exception
                    said = f"{type(error).__name__}: {error}"
                    assert str(monitor.state_dict()["alike"]) == before
                (place / f"{rank}.txt").write_text(said)
            dist.barrier()
            dist.destroy_process_group()


def read(folder: Path, row: Row, phase: str) -> list[Any]:
    ranks = row.ranks if phase == "saved" else row.then
    return [json.loads((folder / row.name / phase / f"{rank}.json").read_text()) for rank in range(ranks)]
