"""Situations of several ranks that run a proof together: what it finds, and that training does not notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rank_situations import fsdp
from sample_situations import quiet
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, PerSampleGradDots, PerSampleGradNorms, Trajectory
from lipcore.alarms import Alarms

DDP = nn.parallel.DistributedDataParallel
NAME = "per_sample_grad_norm"


class Net(nn.Module):
    """With a buffer that each pass changes, and dropout.

    Args:
        detaches: it takes statistics over the batch that it detaches.
        mixes: it takes such statistics with gradients.
    """

    def __init__(self, *, detaches: bool = False, mixes: bool = False, drops: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.detaches, self.mixes, self.drops = 0, detaches, mixes, drops

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        hidden = torch.tanh(self.a(x))
        if self.detaches:
            hidden = hidden - hidden.mean(0).detach()
        if self.mixes:
            hidden = hidden - hidden.mean(0)
        return self.c(F.dropout(torch.tanh(self.b(hidden)), 0.3 if self.drops else 0.0))


WRAPS: dict[str, Callable[[nn.Module], Any]] = {"ddp": DDP, "fsdp2": fsdp}


def made(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**settings).double()


def monitored(model: nn.Module, metrics: Any = None, **settings: Any) -> tuple[Any, Monitor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    metrics = metrics or [PerSampleGradNorms(loss_reduction="mean")]
    return optimizer, Monitor(model, optimizer, metrics=metrics, window_steps=3, timeout=20, **settings)


def batch_of(rank: int, step: int, size: int = 4) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(10 * step + rank)).double()


def train(model: nn.Module, optimizer: Any, rank: int, steps: range, between: Any = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch_of(rank, step)).square().mean().backward()
        optimizer.step()
        if between is not None:
            between(step)


def local(tensor: Any) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def proved(rank: int, name: str) -> dict[str, Any]:
    """The bits of a training with and without a proof in its middle, and what windows say before and after it."""
    runs = []
    for asks in (False, True):
        model = WRAPS[name](made())
        given = [torch.ones_like(local(p)) for p in made().parameters()]
        reference = dict(zip([n for n, _ in made().named_parameters()], given, strict=True))
        metrics = [PerSampleGradNorms(loss_reduction="mean"), Trajectory(), Lipschitz(),
                   PerSampleGradDots(reference=reference, loss_reduction="mean")]  # fmt: skip
        optimizer, monitor = monitored(model, metrics)
        torch.manual_seed(5 + rank)
        found: dict[str, Any] = {"answer": None}

        def between(
            step: int, found: Any = found, model: Any = model, monitor: Any = monitor, asks: Any = asks
        ) -> None:
            if step == 2 and asks:
                before = [local(t) for t in (*model.parameters(), *model.buffers())]
                grads = [local(p.grad) for p in model.parameters()]
                random = torch.get_rng_state()
                found["answer"] = monitor.prove(batch_of(rank, 100))
                found["second"] = monitor.prove((batch_of(rank, 101, 3 + rank),))
                after = [local(t) for t in (*model.parameters(), *model.buffers())]
                found["same"] = all(map(torch.equal, before, after))
                found["same"] &= all(map(torch.equal, grads, [local(p.grad) for p in model.parameters()]))
                found["same"] &= torch.equal(random, torch.get_rng_state())

        with monitor:
            train(model, optimizer, rank, range(9), between if asks else None)
        found["weights"] = [local(t).tolist() for t in (*model.parameters(), *model.buffers())]
        # Once it is proved there is lambda, and the kernel of both rounds r in another order.
        later = ("lipschitz/",) if name == "fsdp2" else ()
        flat = [window.flat() for window in monitor.history]
        found["windows"] = [{key: n for key, n in each.items() if not key.startswith(later)} for each in flat]
        found["labels"] = [window[NAME].norm["total"].mean.label for window in monitor.history]
        runs.append(found)
    without, with_proof = runs
    return {
        "answer": with_proof["answer"],
        "second": with_proof["second"],
        "untouched": with_proof["same"],
        "weights": with_proof["weights"] == without["weights"],
        "windows": with_proof["windows"] == without["windows"],
        "labels": [without["labels"], with_proof["labels"]],
    }


def flawed(rank: int, name: str, flaw: str) -> dict[str, Any]:
    """A model whose samples depend on each other, which is told by all ranks."""
    model = WRAPS[name](made(**{flaw: True, "drops": False}))
    optimizer, monitor = monitored(model)
    answer = monitor.prove(batch_of(rank, 100))
    kept = ""
    try:
        monitor.flush()
        monitor.pop_window()
    except ValueError as error:
        kept = str(error)
    train(model, optimizer, rank, range(2))  # goes on
    try:
        monitor.close()
    except ValueError as error:
        kept = kept or str(error)
    return {"answer": answer[NAME], "kept": kept}


def on_rank_0_alone(rank: int, world: int) -> dict[str, Any]:
    model = fsdp(made())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = ""
    with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")], timeout=0.5) as monitor:
        train(model, optimizer, rank, range(1))
        if rank == 0:
            try:
                monitor.prove(batch_of(rank, 100))
            except RuntimeError as error:
                said = str(error)
        torch.distributed.barrier()
        train(model, optimizer, rank, range(1, 3))
    return {"said": said}


def one_sample(rank: int, world: int) -> dict[str, Any]:
    model = fsdp(made())
    optimizer, monitor = monitored(model)
    with monitor:
        answer = monitor.prove(batch_of(rank, 100, 4 - 3 * rank))
        train(model, optimizer, rank, range(3))
        return {"answer": answer[NAME], "then": monitor.prove(batch_of(rank, 101))[NAME]}


def other_metrics(rank: int, world: int) -> Any:
    """Rank 1 has another metric too, whose proof no other rank would run."""
    model = fsdp(made())
    reference = {name: torch.ones(p.shape).double() for name, p in model.named_parameters()}
    metrics: list[Any] = [PerSampleGradNorms(loss_reduction="mean")]
    if rank == 1:
        metrics.append(PerSampleGradDots(reference=reference, loss_reduction="mean"))
    _, monitor = monitored(model, metrics)
    return monitor.prove(batch_of(rank, 100))


def at_rest(rank: int, world: int) -> dict[str, Any]:
    """All ranks are at rest when they prove a batch, and then have an alarm; rank 0 has one of its own after that."""
    alarms = Alarms(signals=["loss"], per_sample=2)
    norms = PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model := fsdp(made()), [Trajectory(), norms], alarms=alarms)
    with monitor:
        train(model, optimizer, rank, range(1))
        answers, rests = [monitor.prove(batch_of(rank, 100))], [norms.rests]
        monitor.log_batch([1, 1, 2, 3], epoch=0)
        train(model, optimizer, rank, range(1, 5))
        if rank == 0:
            monitor.log_batch([1, 1, 2, 3], epoch=1)
        train(model, optimizer, rank, range(5, 6))
        answers.append(monitor.prove(batch_of(rank, 101)))
        rests.append(norms.rests)
        train(model, optimizer, rank, range(6, 9))
    return {"answers": answers, "rests": rests, "doubts": [found.doubt for found in alarms.samples]}


def apart_after_alarms(rank: int, world: int) -> dict[str, Any]:
    """Each rank has an alarm of its own, then all have one, and nobody has proved a batch, or somebody has: no rank
    waits for one that rests."""
    found: dict[str, Any] = {}
    for proves in (False, True):
        alarms = Alarms(signals=["loss"], per_sample=2)
        metrics = [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]
        optimizer, monitor = monitored(model := fsdp(made()), metrics, alarms=alarms)
        begin = time.monotonic()
        with monitor:
            train(model, optimizer, rank, range(1))
            if proves:
                monitor.prove(batch_of(rank, 100))
            for epoch, whose in enumerate(((0,), (1,), (0, 1))):
                if rank in whose:
                    monitor.log_batch([1, 1, 2, 3], epoch=epoch)
                train(model, optimizer, rank, range(1 + 4 * epoch, 5 + 4 * epoch))
        found[str(proves)] = [one.doubt for one in alarms.samples]
        found["seconds"] = max(time.monotonic() - begin, found.get("seconds", 0.0))
    return found


def apart(rank: int, world: int) -> Any:
    """A model that is spread over ranks, and group=None."""
    _, monitor = monitored(fsdp(made()), group=None)
    return monitor.prove(batch_of(rank, 100))


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    for name in WRAPS:
        yield name, ranks, quiet(lambda rank, world, name=name: proved(rank, name))  # type: ignore[misc]
        for flaw in ("detaches", "mixes"):
            yield (
                f"{name}_{flaw}",
                ranks,
                quiet(lambda rank, world, name=name, flaw=flaw: flawed(rank, name, flaw)),  # type: ignore[misc]
            )
    for work in (on_rank_0_alone, one_sample, at_rest, apart_after_alarms, other_metrics, apart):
        yield work.__name__, ranks, quiet(work)
