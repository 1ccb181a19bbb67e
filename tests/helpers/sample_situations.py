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
from rank_situations import STEPS, WINDOW, Data, data_of, fsdp, made
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lipcore import Monitor, PerSampleGradNorms
from lipcore.metric.distribution import Distribution
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
    """

    def __init__(self, model: nn.Module, reduction: str = "mean", micro: int = 1) -> None:
        self.model, self.reduction, self.micro = model, reduction, micro
        self.noise = NoiseScale(len(LAYERS) + 1)

    def windows(self, batches: Sequence[Data]) -> list[dict[str, float]]:
        """Numbers of every window."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        found, norms = [], [Distribution() for _ in range(len(LAYERS) + 1)]
        steps = STEPS // self.micro
        for step in range(steps):
            grads, weights = self._samples(batches, step)
            squares = _per_layer(self.model, grads)
            for place, row in zip(norms, squares.sqrt().unbind(1), strict=True):
                place.observe(row)
            gradient = [sum(w * g[i] for w, g in zip(weights, grads, strict=True)) for i in range(len(grads[0]))]
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
                    loss = sum_loss(self.model(x[i : i + 1]), y[i : i + 1])
                    grads.append(list(torch.autograd.grad(loss, list(self.model.parameters()))))
                    share = 1 / len(x) if self.reduction == "mean" else 1.0
                    weights.append(share / self.micro / len(batches))
        return grads, weights

    def _observe(self, squares: Tensor, weights: Tensor, gradient: list[Tensor]) -> None:
        v = weights / weights.sum()
        batch = _per_layer(self.model, [gradient])[0] / weights.sum() ** 2
        s = float(v.square().sum())
        self.noise.observe_weighted((v.square() @ squares) / s, batch, len(v), 1 / s)

    def _numbers(self, norms: list[Distribution]) -> dict[str, float]:
        out = {}
        for place, distribution, noise in zip((*LAYERS, "total"), norms, self.noise.finalize(), strict=True):
            for reducer, value in distribution.reduced("exact").items():
                out[f"{NAME}/norm.{reducer}/{place}"] = value.value
            out[f"{NAME}/norm.missing/{place}"] = 0.0
            for quantity, values in noise.items():
                out |= {f"{NAME}/{quantity}.{reducer}/{place}": value.value for reducer, value in values.items()}
        return out


def _per_layer(model: nn.Module, grads: Sequence[list[Tensor]]) -> Tensor:
    """Squared norms of each of several gradients, [gradients, layers and total]."""
    names = [name.partition(".")[0] for name, _ in model.named_parameters()]
    rows = [
        [sum(float(g.square().sum()) for g, name in zip(grad, names, strict=True) if name == layer) for layer in LAYERS]
        for grad in grads
    ]
    squares = torch.tensor(rows, dtype=torch.float64)
    return torch.cat([squares, squares.sum(1, keepdim=True)], dim=1)


def compared(windows: Sequence[Any], expected: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The largest relative error over all windows, keys that are absent, and what the windows say of the noise."""
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
    results = [window[NAME] for window in windows if NAME in window]
    return {
        "error": worst,
        "where": worst_key,
        "absent": absent[:5],
        "scopes": [w.scope for w in windows],
        "details": [dict(result.details) for result in results],
        "off": [dict(window.off) for window in windows],
        "labels": [result.norm["total"].mean.label for result in results if "total" in result.norm],
    }


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


def quiet(work: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    def run(rank: int, world: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work(rank, world)

    return run


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    two = (ddp, summed_loss, unequal_batches, one_sample_each, empty_rank, accumulated, fsdp2, fsdp2_unequal,
           reduced_by_hand, module_inside, communication_hook, other_divisor, independent, independent_for_themselves,
           joined)  # fmt: skip
    for work in two if ranks == 2 else (hsdp, subgroups, group_of_some):
        yield work.__name__, ranks, quiet(work)
