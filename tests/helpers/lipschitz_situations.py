"""Situations of several ranks for local Lipschitz constants, each beside one float64 process that differentiates every
sample of every rank by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pipeline import run_stage, stage_of
from rank_situations import STEPS, WINDOW, Columns, Data, Net, data_of, fsdp, made, planned
from sample_situations import (
    DDP,
    Exchanging,
    compared_numbers,
    experts,
    halves_of_sequences,
    mean_loss,
    quiet,
    sequences,
    stopped,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lipcore import Lipschitz, Monitor, Trajectory
from lipcore.metric.distribution import Distribution

NAME, PLACE = "lipschitz", "model"


def truth(model: nn.Module, batches: Sequence[Data], seen: Sequence[int] = range(9)) -> list[dict[str, float]]:
    """Numbers of every window: r, lambda and the sides of Theorem 1, at the samples of the `seen` ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first: Any = model.a
    found, both = [], (Distribution(), Distribution())
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank, data in enumerate(batches):
            x, y = data[step]
            for i in range(len(x) if rank in seen else 0):
                r, constant = constants_of(model, first, x[i : i + 1])
                both[0].observe(r)
                both[1].observe(constant)
            (mean_loss(model(x), y) / len(batches)).backward()
        optimizer.step()
        if (step + 1) % WINDOW == 0:
            values = [("normalized_gradient_norm", both[0].reduced("exact", total=True))]
            values.append(("local_lipschitz", both[1].reduced("exact")))
            numbers = {f"{NAME}/{q}.{key}/{PLACE}": v.value for q, reduced in values for key, v in reduced.items()}
            numbers[f"{NAME}/steadiness.max/{PLACE}"] = both[0].max
            largest = float(torch.linalg.svdvals(first.weight.detach())[0])
            numbers[f"{NAME}/sandwich.lower/{PLACE}"] = both[1].mean / largest
            numbers[f"{NAME}/sandwich.middle/{PLACE}"] = both[0].mean
            found.append(numbers)
            both = (Distribution(), Distribution())
    return found


def constants_of(model: nn.Module, first: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []
    handle = first.register_forward_hook(lambda module, into, out: kept.append(out))
    x = x.clone().requires_grad_()
    output = model(x)
    handle.remove()
    at_first, at_input = torch.autograd.grad(output.sum(), [kept[0], x])
    return at_first.norm(), at_input.norm()


def monitored(model: Any, **settings: Any) -> tuple[Any, Monitor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"window_steps": WINDOW, "metrics": [Lipschitz(), Trajectory()], "timeout": 20} | settings
    return optimizer, Monitor(model, optimizer, **settings)


def run(
    model: Any, data: Data, *, loss: Any = mean_loss, proves: bool = False, **settings: Any
) -> tuple[str, list[Any]]:
    """What a proof by all ranks has said, where one is asked for, and the windows of a training after it."""
    optimizer, monitor = monitored(model, **settings)
    said, found = "", []
    with monitor:
        if proves:
            (said,) = monitor.prove(data[0][0]).values()
        for x, y in data:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    return said, found


def merged(model: Any, data: Data, **settings: Any) -> list[Any]:
    said, windows = run(model, data, **settings)
    assert not said
    return windows


def ddp(rank: int, world: int) -> dict[str, Any]:
    expected = truth(made(), data_of(range(world)))
    windows = merged(DDP(made()), data_of(range(world))[rank])
    assert all(w[NAME].details["first_bias"]["samples"] == 3 * world * WINDOW for w in windows)
    assert all(w[NAME].sandwich[PLACE].lower.label == "heuristic" for w in windows)  # W_1 moves
    return compared_numbers(windows, expected)


def unequal_batches(rank: int, world: int) -> dict[str, Any]:
    sizes = {0: 2, 1: 7}
    expected = truth(made(), data_of(range(world), sizes))
    return compared_numbers(merged(DDP(made()), data_of(range(world), sizes)[rank]), expected)


def without_lambda(expected: Sequence[dict[str, float]], windows: Sequence[Any]) -> list[dict[str, float]]:
    """What there is of sharded models, beside sigma_1 of W_1, which is looked at here."""
    for numbers, window in zip(expected, windows, strict=True):
        sigma = numbers[f"{NAME}/local_lipschitz.mean/{PLACE}"] / numbers[f"{NAME}/sandwich.lower/{PLACE}"]
        assert abs(window[NAME].details["singular_values"]["largest"] / sigma - 1) < 1e-7
    return [only_r(each) for each in expected]


def only_r(expected: dict[str, float]) -> dict[str, float]:
    return {key: v for key, v in expected.items() if "local_lipschitz" not in key and "sandwich" not in key}


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    """Of sharded models there is no lambda, by name."""
    windows = merged(fsdp(made()), data_of(range(world))[rank])
    expected = without_lambda(truth(made(), data_of(range(world))), windows)
    for window in windows:
        assert "sharded over ranks" in window[NAME].details["local_lipschitz_off"]
        assert not window[NAME].local_lipschitz[PLACE].mean.valid
        assert "sandwich" not in window[NAME]
    return compared_numbers(windows, expected)


def fsdp2_proved(rank: int, world: int) -> dict[str, Any]:
    windows = merged(fsdp(made()), data_of(range(world))[rank], proves=True)
    for window in windows:
        assert window[NAME].local_lipschitz[PLACE].mean.label == "exact"
        assert "first_weight_not_alone" not in window[NAME].details
    return compared_numbers(windows, truth(made(), data_of(range(world))))


def fsdp2_unequal(rank: int, world: int) -> dict[str, Any]:
    sizes = {0: 2, 1: 7}
    windows = merged(fsdp(made()), data_of(range(world), sizes)[rank], proves=True)
    return compared_numbers(windows, truth(made(), data_of(range(world), sizes)))


def fsdp2_chain(rank: int, world: int) -> dict[str, Any]:
    """Layers one after the other need no proof."""
    chain = nn.Sequential(
        OrderedDict(a=nn.Linear(6, 8), x=nn.Tanh(), b=nn.Linear(8, 5), y=nn.Tanh(), c=nn.Linear(5, 1))
    )
    chain.double().load_state_dict(made().state_dict())
    windows = merged(fsdp(chain), data_of(range(world))[rank])
    place = f"{PLACE}:Linear"
    assert all(window[NAME].local_lipschitz[place].mean.label == "exact" for window in windows)
    expected = truth(made(), data_of(range(world)))
    return compared_numbers(windows, [{f"{key}:Linear": value for key, value in each.items()} for each in expected])


class Past(Net):
    """Its output depends on the input past the first layer."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x) + x[:, :1]
        return found


def fsdp2_past(rank: int, world: int) -> dict[str, Any]:
    answer, (window,) = run(fsdp(made(Past)), data_of(range(world))[rank][:WINDOW], proves=True)
    assert "rank 1: " in answer
    assert window[NAME].normalized_gradient_norm[PLACE].mean.valid
    assert not window[NAME].local_lipschitz[PLACE].mean.valid
    return {"said": window[NAME].details["local_lipschitz_off"]}


class Keeping(Net):
    """It keeps what its first layer returns."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.a(x)
        found: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.kept))))
        return found


class Mixing(Net):
    """Samples influence each other behind the first layer."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        found: Tensor = self.c(torch.tanh(self.b(hidden - hidden.mean(0))))
        return found


def fsdp2_mixing(rank: int, world: int) -> dict[str, Any]:
    answer, (window,) = run(fsdp(made(Mixing)), data_of(range(world))[rank][:WINDOW], proves=True)
    assert window[NAME].normalized_gradient_norm[PLACE].mean.label == "heuristic"
    assert window[NAME].local_lipschitz[PLACE].mean.label == "heuristic"
    return {"said": answer}


def fsdp2_penalty(rank: int, world: int) -> dict[str, Any]:
    """The loss reaches the first layer past the output: constants by way of its gradient would be wrong."""
    model = fsdp(made(Keeping))

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return mean_loss(output, y) + model.kept.square().sum()

    metrics = [Lipschitz(input="a"), Trajectory()]
    (window,) = merged(model, data_of(range(world))[rank][:WINDOW], loss=loss, metrics=metrics)
    assert not window[NAME].local_lipschitz[PLACE].mean.valid
    return {"said": window[NAME].details["local_lipschitz_off"]}


def fsdp2_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    """No rank waits for one that has no metric, and what was not compared says so."""
    model = fsdp(made())
    metrics = [Trajectory(), *([Lipschitz(input="a")] if rank == 0 else [])]
    optimizer, monitor = monitored(model, metrics=metrics)
    with monitor:
        for x, y in data_of(range(world))[rank][:WINDOW]:
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        if rank:
            return {"said": "no metric"}
        value = monitor.history[0][NAME].local_lipschitz[PLACE].mean
    assert value.label == "heuristic"
    return {"said": value.note}


def fsdp2_output_in_another_dtype(rank: int, world: int) -> dict[str, Any]:
    """The gradient comes to the first layer's output before fully_shard() has gathered its weight."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model: Any = made()
    fully_shard(model.a, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))
    fully_shard(model.b, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float64))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float64))
    optimizer, monitor = monitored(model, metrics=[Lipschitz(input="a"), Trajectory()])
    with monitor:
        for x, y in data_of(range(world))[rank][:WINDOW]:
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        window = monitor.global_window()
    assert window is not None
    assert window[NAME].normalized_gradient_norm[PLACE].mean.valid
    return {"said": window[NAME].details["local_lipschitz_off"]}


def hsdp(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    windows = merged(fsdp(made(), mesh), data_of(range(world))[rank])
    return compared_numbers(windows, without_lambda(truth(made(), data_of(range(world))), windows))


def hsdp_proved(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    windows = merged(fsdp(made(), mesh), data_of(range(world))[rank], proves=True)
    assert all(window[NAME].local_lipschitz[PLACE].mean.label == "exact" for window in windows)
    return compared_numbers(windows, truth(made(), data_of(range(world))))


def subgroups(rank: int, world: int) -> dict[str, Any]:
    """Two models, each on two ranks with a group of its own."""
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    groups = [dist.new_group(half) for half in halves]
    mine = 0 if rank in halves[0] else 1
    expected = truth(made(seed=mine), data_of(halves[mine]))
    model = DDP(made(seed=mine), process_group=groups[mine])
    data = data_of(halves[mine])[halves[mine].index(rank)]
    return compared_numbers(merged(model, data, group=groups[mine]), expected)


def group_of_some(rank: int, world: int) -> dict[str, Any]:
    """All ranks train one model, and windows are those of two of them."""
    halves = [list(range(world // 2)), list(range(world // 2, world))]
    groups = [dist.new_group(half) for half in halves]
    mine = 0 if rank in halves[0] else 1
    expected = truth(made(), data_of(range(world)), seen=halves[mine])
    return compared_numbers(merged(DDP(made()), data_of(range(world))[rank], group=groups[mine]), expected)


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    optimizer, monitor = monitored(model := planned(made(Columns), init_device_mesh("cpu", (world,))))
    for x, y in data_of([0])[0][:WINDOW]:
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()
    try:
        monitor.close()  # raises what has stopped the metric
    except ValueError:
        monitor.close()
    window = monitor.global_window()
    assert window is not None
    assert list(window) == ["trajectory"]
    return {"said": window.off[NAME]}


def tensor_parallel_behind_first(rank: int, world: int) -> dict[str, Any]:
    """Both ranks see each sample, which counts once; lambda is not there, by name."""
    mesh = init_device_mesh("cpu", (world,))
    model = parallelize_module(made(Columns), mesh, {"b": ColwiseParallel(), "c": RowwiseParallel()})
    windows = merged(model, data_of([0])[0])
    assert all("sharded over ranks" in window[NAME].details["local_lipschitz_off"] for window in windows)
    expected = truth(made(Columns), data_of([0]))
    return compared_numbers(windows, [only_r(each) for each in expected])


def context_parallel(rank: int, world: int) -> dict[str, Any]:
    optimizer, monitor = monitored(model := DDP(Exchanging().double()))
    data = [(torch.randn(3, 4, 6).double(), torch.randn(3, 1).double()) for _ in range(WINDOW)]
    return stopped(monitor, model, optimizer, data, NAME)


class Tokens(nn.Module):
    """The same of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rest = nn.Embedding(5, 6), Exchanging()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.rest(self.words(ids))
        return found


def context_parallel_text(rank: int, world: int) -> dict[str, Any]:
    optimizer, monitor = monitored(model := DDP(Tokens().double()))
    data = [(torch.randint(0, 5, (3, 4)), torch.randn(3, 1).double()) for _ in range(WINDOW)]
    return stopped(monitor, model, optimizer, data, NAME)


def sequence_parallel(rank: int, world: int) -> dict[str, Any]:
    optimizer, monitor = monitored(model := sequences(world))
    return stopped(monitor, model, optimizer, halves_of_sequences(rank), NAME)


def expert_parallel(rank: int, world: int) -> dict[str, Any]:
    optimizer, monitor = monitored(model := experts(rank, world))
    return stopped(monitor, model, optimizer, data_of(range(world), dict.fromkeys(range(world), 4))[rank], NAME)


def pipeline(rank: int, world: int) -> dict[str, Any]:
    """A stage's constant is not the model's."""
    stage = stage_of(made(), rank)
    optimizer, monitor = monitored(stage, prefix=f"stages.{rank}")
    with monitor:
        for x, y in data_of([0])[0][:WINDOW]:
            optimizer.zero_grad()
            run_stage(stage, rank, x, y)
            optimizer.step()
        window = monitor.global_window()
    assert window is not None
    assert list(window) == ["trajectory"]
    assert all(place.startswith(f"stages.{rank}.") for place in monitor.history[0][NAME].local_lipschitz)
    return {"said": window.off[NAME]}


def independent(rank: int, world: int) -> Any:
    return merged(made(seed=rank), data_of([rank])[0], metrics=[Lipschitz()])


def other_settings(rank: int, world: int) -> dict[str, Any]:
    """One rank asks for the bounds of a vector."""
    metrics = [Lipschitz(quantity="residual" if rank else "scalar"), Trajectory()]
    windows = merged(DDP(made()), data_of(range(world))[rank], metrics=metrics)
    return {"said": windows[-1].off[NAME]}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    two = (ddp, unequal_batches, fsdp2, fsdp2_proved, fsdp2_unequal, fsdp2_chain, fsdp2_past, fsdp2_mixing,
           fsdp2_penalty, fsdp2_on_one_rank, fsdp2_output_in_another_dtype, tensor_parallel,
           tensor_parallel_behind_first, context_parallel,
           context_parallel_text, sequence_parallel, expert_parallel, pipeline, independent,
           other_settings)  # fmt: skip
    for work in two if ranks == 2 else (hsdp, hsdp_proved, subgroups, group_of_some):
        yield work.__name__, ranks, quiet(work)
