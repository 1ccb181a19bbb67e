"""Situations of two ranks whose model torch's composable functions replicate: that of DistributedDataParallel, and that
of fully_shard()'s machinery, each beside one float64 process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import lipschitz_situations as lipschitz
import rank_situations as movement
import sample_situations as samples
import torch
from rank_situations import data_of, made
from torch import nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory

Work = Callable[[int, int], Any]


def by_hooks(model: Any) -> Any:
    """Replicate by DistributedDataParallel, of which nothing is in the model but hooks."""
    from torch.distributed._composable import replicate

    return replicate(model)


def by_layer(model: Any) -> Any:
    """Replicate as fully_shard() shards: each layer by itself, and what is left with the model."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    for layer in (model.a, model.b, model):
        replicate(layer)
    return model


def as_a_whole(model: Any) -> Any:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(model)


WAYS = {"hooks": by_hooks, "layers": by_layer, "whole": as_a_whole}


def chain() -> Any:
    """Layers one after the other, of which lambda needs no proof."""
    layers = OrderedDict(a=nn.Linear(6, 8), x=nn.Tanh(), b=nn.Linear(8, 5), y=nn.Tanh(), c=nn.Linear(5, 1))
    model = nn.Sequential(layers).double()
    model.load_state_dict(made().state_dict())
    return model


def movement_of(rank: int, world: int, way: Any) -> Any:
    expected = movement.truth(made(), data_of(range(world)))
    return movement.errors(movement.merged(way(made()), data_of(range(world))[rank]), expected)


def norms_of(rank: int, world: int, way: Any) -> Any:
    sizes = {0: 2, 1: 7}
    expected = samples.Truth(made()).windows(data_of(range(world), sizes))
    return samples.compared(samples.merged(way(made()), data_of(range(world), sizes)[rank]), expected)


def constants_of(rank: int, world: int, way: Any) -> Any:
    place = f"{lipschitz.PLACE}:Linear"
    windows = lipschitz.merged(way(chain()), data_of(range(world))[rank])
    expected = lipschitz.truth(made(), data_of(range(world)))
    found = samples.compared_numbers(windows, [{f"{k}:Linear": v for k, v in each.items()} for each in expected])
    details = [dict(window[lipschitz.NAME].details) for window in windows]
    labels = [window[lipschitz.NAME].local_lipschitz[place].mean.label for window in windows]
    return found | {"details": details, "labels": labels}


def proved_constants_of(rank: int, world: int, way: Any) -> Any:
    windows = lipschitz.merged(way(made()), data_of(range(world))[rank], proves=way is by_layer)
    found = samples.compared_numbers(windows, lipschitz.truth(made(), data_of(range(world))))
    return found | {"details": [dict(window[lipschitz.NAME].details) for window in windows]}


def proved_norms_of(rank: int, world: int, way: Any) -> Any:
    optimizer, monitor = samples.monitored(model := way(made()))
    with monitor:
        answer = monitor.prove(data_of(range(world))[rank][0][0])
        for x, y in data_of(range(world))[rank]:
            optimizer.zero_grad()
            samples.mean_loss(model(x), y).backward()
            optimizer.step()
        window = monitor.global_window()
    assert window is not None
    found = window[samples.NAME]
    return {"answer": answer, "label": found.norm["total"].mean.label, "doubts": dict(found.details)}


def bits_of(rank: int, world: int, way: Any) -> Any:
    """The training with all metrics has the bits that it has without."""
    weights = []
    for watched in (False, True):
        model = way(made())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        metrics: list[Any] = [Trajectory(), Lipschitz(), PerSampleGradNorms(loss_reduction="mean"), TensorStats()]
        monitor = Monitor(model, optimizer, metrics, window_steps=4) if watched else None
        for x, y in data_of(range(world))[rank]:
            optimizer.zero_grad()
            samples.mean_loss(model(x), y).backward()
            optimizer.step()
            if monitor is not None:
                monitor.global_window()
        if monitor is not None:
            monitor.close()
        whole: list[Any] = list(model.parameters())
        weights.append([p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in whole])
    return all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def part_of_the_model(rank: int, world: int) -> Any:
    """The rest is not reduced, so nobody knows whose gradient the step has."""
    model = made()
    by_hooks(model.b)
    optimizer, monitor = samples.monitored(model)
    with monitor:
        for x, y in data_of(range(world))[rank][:4]:
            optimizer.zero_grad()
            samples.mean_loss(model(x), y).backward()
            optimizer.step()
        return {"noise_scale_off": monitor.history[0][samples.NAME].details["noise_scale_off"]}


WORKS: dict[str, Any] = {
    "movement": movement_of,
    "norms": norms_of,
    "constants": constants_of,
    "proved_constants": proved_constants_of,
    "proved_norms": proved_norms_of,
    "bits": bits_of,
}


def situations(ranks: int) -> Iterator[tuple[str, int, Work]]:
    """Name, ranks and work of each."""
    for what, work in WORKS.items():
        for name, way in WAYS.items():
            yield (
                f"{what}_{name}",
                ranks,
                samples.quiet(lambda rank, world, work=work, way=way: work(rank, world, way)),  # type: ignore[misc]
            )
    yield part_of_the_model.__name__, ranks, samples.quiet(part_of_the_model)
