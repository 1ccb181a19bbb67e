"""Situations of several ranks for per-sample norms and the noise scale, each beside one float64 process that computes
the gradient of every sample of every rank by itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pipeline import STAGES, run_stage, stage_of
from rank_situations import STEPS, WINDOW, Data, data_of, fsdp, made
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory
from lipcore.metric.distribution import Distribution
from lipcore.models.torch_internals import TorchDispatchMode
from lipcore.per_sample.noise.noise_scale import NoiseScale

NAME = "per_sample_grad_norm"
DDP = nn.parallel.DistributedDataParallel
LAYERS = ("a", "b", "c")


def mean_loss(output: Tensor, y: Tensor) -> Tensor:
    """The sum of a sample's terms is its loss; B divides the sum of these."""
    return F.mse_loss(output, y)


def sum_loss(output: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(output, y, reduction="sum")


class Truth:
    """One process that takes all ranks' samples, one at a time, at weights that all ranks train to.

    Args:
        reduction: "mean" divides the samples of a rank by their number, and the sum over ranks by theirs.
        micro: micro-batches per step, each a batch of the data.
        every: steps of which one is recorded.
        layers: of the model.
        loss: of one sample, summed.
    """

    def __init__(
        self,
        model: nn.Module,
        reduction: str = "mean",
        micro: int = 1,
        every: int = 1,
        layers: Sequence[str] = LAYERS,
        loss: Callable[[Tensor, Tensor], Tensor] = sum_loss,
    ) -> None:
        self.model, self.reduction, self.micro, self.every = model, reduction, micro, every
        self.layers, self.loss = layers, loss
        self.noise = NoiseScale(len(layers) + 1)

    def windows(self, batches: Sequence[Data]) -> list[dict[str, float]]:
        """Numbers of every window."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        found, norms = [], [Distribution() for _ in range(len(self.layers) + 1)]
        steps = STEPS // self.micro
        for step in range(steps):
            grads, weights = self._samples(batches, step)
            squares = _per_layer(self.model, grads, self.layers)
            recorded = step % self.every == 0
            for place, row in zip(norms, squares.sqrt().unbind(1), strict=True):
                place.observe(row[: len(row) * recorded])
            gradient = [
                sum((w * g[i] for w, g in zip(weights, grads, strict=True)), torch.zeros_like(parameter))
                for i, parameter in enumerate(self.model.parameters())
            ]
            if recorded and grads:
                self._observe(squares, torch.tensor(weights, dtype=torch.float64), gradient)
            for parameter, grad in zip(self.model.parameters(), gradient, strict=True):
                parameter.grad = grad
            optimizer.step()
            if (step + 1) % (WINDOW // self.micro) == 0:
                found.append(self._numbers(norms))
                norms = [Distribution() for _ in norms]
                self.noise.reset()
        return found

    def _samples(self, batches: Sequence[Data], step: int) -> tuple[list[list[Tensor]], list[float]]:
        """The gradient of every sample's loss, and what the step's gradient holds of it."""
        grads, weights = [], []
        for data in batches:
            for part in range(self.micro):
                x, y = data[step * self.micro + part]
                for i in range(len(x)):
                    loss = self.loss(self.model(x[i : i + 1]), y[i : i + 1])
                    grads.append(list(torch.autograd.grad(loss, list(self.model.parameters()))))
                    share = 1 / len(x) if self.reduction == "mean" else 1.0
                    weights.append(share / self.micro / len(batches))
        return grads, weights

    def _observe(self, squares: Tensor, weights: Tensor, gradient: list[Tensor]) -> None:
        v = weights / weights.sum()
        batch = _per_layer(self.model, [gradient], self.layers)[0] / weights.sum() ** 2
        s = float(v.square().sum())
        self.noise.observe_weighted((v.square() @ squares) / s, batch, len(v), 1 / s)

    def _numbers(self, norms: list[Distribution]) -> dict[str, float]:
        out = {}
        for place, distribution, noise in zip((*self.layers, "total"), norms, self.noise.finalize(), strict=True):
            for reducer, value in distribution.reduced("exact").items():
                out[f"{NAME}/norm.{reducer}/{place}"] = value.value
            out[f"{NAME}/norm.missing/{place}"] = 0.0
            for quantity, values in noise.items():
                out |= {f"{NAME}/{quantity}.{reducer}/{place}": value.value for reducer, value in values.items()}
        return out


def _per_layer(model: nn.Module, grads: Sequence[list[Tensor]], layers: Sequence[str] = LAYERS) -> Tensor:
    """Squared norms of each of several gradients, [gradients, layers and total]."""
    names = [name.partition(".")[0] for name, _ in model.named_parameters()]
    rows = [
        [sum(float(g.square().sum()) for g, name in zip(grad, names, strict=True) if name == layer) for layer in layers]
        for grad in grads
    ]
    squares = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(layers))
    return torch.cat([squares, squares.sum(1, keepdim=True)], dim=1)


def compared_numbers(windows: Sequence[Any], expected: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The largest relative error over all windows, and keys that are absent."""
    worst, worst_key, absent = 0.0, "", []
    for window, numbers in zip(windows, expected, strict=True):
        found = window.flat()
        for key, value in numbers.items():
            if key not in found:
                absent.append(key)
                continue
            both_nan = math.isnan(found[key]) and math.isnan(value)
            error = 0.0 if both_nan or found[key] == value else abs(found[key] - value) / max(abs(value), 1e-12)
            error = math.inf if math.isnan(error) else error
            if error > worst:
                worst, worst_key = error, key
    return {"error": worst, "where": worst_key, "absent": absent[:5], "scopes": [w.scope for w in windows]}


def compared(windows: Sequence[Any], expected: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The same, and what the windows say of the noise."""
    details = [dict(window[NAME].details) for window in windows if NAME in window]
    return compared_numbers(windows, expected) | {"details": details}


Loss = Callable[[Tensor, Tensor], Tensor]


def monitored(model: Any, reduction: str = "mean", scale: float = 1.0, **settings: Any) -> tuple[Any, Monitor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    metric = PerSampleGradNorms(loss_reduction=reduction, scale=scale)  # type: ignore[arg-type]
    settings = {"window_steps": WINDOW, "metrics": [metric], "timeout": 20} | settings
    return optimizer, Monitor(model, optimizer, **settings)


def merged(model: Any, data: Data, loss: Loss = mean_loss, after: Any = None, **settings: Any) -> list[Any]:
    """The global windows of a run that asks for one at every step; `after` is called before each optimizer step."""
    optimizer, monitor = monitored(model, "sum" if loss is sum_loss else "mean", **settings)
    found: list[Any] = []
    with monitor:
        for x, y in data:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            if after is not None:
                after()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    return found


def ddp(rank: int, world: int) -> dict[str, Any]:
    expected = Truth(made()).windows(data_of(range(world)))
    return compared(merged(DDP(made()), data_of(range(world))[rank]), expected)


def summed_loss(rank: int, world: int) -> dict[str, Any]:
    sizes = {0: 2, 1: 5}
    expected = Truth(made(), "sum").windows(data_of(range(world), sizes))
    return compared(merged(DDP(made()), data_of(range(world), sizes)[rank], sum_loss), expected)


def unequal_batches(rank: int, world: int) -> dict[str, Any]:
    sizes = {0: 2, 1: 7}
    expected = Truth(made()).windows(data_of(range(world), sizes))
    return compared(merged(DDP(made()), data_of(range(world), sizes)[rank]), expected)


def one_sample_each(rank: int, world: int) -> dict[str, Any]:
    sizes = dict.fromkeys(range(world), 1)
    expected = Truth(made()).windows(data_of(range(world), sizes))
    return compared(merged(DDP(made()), data_of(range(world), sizes)[rank]), expected)


def empty_rank(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 has a batch without samples in every other step."""
    batches = data_of(range(world))
    batches[1] = [(x[: 3 * (i % 2)], y[: 3 * (i % 2)]) for i, (x, y) in enumerate(batches[1])]
    expected = Truth(made(), "sum").windows(batches)
    return compared(merged(DDP(made()), batches[rank], sum_loss), expected)


def empty_step(rank: int, world: int) -> dict[str, Any]:
    """No rank has a sample in the second step."""
    batches = data_of(range(world))
    for data in batches:
        data[1] = data[1][0][:0], data[1][1][:0]
    expected = Truth(made(), "sum").windows(batches)
    return compared(merged(DDP(made()), batches[rank], sum_loss), expected)


def accumulated(rank: int, world: int) -> dict[str, Any]:
    """Two micro-batches per step, the first one without a reduction."""
    batches = data_of(range(world))
    expected = Truth(made(), micro=2).windows(batches)
    model = DDP(made())
    optimizer, monitor = monitored(model, scale=0.5, window_steps=WINDOW // 2)
    found = []
    with monitor:
        for step in range(STEPS // 2):
            optimizer.zero_grad()
            (x, y), (x2, y2) = batches[rank][2 * step : 2 * step + 2]
            with model.no_sync():
                (0.5 * mean_loss(model(x), y)).backward()
            (0.5 * mean_loss(model(x2), y2)).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    return compared(found, expected)


def every_second_step(rank: int, world: int) -> dict[str, Any]:
    expected = Truth(made(), every=2).windows(data_of(range(world)))
    metric = PerSampleGradNorms(loss_reduction="mean", every_steps=2)
    return compared(merged(DDP(made()), data_of(range(world))[rank], metrics=[metric]), expected)


def late_call(rank: int, world: int) -> dict[str, Any]:
    """All windows are merged by one call at the end."""
    expected = Truth(made()).windows(data_of(range(world)))
    model = DDP(made())
    optimizer, monitor = monitored(model)
    with monitor:
        for x, y in data_of(range(world))[rank]:
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        monitor.global_window()
    return compared(list(monitor.global_history), expected)


def loaded_within(rank: int, world: int) -> dict[str, Any]:
    """A state of the middle of a window holds its single steps."""
    expected = Truth(made()).windows(data_of(range(world)))
    return compared(loaded_amid(DDP(made()), data_of(range(world))[rank]), expected)


def loaded_amid(model: Any, data: Data) -> list[Any]:
    """The global windows of a run that goes on, in its third step, from its own state in another Monitor."""
    optimizer, monitor = monitored(model)
    found = []
    for step, (x, y) in enumerate(data):
        if step == 2:
            state = monitor.state_dict()
            monitor.close()
            metric = PerSampleGradNorms(loss_reduction="mean")
            monitor = Monitor(model, optimizer, metrics=[metric], window_steps=WINDOW, timeout=20)
            monitor.load_state_dict(state)
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()
        if (window := monitor.global_window()) is not None:
            found.append(window)
    monitor.close()
    return found


def left_over(rank: int, world: int) -> dict[str, Any]:
    """In the third step rank 1 begins with gradients of the second."""
    model = DDP(made())
    optimizer, monitor = monitored(model)
    with monitor:
        for step, (x, y) in enumerate(data_of(range(world))[rank][:WINDOW]):
            if step != 2 or rank == 0:
                optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        found = monitor.global_window()
    assert found is not None
    result = found[NAME]
    assert result.norm["total"].mean.count == 3 * world * WINDOW
    assert result.noise_scale["total"].mean.count == WINDOW - 1
    ((why, count),) = result.details["noise_scale_skipped"].items()
    assert count == result.skipped_steps["total"].sum.value == 1
    return {"said": why, "value": result.gradient_sq["total"].mean.value}


def counted(rank: int, world: int) -> dict[str, Any]:
    """Collectives of training steps and of global_window(), with three metrics."""
    model = DDP(made())
    metrics = [PerSampleGradNorms(loss_reduction="mean"), Trajectory(), Lipschitz()]
    optimizer, monitor = monitored(model, metrics=metrics)
    data, found = data_of(range(world))[rank], {}

    def train(steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            mean_loss(model(data[step][0]), data[step][1]).backward()
            optimizer.step()

    with monitor:
        found["training"] = collectives(lambda: train(range(WINDOW)))
        found["first"] = collectives(monitor.global_window)
        train(range(WINDOW, STEPS))
        found["second"] = collectives(monitor.global_window)
        assert len(monitor.global_history[-1]) == 3
    twin = DDP(made())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    model = twin
    found["plain"] = collectives(lambda: train(range(WINDOW)))
    return found


def collectives(work: Callable[[], Any]) -> int:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += "c10d" in function.namespace
            return function(*args, **(kwargs or {}))

    with Count() as mode:
        work()
    return mode.calls


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    expected = Truth(made()).windows(data_of(range(world)))
    return compared(merged(fsdp(made()), data_of(range(world))[rank]), expected)


def fsdp2_unequal(rank: int, world: int) -> dict[str, Any]:
    sizes = {0: 2, 1: 7}
    expected = Truth(made()).windows(data_of(range(world), sizes))
    return compared(merged(fsdp(made()), data_of(range(world), sizes)[rank]), expected)


def hsdp(rank: int, world: int) -> dict[str, Any]:
    expected = Truth(made()).windows(data_of(range(world)))
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    return compared(merged(fsdp(made(), mesh), data_of(range(world))[rank]), expected)


def subgroups(rank: int, world: int) -> dict[str, Any]:
    """Two models, each on two ranks with a group of its own."""
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    groups = [dist.new_group(half) for half in halves]
    mine = 0 if rank in halves[0] else 1
    expected = Truth(made(seed=mine)).windows(data_of(halves[mine]))
    model = DDP(made(seed=mine), process_group=groups[mine])
    data = data_of(halves[mine])[halves[mine].index(rank)]
    return compared(merged(model, data, group=groups[mine]), expected)


def group_of_some(rank: int, world: int) -> dict[str, Any]:
    """The gradient is that of all ranks, the window that of the first two."""
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    groups = [dist.new_group(half) for half in halves]
    found = merged(DDP(made()), data_of(range(world))[rank], group=groups[0 if rank in halves[0] else 1])
    return without_noise(found)


def without_noise(windows: Sequence[Any]) -> dict[str, Any]:
    """What windows say that have norms, and no noise scale."""
    assert all("noise_scale" not in window[NAME] for window in windows)
    assert all(window[NAME].norm["total"].mean.valid for window in windows)
    return {"said": windows[-1][NAME].details["noise_scale_off"]}


def skipped(windows: Sequence[Any]) -> dict[str, Any]:
    """What windows say whose steps were all left out of the noise scale."""
    found = windows[-1][NAME]
    assert math.isnan(found.noise_scale["total"].mean.value)
    assert found.skipped_steps["total"].sum.value == WINDOW
    ((why, count),) = found.details["noise_scale_skipped"].items()
    assert count == WINDOW
    return {"said": why}


def reduced_by_hand(rank: int, world: int) -> dict[str, Any]:
    """After the backward pass, which reads the gradient of this rank alone."""
    model = DDP(made())

    def reduce() -> None:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world

    with model.no_sync():
        return skipped(merged(model, data_of(range(world))[rank], after=reduce))


def module_inside(rank: int, world: int) -> dict[str, Any]:
    """The Monitor gets what is inside DistributedDataParallel."""
    model = made()
    wrapped = DDP(model)
    optimizer, monitor = monitored(model)
    with monitor:
        for x, y in data_of(range(world))[rank][:WINDOW]:
            optimizer.zero_grad()
            mean_loss(wrapped(x), y).backward()
            optimizer.step()
        found = monitor.global_window()
    local = monitor.history[0][NAME]
    assert "pass the wrapped module" in local.details["noise_scale_off"]
    assert not local.noise_scale["total"].mean.valid
    return without_noise([found])


def communication_hook(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model = DDP(made())
    model.register_comm_hook(None, allreduce_hook)
    return without_noise(merged(model, data_of(range(world))[rank]))


def other_divisor(rank: int, world: int) -> dict[str, Any]:
    model = fsdp(made())
    model.set_gradient_divide_factor(1.0)
    return without_noise(merged(model, data_of(range(world))[rank]))


def independent(rank: int, world: int) -> Any:
    """Each rank trains a model of its own in one group."""
    return merged(made(seed=rank), data_of([rank])[0])


def independent_for_themselves(rank: int, world: int) -> dict[str, Any]:
    """The same with group=None: each rank's own windows are right."""
    expected = Truth(made(seed=rank)).windows(data_of([rank]))
    model = made(seed=rank)
    optimizer, monitor = monitored(model, group=None)
    with monitor:
        for x, y in data_of([rank])[0]:
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
    return compared(list(monitor.history), expected)


def joined(rank: int, world: int) -> Any:
    """Rank 0 has more data than rank 1."""
    model = DDP(made())
    optimizer, monitor = monitored(model)
    with monitor:
        with model.join():
            for x, y in data_of(range(world))[rank][: STEPS if rank == 0 else WINDOW]:
                optimizer.zero_grad()
                mean_loss(model(x), y).backward()
                optimizer.step()
        return monitor.global_window()


def pipeline(rank: int, world: int) -> dict[str, Any]:
    """Two stages as a schedule runs them; each knows the norms of its own layers."""
    stage = stage_of(made(), rank)
    data = data_of([0])
    expected = []
    for numbers in Truth(made()).windows(data):
        split = {key.rpartition("/"): value for key, value in numbers.items() if "/norm." in key}
        expected.append({f"{key}/{STAGES[place]}": v for (key, _, place), v in split.items() if place in STAGES})
    optimizer, monitor = monitored(stage, prefix=f"stages.{rank}")
    found = []
    with monitor:
        for x, y in data[0]:
            optimizer.zero_grad()
            run_stage(stage, rank, x, y)
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    for window in found:
        assert not any(place.startswith("total") for place in window[NAME].norm)
        assert "hold other layers" in window[NAME].details["total_off"]
        assert "noise_scale_off" in window[NAME].details
    return compared(found, expected)


class Exchanging(nn.Module):
    """Half of each sequence on each rank; tokens see those of the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        hidden = torch.tanh(self.a(x))
        return self.b(hidden + all_reduce(hidden)).sum(1)


def context_parallel(rank: int, world: int, wrap: Callable[[Any], Any] = DDP, asks: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    model = wrap(Exchanging().double())
    optimizer, monitor = monitored(model, metrics=[PerSampleGradNorms(loss_reduction="mean"), Trajectory()])
    data = [(torch.randn(3, 4, 6).double(), torch.randn(3, 1).double()) for _ in range(WINDOW)]
    answer = monitor.prove(data[0][0])[NAME] if asks else "exchanges activations"
    assert "exchanges activations" in answer
    return stopped(monitor, model, optimizer, data)


def context_parallel_sharded(rank: int, world: int) -> dict[str, Any]:
    return context_parallel(rank, world, fully_shard)


def context_parallel_sharded_asked(rank: int, world: int) -> dict[str, Any]:
    return context_parallel(rank, world, fully_shard, asks=True)


class Sequences(nn.Module):
    """Half of each sequence is on each rank before its first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.tanh(self.a(self.norm(x))))
        return found.sum(1)


def sequences(world: int) -> nn.Module:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    plan: Any = {"norm": SequenceParallel(), "a": ColwiseParallel(input_layouts=Shard(1)), "b": RowwiseParallel()}
    return parallelize_module(made(Sequences), init_device_mesh("cpu", (world,)), plan)


def halves_of_sequences(rank: int) -> Data:
    generator = torch.Generator().manual_seed(7)
    batches = [(torch.randn(3, 4, 6, generator=generator).double(), torch.randn(3, 1, generator=generator).double())
               for _ in range(WINDOW)]  # fmt: skip
    return [(x.chunk(2, 1)[rank], y) for x, y in batches]


def sequence_parallel(rank: int, world: int) -> dict[str, Any]:
    metrics = [PerSampleGradNorms(loss_reduction="mean"), Trajectory()]
    optimizer, monitor = monitored(model := sequences(world), metrics=metrics)
    return stopped(monitor, model, optimizer, halves_of_sequences(rank))


class Experts(nn.Module):
    """Each rank holds one of two experts, and sends it half of its samples."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1)
        self.experts = nn.ModuleDict({str(rank): nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_to_all_single

        hidden = torch.tanh(self.a(x))
        (expert,) = self.experts.values()
        sent = expert(all_to_all_single(torch.empty_like(hidden), hidden))
        return self.b(all_to_all_single(torch.empty_like(hidden), sent))


def experts(rank: int, world: int) -> nn.Module:
    torch.manual_seed(0)
    model = Experts(rank).double()

    def shared(parameter: Tensor) -> None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= world  # type: ignore[operator]

    for layer in (model.a, model.b):
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(shared)
    return model


def expert_parallel(rank: int, world: int) -> dict[str, Any]:
    model = experts(rank, world)
    optimizer, monitor = monitored(model, metrics=[PerSampleGradNorms(loss_reduction="mean"), Trajectory()])
    return stopped(monitor, model, optimizer, data_of(range(world), dict.fromkeys(range(world), 4))[rank])


def stopped(monitor: Monitor, model: Any, optimizer: Any, data: Data, name: str = NAME) -> dict[str, Any]:
    """Train on, whatever the metric says, and return why it is not in the window of all ranks."""
    for x, y in data[:WINDOW]:
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()
    try:
        monitor.close()
    except ValueError:
        monitor.close()
    window = monitor.global_window()
    assert window is not None
    assert name not in window
    return {"said": window.off[name]}


def scores_by_id(rank: int, world: int) -> dict[str, Any]:
    """Of some samples both ranks have a value; what each has observed stays as it is."""
    model = DDP(made())
    metric = PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    all_values: dict[int, list[float]] = {}
    twin = Truth(made())
    batches = data_of(range(world), {0: 2, 1: 5})
    with monitor:
        for step in range(3):
            for other, data in enumerate(batches):
                grads, _ = twin._samples([data], step)
                for i, norm in zip(ids_of(other, step, len(data[step][0])), _per_layer(twin.model, grads)[:, -1].sqrt(),
                                   strict=True):  # fmt: skip
                    all_values.setdefault(i, []).append(float(norm))
            x, y = batches[rank][step]
            metric.set_ids(ids_of(rank, step, len(x)))
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
            twin.model.load_state_dict(model.module.state_dict())
        before = metric.scores.to_numpy()
        found = metric.sync_scores()
        assert all((before[key] == after).all() for key, after in metric.scores.to_numpy().items())
    ids = sorted(all_values)
    assert found.to_numpy()["ids"].tolist() == ids
    statistics = found.lookup(ids)
    assert statistics.count.tolist() == [len(all_values[i]) for i in ids]
    errors = [abs(a - sum(all_values[i]) / len(all_values[i])) / a for i, a in zip(ids, statistics.mean, strict=True)]
    errors += [abs(a - max(all_values[i])) / a for i, a in zip(ids, statistics.max, strict=True)]
    return {"error": float(max(errors))}


def ids_of(rank: int, step: int, size: int) -> list[int]:
    return [10 * step + 3 * rank + i for i in range(size)]


def taken_back(rank: int, world: int) -> dict[str, Any]:
    """A proof fails on rank 1 after a window was merged, and after another one has closed."""
    model = DDP(made())
    optimizer, monitor = monitored(model)
    data, metric = data_of(range(world))[rank], monitor.metrics[NAME]
    with monitor:
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            metric._window.unproved.tapped = True  # as between two proofs
            if step == WINDOW + 1:
                first = monitor.global_window()
                assert first is not None
                assert first[NAME].norm["total"].mean.valid
            optimizer.step()
        if rank == 1:
            metric.observe_proof("a test", served=False)
        second = monitor.global_window()
    assert second is not None
    assert first is not None
    return {"off": second.off.get(NAME, ""), "first": first[NAME].details.get("withdrawn", ""),
            "nan": math.isnan(first[NAME].norm["total"].mean.value)}  # fmt: skip


def quiet(work: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    def run(rank: int, world: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work(rank, world)

    return run


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    two = (ddp, summed_loss, unequal_batches, one_sample_each, empty_rank, empty_step, accumulated, fsdp2,
           fsdp2_unequal, reduced_by_hand, module_inside, communication_hook, other_divisor, independent,
           independent_for_themselves, joined, every_second_step, late_call, loaded_within, left_over, counted,
           pipeline, context_parallel, context_parallel_sharded, context_parallel_sharded_asked, sequence_parallel,
           expert_parallel, scores_by_id, taken_back)  # fmt: skip
    for work in two if ranks == 2 else (hsdp, subgroups, group_of_some):
        yield work.__name__, ranks, quiet(work)
