"""Stages of torch.distributed.pipelining as its schedules run them, each beside one process in float64 that has the
whole model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rank_situations import errors
from torch import Tensor, nn
from torch.distributed import pipelining

from lipcore import Monitor, TensorStats, Trajectory

STEPS, WINDOW, BATCH, MICRO_BATCHES, RATE = 4, 2, 8, 4, 0.1
SCHEDULES: Mapping[str, int] = {  # stages on each rank
    "GPipe": 1,
    "1F1B": 1,
    "Interleaved1F1B": 2,
    "LoopedBFS": 2,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
}


def layers(count: int) -> list[nn.Sequential]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for _ in range(count)]


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(STEPS, 2, BATCH, 6, generator=generator).double()
    return [(x, y) for x, y in pairs]


def truth(count: int, clip: float, mean: bool) -> list[dict[str, float]]:
    """Numbers of every window of one process: of gradients before they are clipped, and of what each layer returns."""
    stages = nn.ModuleDict({f"s{i}": layer for i, layer in enumerate(layers(count))})
    optimizer = torch.optim.SGD(stages.parameters(), lr=RATE)
    windows: list[dict[str, float]] = []
    norms: dict[str, list[float]] = {}
    elements: dict[str, list[Tensor]] = {}
    for step, (x, y) in enumerate(data(), 1):
        optimizer.zero_grad()
        for name, layer in stages.items():
            x = layer[0](x)  # type: ignore[index]
            elements.setdefault(f"output/{name}.0", []).append(x.detach().flatten())
            x = torch.tanh(x)
            elements.setdefault(f"output/{name}", []).append(x.detach().flatten())
        (F.mse_loss(x, y) * (1 if mean else MICRO_BATCHES)).backward()
        for name, parameter in stages.named_parameters():
            assert parameter.grad is not None
            elements.setdefault(f"gradient/{name}", []).append(parameter.grad.flatten().clone())
            norms.setdefault(name, []).append(float(parameter.grad.norm()))
        norms.setdefault("total", []).append(float(torch.cat([p.grad.flatten() for p in stages.parameters()]).norm()))  # type: ignore[union-attr]
        for parameter in stages.parameters():
            parameter.grad.mul_(clip)  # type: ignore[union-attr]
        optimizer.step()
        if step % WINDOW == 0:
            found = {f"trajectory/grad_norm.mean/{name}": sum(each) / WINDOW for name, each in norms.items()}
            found |= {f"trajectory/clipped_grad_norm.last/{name}": clip * each[-1] for name, each in norms.items()}
            for name, each in elements.items():
                quantity, place = name.split("/")
                every = torch.cat(each)
                numbers = {"mean": every.mean(), "max": every.max(), "sd": every.std(correction=0)}
                found |= {f"tensor_stats/{quantity}.{key}/{place}": float(number) for key, number in numbers.items()}
            windows.append(found)
            norms, elements = {}, {}
    return windows


def held_by(rank: int, world: int, name: str) -> list[int]:
    """Numbers of the stages of a rank."""
    each = SCHEDULES[name]
    second = 2 * world - 1 - rank if name.startswith("ZBV") else rank + world
    return [rank] if each == 1 else [rank, second]


def scheduled(rank: int, world: int, name: str, clip: float = 0.5, mean: bool = True) -> dict[str, Any]:
    """Norms of gradients and statistics of all that is measured, of a run by one of torch's schedules."""
    count, mine = world * SCHEDULES[name], held_by(rank, world, name)
    found = layers(count)
    own = nn.ModuleDict({f"s{i}": found[i] for i in mine})
    stages = [pipelining.PipelineStage(own[f"s{i}"], i, count, torch.device("cpu")) for i in mine]
    kind: Any = getattr(pipelining, f"Schedule{name}")
    schedule = kind(stages[0] if len(stages) == 1 else stages, MICRO_BATCHES, loss_fn=F.mse_loss, scale_grads=mean)
    optimizer = torch.optim.SGD(own.parameters(), lr=RATE)
    metrics = [Trajectory(stats=("grad_norm", "clipped_grad_norm", "update_norm")), TensorStats(every_steps=1)]
    model, prefix = (own[f"s{rank}"], f"s{rank}") if len(stages) == 1 else (own, "")
    windows: list[Any] = []
    junk = [torch.full((BATCH // MICRO_BATCHES, 6), 1e30, dtype=torch.float64) for _ in range(64)]
    del junk  # memory that was written before, as in any program
    with (
        warnings.catch_warnings(),
        Monitor(model, optimizer, metrics, window_steps=WINDOW, timeout=20, prefix=prefix) as monitor,
    ):
        warnings.simplefilter("ignore")
        for x, y in data():
            optimizer.zero_grad()
            schedule.step(*([x] if 0 in mine else []), **({"target": y, "losses": []} if count - 1 in mine else {}))
            for parameter in own.parameters():
                parameter.grad.mul_(clip)  # type: ignore[union-attr]
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                windows.append(window)
        history = list(monitor.history)
    expected = truth(count, clip, mean)
    merged = [{key: n for key, n in each.items() if prefix or "output" not in key} for each in expected]
    local = [
        {key: n for key, n in each.items() if "/output" in key and prefix and f"/{prefix}." in key} for each in expected
    ]
    passes = [window["tensor_stats"].details.get("forward_passes") for window in history]
    outputs = errors(history, local)
    return errors(windows, merged) | {"outputs": outputs, "passes": passes, "other_methods": _methods()}


def _methods() -> list[str]:
    """Names of a stage's methods that are not torch's own."""
    kinds = pipelining.PipelineStage.__mro__
    found = [(name, method) for kind in kinds for name, method in vars(kind).items() if kind is not object]
    return [name for name, method in found if hasattr(method, "__wrapped__")]


def situations(ranks: int) -> Iterator[tuple[str, int, Any]]:
    """Name, number of ranks and what each rank does."""
    for name in SCHEDULES:
        yield name, ranks, functools.partial(scheduled, name=name)
    yield "GPipe, sums", ranks, functools.partial(scheduled, name="GPipe", mean=False)


NAMES: Sequence[str] = [name for name, *_ in situations(2)]
