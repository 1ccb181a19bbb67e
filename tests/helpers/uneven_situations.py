"""Situations of two ranks of a sharded model whose batches would have them run other passes of lipcore's own: a rank
that ran one more would wait for the other for ever, or take its next collective for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from prove_situations import made, monitored
from rank_situations import fsdp
from sample_situations import quiet
from torch import Tensor

from lipcore import Lipschitz, PerSampleGradNorms


def as_a_whole(model: Any) -> Any:
    """Shard a model so that its parameters are no DTensors while a pass is under way."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def positions_first(rank: int, step: int) -> Tensor:
    """Four samples of five positions on rank 0, and of four on rank 1: there nothing says which dimension has them."""
    return torch.randn(5 - rank, 4, 6, generator=torch.Generator().manual_seed(10 * step + rank)).double()


def none_on_rank_1(rank: int, step: int) -> Tensor:
    size = 0 if rank and step == 0 else 4
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(10 * step + rank)).double()


def one_on_rank_1(rank: int, step: int) -> Tensor:
    return none_on_rank_1(rank, step + 1)[: 1 if rank and step == 0 else 4]


def uneven(
    rank: int,
    wrap: Callable[[Any], Any],
    batch: Callable[[int, int], Tensor],
    metric: Any,
    *,
    asks: bool = False,
    mixes: bool = False,
) -> dict[str, Any]:
    """What windows and answers say, and whether the weights are those of the same training without lipcore."""
    found: dict[str, Any] = {}
    weights = []
    for watched in (False, True):
        model = wrap(made(drops=False, mixes=mixes and rank == 0))
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        monitor: Any = nullcontext()
        if watched:
            optimizer, monitor = monitored(model, [metric()])
        try:
            with monitor:
                for step in range(4):
                    if watched and asks and step == 2:
                        found["answer"] = monitor.prove(batch(rank, 0))
                    optimizer.zero_grad()
                    model(batch(rank, step)).square().sum().backward()
                    optimizer.step()
        except ValueError as error:
            found["kept"] = str(error)
        if watched:
            windows = [dict(window[name].details) for window in monitor.history for name in window.results]
            found["windows"] = [{"not_proved": each.get("not_proved", "")} for each in windows]
        weights.append([p.full_tensor().tolist() for p in model.parameters()])
    return found | {"weights": weights[0] == weights[1]}


def norms(**settings: Any) -> Callable[[], Any]:
    return lambda: PerSampleGradNorms(loss_reduction="sum", **settings)


CASES: dict[str, tuple[Any, ...]] = {
    "output": (fsdp, positions_first, norms(batch_dim=1)),
    "output_as_a_whole": (as_a_whole, positions_first, norms(batch_dim=1)),
    "empty": (fsdp, none_on_rank_1, norms()),
    "empty_as_a_whole": (as_a_whole, none_on_rank_1, norms()),
    "trial": (as_a_whole, none_on_rank_1, Lipschitz),
    "trial_of_one": (as_a_whole, one_on_rank_1, Lipschitz),
}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    for name, case in CASES.items():
        yield name, ranks, quiet(lambda rank, world, case=case: uneven(rank, *case))  # type: ignore[misc]
        if "trial" not in name:
            ask = quiet(lambda rank, world, case=case: uneven(rank, *case, asks=True))  # type: ignore[misc]
            yield f"{name}_asked", ranks, ask
    mixing = quiet(lambda rank, world: uneven(rank, as_a_whole, one_on_rank_1, norms(), mixes=True))
    yield "mixes_on_one", ranks, mixing
