"""Situations of several ranks for inner products of samples' gradients with given ones, each beside one float64 process
that takes every sample of every rank by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pipeline import STAGES, run_stage, stage_of
from rank_situations import STEPS, WINDOW, Data, data_of, fsdp, made
from sample_situations import DDP, LAYERS, Truth, compared_numbers, mean_loss, quiet
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradDots, Trajectory

NAME = "per_sample_grad_dot"
CHANGED = 2  # after so many steps the references are others


def references(model: nn.Module, seed: int) -> list[dict[str, Tensor]]:
    """Two gradients, alike on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name.removeprefix("module."): parameter.shape for name, parameter in model.named_parameters()}
    return [{n: torch.randn(s, generator=generator).double() for n, s in shapes.items()} for _ in range(2)]


class DotsTruth(Truth):
    """One process that multiplies the gradient of each sample's loss."""

    def windows(self, batches: Sequence[Data], change: bool = False) -> list[dict[str, float]]:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        found: list[dict[str, float]] = []
        rows: list[Tensor] = []
        for step in range(STEPS):
            grads, weights = self._samples(batches, step)
            given = references(self.model, int(change and step >= CHANGED))
            rows += [self._products(grad, given) for grad in grads]
            parts = zip(*grads, strict=True)
            for parameter, of_samples in zip(self.model.parameters(), parts, strict=True):
                parameter.grad = sum(w * g for w, g in zip(weights, of_samples, strict=True))  # type: ignore[assignment]
            optimizer.step()
            if (step + 1) % WINDOW == 0:
                found.append(self._told(torch.stack(rows)))
                rows = []
        return found

    def _products(self, grad: list[Tensor], given: list[dict[str, Tensor]]) -> Tensor:
        """Per layer and in total, and per reference."""
        names = [name for name, _ in self.model.named_parameters()]
        dots = torch.stack([
            torch.stack([(g * one[name]).sum() for g, name in zip(grad, names, strict=True)]) for one in given
        ])  # fmt: skip
        layers = [dots[:, [name.startswith(f"{layer}.") for name in names]].sum(1) for layer in LAYERS]
        return torch.stack([*layers, dots.sum(1)])

    def _told(self, rows: Tensor) -> dict[str, float]:
        out = {}
        for i, place in enumerate((*LAYERS, "total")):
            for k in range(2):
                of_place = rows[:, i, k]
                numbers = {"mean": of_place.mean(), "min": of_place.min(), "max": of_place.max()}
                numbers |= {"negative": (of_place < 0).double().mean(), "missing": torch.zeros(())}
                out |= {f"{NAME}/dot_{k}.{reducer}/{place}": float(value) for reducer, value in numbers.items()}
        return out


def dots_of(model: nn.Module, given: Any, **settings: Any) -> tuple[Any, PerSampleGradDots, Monitor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    metric = PerSampleGradDots(reference=given, loss_reduction="mean")
    monitor = Monitor(model, optimizer, metrics=[metric, Trajectory()], window_steps=WINDOW, timeout=20, **settings)
    return optimizer, metric, monitor


def merged(model: nn.Module, data: Data, change: bool = False, given: Any = None) -> list[Any]:
    """The global windows of a run that asks for one at every step."""
    optimizer, metric, monitor = dots_of(model, given or references(model, 0))
    found: list[Any] = []
    with monitor:
        for step, (x, y) in enumerate(data):
            if change and step == CHANGED:
                metric.set_reference(references(model, 1))
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    return found


def ddp(rank: int, world: int) -> dict[str, Any]:
    """With batches of other sizes, and other references from the third step on."""
    batches = data_of(range(world), {0: 2, 1: 5})
    expected = DotsTruth(made()).windows(batches, change=True)
    return compared_numbers(merged(DDP(made()), batches[rank], change=True), expected)


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    expected = DotsTruth(made()).windows(data_of(range(world)))
    return compared_numbers(merged(fsdp(made()), data_of(range(world))[rank]), expected)


def other_references(rank: int, world: int) -> dict[str, Any]:
    """Each rank has the gradient of its own part of the validation samples."""
    model = DDP(made())
    return said_of(merged(model, data_of(range(world))[rank][:WINDOW], given=references(model, rank)))


def set_elsewhere(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 sets the same references a step later."""
    model = DDP(made())
    optimizer, metric, monitor = dots_of(model, references(model, 0))
    with monitor:
        for step, (x, y) in enumerate(data_of(range(world))[rank][:WINDOW]):
            if step == 1 + rank:
                metric.set_reference(references(model, 1))
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        return said_of([monitor.global_window()])


def set_alike_later(rank: int, world: int) -> dict[str, Any]:
    """Ranks have other references in the first of the windows of two blocks, and then the same: those of which no block
    has the others are whole."""
    model = DDP(made())
    metric = PerSampleGradDots(reference=references(model, rank), loss_reduction="mean")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    with Monitor(model, optimizer, metrics=[metric], window_steps=2, window_blocks=2, timeout=20) as monitor:
        for step, (x, y) in enumerate(data_of(range(world))[rank][:4]):
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(NAME in window)
            if step == 0:
                metric.set_reference(references(model, 9))
    return {"whole": found}


def said_of(windows: Sequence[Any]) -> dict[str, Any]:
    """Why the last window lacks the products; the other metric is in it."""
    assert NAME not in windows[-1]
    assert "trajectory" in windows[-1]
    return {"said": windows[-1].off[NAME]}


def pipeline(rank: int, world: int) -> dict[str, Any]:
    """Two stages as a schedule runs them; each knows the products of its own layers, with its own references."""
    stage = stage_of(made(), rank)
    data = data_of([0])[0]
    expected = []
    for numbers in DotsTruth(made()).windows([data]):
        split = {key.rpartition("/"): value for key, value in numbers.items()}
        expected.append({f"{key}/{STAGES[place]}": v for (key, _, place), v in split.items() if place in STAGES})
    own = {f"{place}.": f"{of.rpartition('.')[2]}." for place, of in STAGES.items() if of.startswith(f"stages.{rank}")}
    given = [{own[n[:2]] + n[2:]: r for n, r in one.items() if n[:2] in own} for one in references(made(), 0)]
    optimizer, _, monitor = dots_of(stage, given, prefix=f"stages.{rank}")
    found = []
    with monitor:
        for x, y in data:
            optimizer.zero_grad()
            run_stage(stage, rank, x, y)
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    for window in found:
        assert not any(place.startswith("total") for place in window[NAME]["dot_0"])
        assert "hold other layers" in window[NAME].details["total_off"]
    return compared_numbers(found, expected)


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    for work in (ddp, fsdp2, other_references, set_elsewhere, set_alike_later, pipeline):
        yield work.__name__, ranks, quiet(work)
