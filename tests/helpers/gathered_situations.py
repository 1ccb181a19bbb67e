"""Situations of a contrastive loss over the outputs of all ranks, gathered outside of the model: what comes of a sample
through its own activations, beside one float64 process that has the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_situations import fsdp, made
from sample_situations import DDP, NAME, monitored, quiet
from torch import Tensor, nn

from lipcore import PerSampleGradNorms, Trajectory

SIZE = 3  # samples of a rank


class Towers(nn.Module):
    """Two encoders, as of images and of their captions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(y)


def pairs(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(SIZE, size, generator=generator, dtype=torch.float64) for size in (6, 5))
    return x, y


def contrast(u: Tensor, v: Tensor, rows: slice = slice(None)) -> Tensor:
    """The loss of some rows and columns among all."""
    scores = 3 * F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).T
    at = torch.arange(len(scores))[rows]
    return (F.cross_entropy(scores[rows], at) + F.cross_entropy(scores.T[rows], at)) / 2


def by_nn(own: Tensor) -> Tensor:
    import torch.distributed.nn

    return torch.cat(torch.distributed.nn.all_gather(own))


def by_functional(own: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import all_gather_tensor_autograd

    return all_gather_tensor_autograd(own, 0, dist.group.WORLD)


def detached(own: Tensor) -> Tensor:
    """Others' outputs without their gradients."""
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own.detach())
    found[dist.get_rank()] = own
    return torch.cat(found)


def expected(way: str, world: int) -> dict[str, Any]:
    """Of each rank the norms of what comes through its samples' activations, times the number of all of them; and what
    these leave of the gradient's norm and of |G|^2."""
    model, batches = made(Towers), [pairs(rank) for rank in range(world)]
    inputs = [torch.cat(each) for each in zip(*batches, strict=True)]
    rows, norms = [slice(SIZE * rank, SIZE * (rank + 1)) for rank in range(world)], []
    parts: list[list[Tensor]] = []  # of each sample, by parameter
    for rank in range(world):
        outputs = [output.detach().requires_grad_() for output in model(*inputs)]
        if way == "detached":  # this rank's loss alone, and its own outputs
            (contrast(*outputs) / world).backward()
        elif way == "own_rows":
            (sum(contrast(*outputs, each) for each in rows) / world).backward()
        else:
            contrast(*outputs).backward()
        for i in range(rows[rank].start, rows[rank].stop):
            pieces = [(output.grad[i], x[i]) for output, x in zip(outputs, inputs, strict=True)]
            parts.append([part for grad, x in pieces for part in (torch.outer(grad, x), grad)])
    squares = torch.stack([sum(part.square().sum() for part in each) for each in parts])
    norms = len(parts) * squares.sqrt()
    total = sum(sum(each).square().sum() for each in zip(*parts, strict=True))
    wanted = (total - squares.sum()) / (1 - 1 / len(parts))
    return {"norms": norms, "grad_norm": float(total.sqrt()), "gradient_sq": float(wanted)}


def contrasted(wrap: str, way: str, rank: int, world: int) -> dict[str, Any]:
    """The largest relative errors, and what is said of the norms."""
    inner = made(Towers)
    model: Any = DDP(inner) if wrap == "ddp" else fsdp(inner)
    norms = PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[norms, Trajectory()], window_steps=1)
    gather = {"functional": by_functional, "detached": detached}.get(way, by_nn)
    rows = slice(SIZE * rank, SIZE * (rank + 1)) if way == "own_rows" else slice(None)
    with monitor:
        norms.set_ids(range(SIZE * rank, SIZE * (rank + 1)))
        contrast(*map(gather, model(*pairs(rank))), rows).backward()
        own, said = norms.per_sample, norms.unproved
        optimizer.step()
        window = monitor.global_window()
        scores = norms.sync_scores().to_numpy()["mean"]
    right = expected(way, world)
    found, moved = window[NAME], window["trajectory"].grad_norm["total"].last.value
    pairs_of = {
        "own": (own, right["norms"][SIZE * rank : SIZE * (rank + 1)]),
        "scores": (torch.tensor(scores), right["norms"]),
        "mean": (torch.tensor(found.norm["total"].mean.value), right["norms"].mean()),
        "gradient_sq": (torch.tensor(found.gradient_sq["total"].mean.value), torch.tensor(right["gradient_sq"])),
        "grad_norm": (torch.tensor(moved), torch.tensor(right["grad_norm"])),
    }
    errors = {name: float(((a - b) / b).abs().max()) for name, (a, b) in pairs_of.items()}
    return {"errors": errors, "said": said, "off": window.off}


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    for wrap in ("ddp", "fsdp2"):
        for way in ("nn", "functional", "own_rows", "detached"):
            yield f"{wrap}.{way}", ranks, quiet(functools.partial(contrasted, wrap, way))
