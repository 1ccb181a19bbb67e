"""Situations of several ranks that are none of the ways to cut a model: parameters that are offloaded, calls in other
places of a loop, groups that come late or are gone, ranks that train apart; each beside one process in float64."""

from __future__ import annotations

import copy
import datetime
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lipschitz_situations import merged as merged_lambda
from lipschitz_situations import truth as truth_of_lambda
from rank_situations import (
    CLIP,
    STATS,
    STEPS,
    WINDOW,
    Data,
    Net,
    data_of,
    errors,
    fsdp,
    made,
    merged,
    monitored,
    train,
    truth,
)
from sample_situations import NAME, Truth, compared, compared_numbers, mean_loss, quiet
from sample_situations import merged as merged_samples
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory, watch

DDP = nn.parallel.DistributedDataParallel
_groups = itertools.count()


def next_group(rank: int, world: int) -> None:
    """Make another process group in the place of the one that is gone."""
    folder = os.environ["LIPCORE_TEST_FOLDER"]
    store = dist.FileStore(f"{folder}/next{world}.{next(_groups)}", world)
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    dist.barrier()  # one that leaves at once would close connections that another is still making


def mesh_of(world: int) -> Any:
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))


def offloaded(model: Any, mesh: Any = None) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    policy = CPUOffloadPolicy(pin_memory=False)  # pinning asks for an accelerator
    for layer in (model.a, model.b, model):
        fully_shard(layer, offload_policy=policy, **({} if mesh is None else {"mesh": mesh}))
    return model


def offload(rank: int, world: int) -> dict[str, Any]:
    return errors(merged(offloaded(made()), data_of(range(world))[rank]), truth(made(), data_of(range(world))))


def offload_hsdp(rank: int, world: int) -> dict[str, Any]:
    model = offloaded(made(), mesh_of(world))
    return errors(merged(model, data_of(range(world))[rank]), truth(made(), data_of(range(world))))


def offload_samples(rank: int, world: int) -> dict[str, Any]:
    sizes = {0: 2, 1: 7}
    expected = Truth(made()).windows(data_of(range(world), sizes))
    return compared(merged_samples(offloaded(made()), data_of(range(world), sizes)[rank]), expected)


def offload_lambda(rank: int, world: int) -> dict[str, Any]:
    windows = merged_lambda(offloaded(made()), data_of(range(world))[rank], proves=True)
    assert all(window["lipschitz"].local_lipschitz["model"].mean.label == "exact" for window in windows)
    return compared_numbers(windows, truth_of_lambda(made(), data_of(range(world))))


def all_of_them() -> list[Any]:
    stats = Trajectory(stats=STATS)
    return [stats, Lipschitz(), PerSampleGradNorms(loss_reduction="mean"), TensorStats(every_steps=1)]


def offload_bits(rank: int, world: int) -> dict[str, Any]:
    """The same training with and without all metrics, a global_window() in each step, and a proof behind one that has
    no window."""
    weights, off = [], []
    for watched in (False, True):
        model = offloaded(made())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        monitor = Monitor(model, optimizer, all_of_them(), window_steps=WINDOW, timeout=60)
        if not watched:
            monitor.close()
        for step, (x, y) in enumerate(data_of(range(world))[rank]):
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
            if watched:
                monitor.global_window()
            if watched and step == 2:
                off.append(monitor.prove(x))
        monitor.close()
        off += [dict(window.off) for window in monitor.global_history]
        weights.append([p.full_tensor().tolist() for p in model.parameters()])
    return {"same": weights[0] == weights[1], "off": off}


class Even(nn.Module):
    """What is left to the root is cut evenly too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return found


def merged_in_between(
    rank: int, world: int, metrics: list[Any], *, mesh: Any = None, most: float | None = None
) -> list[Any]:
    """Windows that are merged where fully_shard() has gathered what the root holds; `most` clips gradients."""
    from torch.distributed.fsdp import fully_shard

    kept = {} if mesh is None else {"mesh": mesh}
    model: Any = made(Even)
    fully_shard(model.a, **kept)
    fully_shard(model, **kept)
    optimizer, monitor = monitored(model, metrics=metrics)
    found = []
    with monitor:
        for x, y in data_of(range(world))[rank]:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            if (window := monitor.global_window()) is not None:
                found.append(window)
            loss.backward()
            if most is not None:
                nn.utils.clip_grad_norm_(model.parameters(), most)
            optimizer.step()
        found.append(monitor.global_window())
    return found


def between_forward_and_backward(rank: int, world: int, mesh: Any = None) -> dict[str, Any]:
    metrics = [Trajectory(stats=STATS), PerSampleGradNorms(loss_reduction="mean")]
    found = merged_in_between(rank, world, metrics, mesh=mesh, most=0.3)
    return errors(found, truth(made(Even), data_of(range(world)))) | {"noise": [w[NAME].details for w in found]}


def between_in_hsdp(rank: int, world: int) -> dict[str, Any]:
    return between_forward_and_backward(rank, world, mesh_of(world))


def noise_between(rank: int, world: int) -> dict[str, Any]:
    found = merged_in_between(rank, world, [PerSampleGradNorms(loss_reduction="mean")])
    return compared(found, Truth(made(Even)).windows(data_of(range(world))))


def hsdp_samples(rank: int, world: int) -> dict[str, Any]:
    """Other batches on all ranks, one of a single sample; lambda, scores and the noise scale."""
    sizes = {0: 2, 1: 7, 2: 1, 3: 4}
    data, norms = data_of(range(world), sizes), PerSampleGradNorms(loss_reduction="mean")
    model = fsdp(made(), mesh_of(world))
    optimizer, monitor = monitored(model, metrics=[norms, Lipschitz(), Trajectory()], timeout=60)
    found = []
    with monitor:
        monitor.prove(data[rank][0][0])
        for x, y in data[rank]:
            norms.set_ids(torch.arange(len(x)) + 100 * rank)
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
        scores = norms.sync_scores(timeout=60)
    ids = torch.cat([torch.arange(sizes[r]) + 100 * r for r in range(world)])
    assert scores.lookup(ids).count.tolist() == [STEPS] * len(ids)
    expected = zip(Truth(made()).windows(data), truth_of_lambda(made(), data), strict=True)
    return compared(found, [one | other for one, other in expected])


def accumulated(rank: int, world: int) -> dict[str, Any]:
    """Two micro-batches per step, the first one without a reduction, under FSDP2."""
    batches, model = data_of(range(world)), fsdp(made())
    metric = PerSampleGradNorms(loss_reduction="mean", scale=0.5)
    optimizer, monitor = monitored(model, metrics=[metric], window_steps=WINDOW // 2)
    found = []
    with monitor:
        for step in range(STEPS // 2):
            optimizer.zero_grad()
            for part in range(2):
                x, y = batches[rank][2 * step + part]
                model.set_requires_gradient_sync(part == 1)
                (0.5 * mean_loss(model(x), y)).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    return compared(found, Truth(made(), micro=2).windows(batches))


class Checkpointed(Net):
    """It runs its middle once more in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        hidden = checkpoint(lambda h: torch.tanh(self.b(torch.tanh(h))), self.a(x), use_reentrant=False)
        found: Tensor = self.c(hidden)
        return found


def checkpointed(rank: int, world: int) -> dict[str, Any]:
    model = fsdp(made(Checkpointed))
    return compared(merged_samples(model, data_of(range(world))[rank]), Truth(made()).windows(data_of(range(world))))


def compiled(rank: int, world: int) -> dict[str, Any]:
    model: Any = made()
    model.b.compile(backend="aot_eager")
    return compared(
        merged_samples(fsdp(model), data_of(range(world))[rank]), Truth(made()).windows(data_of(range(world)))
    )


def zero_redundancy(rank: int, world: int) -> dict[str, Any]:
    """Each rank has the optimizer's state of some parameters alone."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DDP(made())
    optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    monitor = Monitor(model, optimizer, [Trajectory(stats=STATS)], window_steps=WINDOW, timeout=20)
    return errors(
        each_step(monitor, model, optimizer, data_of(range(world))[rank]), truth(made(), data_of(range(world)))
    )


class ShareOfSteps:
    """Each rank steps a part of the parameters, and sends it to the others: in step(), or behind it."""

    def __init__(self, model: nn.Module, rank: int, world: int) -> None:
        self._all, self._world = list(model.parameters()), world
        self.optimizer = torch.optim.SGD(self._all[rank::world], lr=0.1, momentum=0.9)
        self.param_groups = self.optimizer.param_groups

    def zero_grad(self) -> None:
        for parameter in self._all:
            parameter.grad = None

    def step(self) -> None:
        self.optimizer.step()
        self.send()

    def send(self) -> None:
        for i, parameter in enumerate(self._all):
            dist.broadcast(parameter.data, i % self._world)


def zero_by_hand(rank: int, world: int) -> dict[str, Any]:
    model = DDP(made())
    optimizer = ShareOfSteps(model, rank, world)
    monitor = Monitor(model, optimizer, [Trajectory(stats=STATS)], window_steps=WINDOW, timeout=20)  # type: ignore[arg-type]
    return errors(
        each_step(monitor, model, optimizer, data_of(range(world))[rank]), truth(made(), data_of(range(world)))
    )


def zero_by_hand_behind(rank: int, world: int) -> Any:
    """The Monitor is given the optimizer inside: its step moves other parameters on each rank."""
    model = DDP(made())
    optimizer = ShareOfSteps(model, rank, world)
    monitor = Monitor(model, optimizer.optimizer, [Trajectory(stats=STATS)], window_steps=WINDOW, timeout=20)
    return each_step(monitor, model, optimizer, data_of(range(world))[rank])


def each_step(monitor: Monitor, model: Any, optimizer: Any, data: Data) -> list[Any]:
    found: list[Any] = []

    def after(step: int) -> None:
        if (window := monitor.global_window()) is not None:
            found.append(window)

    with monitor:
        train(model, optimizer, data, after)
    return found


def made_before_the_group(rank: int, world: int) -> dict[str, Any]:
    """A Monitor of what is inside DistributedDataParallel, older than the process group."""
    dist.destroy_process_group()
    model = made()
    optimizer, monitor = monitored(model)
    next_group(rank, world)
    expected = truth(made(), data_of(range(world)))
    return errors(each_step(monitor, DDP(model), optimizer, data_of(range(world))[rank]), expected)


def one_group_after_another(rank: int, world: int) -> dict[str, Any]:
    inner, data, found = made(), data_of(range(world))[rank], []
    optimizer, monitor = monitored(inner)

    def after(step: int) -> None:
        if (window := monitor.global_window()) is not None:
            found.append(window)

    train(DDP(inner), optimizer, data, after, range(WINDOW))
    dist.destroy_process_group()
    next_group(rank, world)
    train(DDP(inner), optimizer, data, after, range(WINDOW, STEPS))
    monitor.close()
    return errors(found, truth(made(), data_of(range(world))))


def destroyed(rank: int, world: int) -> dict[str, Any]:
    """The process group is gone before the Monitor is closed."""
    out = {}
    for kind, wrap in (("rank", DDP), ("shard", fsdp)):
        optimizer, monitor = monitored(model := wrap(made()))
        train(model, optimizer, data_of(range(world))[rank], steps=range(WINDOW + 2))
        dist.destroy_process_group()
        with_none = monitor.compute()
        said = ""
        try:
            monitor.global_window()
        except RuntimeError as error:
            said = str(error)
        monitor.close_window()
        monitor.close()
        state = monitor.state_dict()
        scopes = [with_none.scope, *(window.scope for window in monitor.history)]
        out[kind] = {"said": said, "scopes": scopes, "step": state["step"], "merged": len(monitor.global_history)}
        next_group(rank, world)
    return out


def averaged_now_and_then(rank: int, world: int, mode: Any = "exact") -> Any:
    """Ranks train apart, and average their weights in the last step of each window."""
    model = made()
    optimizer, monitor = monitored(
        model, metrics=[Trajectory(mode=mode, **({} if mode == "exact" else {"buckets": 256}))]
    )
    with monitor:
        for step, (x, y) in enumerate(data_of(range(world))[rank]):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            if step % WINDOW == WINDOW - 1:
                with torch.no_grad():
                    for parameter in model.parameters():
                        dist.all_reduce(parameter)
                        parameter /= world
                monitor.global_window()


def averaged_with_sketches(rank: int, world: int) -> Any:
    return averaged_now_and_then(rank, world, "sketch")


def reduced_by_hand(rank: int, world: int) -> list[Any]:
    """Ranks reduce gradients behind the backward pass; the Trajectory is told, or is not."""
    expected = truth(made(), data_of(range(world)))
    found = []
    for mode, told in (("exact", True), ("exact", False), ("sketch", False)):
        trajectory = Trajectory(stats=STATS) if mode == "exact" else Trajectory(mode="sketch", buckets=256)
        optimizer, monitor = monitored(model := made(), metrics=[trajectory, TensorStats(every_steps=1)])
        windows = []
        with monitor:
            for x, y in data_of(range(world))[rank]:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world  # type: ignore[operator]
                if told:
                    trajectory.observe_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                if (window := monitor.global_window()) is not None:
                    windows.append(window)
        right = errors(windows, expected) if told else {}
        there = [key for window in windows for key in window.flat("total") if "/grad_norm" in key]
        why = [str(window["trajectory"].details.get("grad_norm_off", "")) for window in windows]
        gradients = [window["tensor_stats"].gradient["total"].mean.valid for window in windows]
        found.append({"right": right, "there": there, "why": why, "gradients": gradients})
    return found


def gathered_when_looked_at(rank: int, world: int) -> dict[str, Any]:
    """A Monitor is made behind a pass without a backward pass, and rebind() called amid a pass and behind unshard(),
    where the root has gathered its parameters."""
    model: Any = fsdp(made())
    data = data_of(range(world))[rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        model(data[0][0])
    assert not hasattr(model.c.weight, "placements")
    metrics = [Trajectory(stats=STATS), PerSampleGradNorms(loss_reduction="mean")]
    monitor = Monitor(model, optimizer, metrics, window_steps=WINDOW, timeout=20)
    found, alone = [], []
    with monitor:
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            if step == WINDOW:  # no proof is due, in which the root lets go; and a window has just closed
                gathered = model.c.weight
                monitor.rebind()
                alone.append(Trajectory(model))
                assert model.c.weight is gathered
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            for each in alone:
                each.update()
            if (window := monitor.global_window()) is not None:
                found.append(window)
        model.unshard()
        monitor.rebind()
        model.reshard()
    ours, theirs = (float(each["total"].sum.value) for each in
                    (found[-1]["trajectory"].path_length, alone[0].sync().path_length))  # fmt: skip
    off = [dict(window.off) for window in found]
    return errors(found, truth(made(), data_of(range(world)))) | {"alone": abs(ours / theirs - 1), "off": off}


def shared_by_fewer(rank: int, world: int) -> dict[str, Any]:
    """reshard_after_forward=2 on 4 ranks: behind a forward pass two ranks share what four do between steps."""
    found = looked_at_where_fewer_share(rank, world, lambda model: nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    counts = [int(window["tensor_stats"].parameter["total"].mean.count) for window in found]
    assert counts == [WINDOW * sum(p.numel() for p in made(Even).parameters())] * len(found)
    return errors(found, truth(made(Even), data_of(range(world))))


def samples_where_fewer_share(rank: int, world: int) -> dict[str, Any]:
    found = looked_at_where_fewer_share(rank, world, lambda model: None)
    return compared(found, Truth(made(Even)).windows(data_of(range(world))))


def looked_at_where_fewer_share(rank: int, world: int, clips: Callable[[Any], Any]) -> list[Any]:
    """Everything is done there: the Monitor is made, steps begin, windows are merged, one amid a step, and a state is
    saved and gone on from."""
    from torch.distributed.fsdp import fully_shard

    batches, model = data_of(range(world))[rank], made(Even)
    for layer in (model.a, model.b, model):
        fully_shard(layer, reshard_after_forward=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def look() -> None:
        with torch.no_grad():
            model(batches[0][0])
        assert model.a.weight.device_mesh.ndim == 2

    look()
    metrics = [Trajectory(stats=STATS), PerSampleGradNorms(loss_reduction="mean"), TensorStats(every_steps=1)]
    found: list[Any] = []
    with Monitor(model, optimizer, metrics, window_steps=WINDOW, timeout=20) as monitor:
        monitor.prove(batches[0][0])
        for step, (x, y) in enumerate(batches):
            look()
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            if step == WINDOW:
                found.append(monitor.global_window())
            loss.backward()
            clips(model)
            optimizer.step()
            look()
            if step == WINDOW:
                monitor.load_state_dict(monitor.state_dict())
            if step > WINDOW and (window := monitor.global_window()) is not None:
                found.append(window)
    return found


class Centred(Even):
    """It takes the mean over the samples of all ranks, forward and backward, as SyncBatchNorm does."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        hidden = torch.tanh(self.a(x))
        mean = all_reduce(hidden.mean(0)) / dist.get_world_size()  # type: ignore[no-untyped-call]
        found: Tensor = self.c(torch.tanh(self.b(hidden - mean)))
        return found


def one_replica_watched(rank: int, world: int) -> dict[str, Any]:
    """Of two replicas that speak to each other one alone has a Monitor: it runs no backward pass of its own."""
    weights, why = [], []
    for watched in (False, rank < world // 2):
        model = fsdp(made(Centred), mesh_of(world))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        metrics = [PerSampleGradNorms(loss_reduction="mean")]
        monitor = Monitor(model, optimizer, metrics, window_steps=WINDOW, group=None) if watched else None
        train(model, optimizer, data_of(range(world))[rank])
        if monitor is not None:
            monitor.close()
            why = [list(window[NAME].details["not_proved"]) for window in monitor.history]
        weights.append([p.full_tensor().tolist() for p in model.parameters()])
    return {"same": weights[0] == weights[1], "why": why}


def sharded_late(rank: int, world: int) -> dict[str, Any]:
    """fully_shard() comes after the Monitor: said by name, and the training is what it is without one."""
    weights, said = [], ""
    for watched in (False, True):
        model = made()
        monitor = Monitor(model, metrics=[PerSampleGradNorms(loss_reduction="mean")], timeout=20) if watched else None
        fsdp(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, data_of(range(world))[rank])
        try:
            if monitor is not None:
                monitor.close()
        except ValueError as error:
            said = str(error)
        weights.append([p.full_tensor().tolist() for p in model.parameters()])
    return {"same": weights[0] == weights[1], "said": said}


def closed_and_merged_again(rank: int, world: int) -> dict[str, Any]:
    """At the end all ranks close the open window and merge it, right behind a call that had none; one is slow."""
    import time

    optimizer, monitor = monitored(model := DDP(made()), window_steps=5, timeout=60)
    with monitor:
        train(model, optimizer, data_of(range(world))[rank], lambda step: monitor.global_window(), range(7))
        time.sleep(2.0 * rank)
        monitor.close_window()
        window = monitor.global_window()
    assert window is not None
    return {"steps": [window.first_step, window.last_step], "scope": window.scope}


def gone_back(rank: int, world: int) -> dict[str, Any]:
    """All ranks load a state of earlier steps; one of them is slower to its next window."""
    import time

    optimizer, monitor = monitored(model := DDP(made()), timeout=60)
    data = data_of(range(world))[rank]
    with monitor:
        train(model, optimizer, data, steps=range(3))
        state = copy.deepcopy(monitor.state_dict())
        train(model, optimizer, data, lambda step: monitor.global_window(), range(3, 7))
        monitor.load_state_dict(state)
        train(model, optimizer, data, steps=range(3, 4))
        time.sleep(2.0 * rank)
        window = monitor.global_window()
    assert window is not None
    return {"steps": [window.first_step, window.last_step], "scope": window.scope}


def two_models(rank: int, world: int) -> dict[str, Any]:
    """Each of two models on two ranks, recorded, with log() where ranks meet."""
    halves: Sequence[Sequence[int]] = [[0, 1], [2, 3]]
    groups, mine = [dist.new_group(list(half)) for half in halves], rank // 2
    folder = f"{os.environ['LIPCORE_TEST_FOLDER']}/two{mine}"
    model = DDP(made(seed=mine), process_group=groups[mine])
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings: dict[str, Any] = {"window_steps": WINDOW, "timeout": 60, "group": groups[mine]}
    with watch(model, optimizer, run=folder, metrics=[Trajectory(stats=STATS)], **settings) as monitor:
        for x, y in data_of(halves[mine])[halves[mine].index(rank)]:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            monitor.log(loss=loss)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
        monitor.log(loss=loss)
    return errors(list(monitor.global_history), truth(made(seed=mine), data_of(halves[mine])))


def stepped_within(rank: int, world: int) -> dict[str, Any]:
    """FSDP2, each parameter stepped by an optimizer of its own as its gradient comes: no clipping, no grad_norm."""
    trajectory = Trajectory(stats=("update_norm", "path_length", "weight_norm", "clipped_grad_norm"))
    expected = truth(made(), data_of(range(world)), clips=math.inf)
    model = fsdp(made())
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def hook(parameter: Any) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(hook)
    metrics = [trajectory, PerSampleGradNorms(loss_reduction="mean")]
    with Monitor(model, list(optimizers.values()), metrics, window_steps=WINDOW, timeout=20) as monitor:
        for x, y in data_of(range(world))[rank]:
            F.mse_loss(model(x), y).backward()
            monitor.global_window()
    read = ("update_norm", "path_length", "weight_norm", "clipped_grad_norm")
    wanted = [
        {key: value for key, value in window.items() if key.split("/")[1].startswith(read)} for window in expected
    ]
    windows = list(monitor.global_history)
    return errors(windows, wanted) | {
        "samples": [int(w["per_sample_grad_norm"].norm["total"].mean.count) for w in windows],
        "noise": [list(w["per_sample_grad_norm"].details["noise_scale_skipped"]) for w in windows],
    }


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    assert ranks == 4
    for work in (offload, offload_samples, offload_lambda, offload_bits, between_forward_and_backward, noise_between,
                 accumulated, checkpointed, compiled, zero_redundancy, zero_by_hand, zero_by_hand_behind,
                 made_before_the_group, one_group_after_another,
                 destroyed, averaged_now_and_then, averaged_with_sketches, reduced_by_hand, sharded_late,
                 gathered_when_looked_at, closed_and_merged_again, gone_back, stepped_within):  # fmt: skip
        yield work.__name__, 2, quiet(work)
    for work in (offload_hsdp, between_in_hsdp, hsdp_samples, two_models, one_replica_watched, shared_by_fewer,
                 samples_where_fewer_share):  # fmt: skip
        yield work.__name__, 4, quiet(work)
