"""Training is the same bits with lipcore and without, whatever state a forward pass moves: passes of lipcore's own put
it back, and leave what the training's own pass did."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lipcore

SIZE, SAMPLES, STEPS = 6, 5, 4
IN_CHECKPOINT = "a teacher in a checkpoint"


class Model(nn.Module):
    """Two layers and what a way of running them needs beside."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], **holds: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2)
        self.way = way
        for name, value in holds.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.way(self, x).tanh())


@dataclass
class Dice:
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))
    passes: int = 0


@dataclass(frozen=True, slots=True)
class Slots:
    generator: torch.Generator


class Average:
    """A moving average as a helper object: its tensors are written into."""

    def __init__(self) -> None:
        self.shadow, self.passes = {"a": torch.zeros(SIZE)}, 0

    def update(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.shadow["a"].mul_(0.9).add_(x.detach().mean(0), alpha=0.1 / self.passes)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def noise(of: Callable[[Any], torch.Generator]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: m.a(x + 0.1 * torch.randn(x.shape, generator=of(m)))


def always(value: Any) -> Callable[[Any], Any]:
    return lambda m: value


def scaled(draw: Callable[[Any], Any]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: m.a(x) * float(draw(m))


def follow(teacher: nn.Module, student: nn.Module) -> None:
    with torch.no_grad():
        for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
            own.mul_(0.9).add_(other, alpha=0.1)


def frozen() -> nn.Module:
    return nn.Linear(SIZE, SIZE).requires_grad_(False)


def taught(m: Any, x: Tensor) -> Tensor:
    follow(m.teacher, m.a)
    return m.a(x) * m.teacher(m.a(x))  # the graph keeps the teacher's weight


def hidden_teacher(m: Any, x: Tensor) -> Tensor:
    follow(m.hidden[0], m.a)
    return m.a(x) * m.hidden[0](x)


def shrunk(m: Any, x: Tensor) -> Tensor:
    m.a.weight.data.mul_(0.99)
    return m.a(x)


def exchanged(m: Any, x: Tensor) -> Tensor:
    m.a.weight.data = m.a.weight.data * 0.99
    return m.a(x)


def several(m: Any, x: Tensor) -> Tensor:
    torch._foreach_mul_([p.data for p in m.a.parameters()], 0.99)
    return m.a(x)


def row(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.a.weight[1].copy_(m.a.weight[0] * 0.5)
    return m.a(x)


def into(m: Any, x: Tensor) -> Tensor:
    torch.mul(m.scale.detach(), 0.99, out=m.scale.data)
    return m.a(x) * m.scale


def tokens(x: Tensor) -> Tensor:
    return (x * 10).long().abs() % 40


def statistics(m: Any, x: Tensor) -> Tensor:
    torch.batch_norm(x, None, None, m.mean, m.var, True, 0.1, 1e-5, False)
    return m.a(x - m.mean)


def again(m: Any, x: Tensor) -> Tensor:
    def part(m: Any, x: Tensor) -> Tensor:
        follow(m.teacher, m.a)
        return m.a(x) * m.teacher(x)

    return checkpoint(part, m, x, use_reentrant=False)


def drawn(m: Any, x: Tensor) -> Tensor:
    return m.a(x + m.draw(x.shape))


def counted(m: Any, x: Tensor) -> Tensor:
    m.dice.passes += 1
    return m.a(x) / m.dice.passes


def constant(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((SIZE,), value), requires_grad=False)


KINDS: dict[str, Callable[[], Model]] = {
    "torch's generator": lambda: Model(noise(lambda m: m.dice), dice=generator()),
    "in a list": lambda: Model(noise(lambda m: m.dice[1]), dice=[0, generator()]),
    "in a dict in a tuple": lambda: Model(noise(lambda m: m.dice[0]["a"]), dice=({"a": generator()},)),
    "in a dataclass": lambda: Model(noise(lambda m: m.dice.generator), dice=Dice()),
    "in slots": lambda: Model(noise(lambda m: m.dice.generator), dice=Slots(generator())),
    "in a partial": lambda: Model(drawn, draw=functools.partial(torch.randn, generator=generator())),
    "in a closure": lambda: Model(noise(always(generator()))),
    "default_rng": lambda: Model(scaled(lambda m: m.dice.random()), dice=np.random.default_rng(0)),
    "MT19937": lambda: Model(scaled(lambda m: m.dice.random()), dice=np.random.Generator(np.random.MT19937(0))),
    "RandomState": lambda: Model(scaled(lambda m: m.dice.rand()), dice=np.random.RandomState(0)),
    "random.Random": lambda: Model(scaled(lambda m: m.dice.random()), dice=random.Random(0)),
    "a frozen teacher": lambda: Model(taught, teacher=frozen()),
    "a trained teacher": lambda: Model(taught, teacher=nn.Linear(SIZE, SIZE)),
    "a teacher in a list": lambda: Model(hidden_teacher, hidden=[frozen()]),
    IN_CHECKPOINT: lambda: Model(again, teacher=frozen()),
    "weight.data.mul_": lambda: Model(shrunk),
    "weight.data = ": lambda: Model(exchanged),
    "foreach": lambda: Model(several),
    "a row": lambda: Model(row),
    "out=": lambda: Model(into, scale=constant(1.0)),
    "Embedding, max_norm": lambda: Model(lambda m, x: m.e(tokens(x)).sum(1), e=nn.Embedding(40, SIZE, max_norm=0.3)),
    "EmbeddingBag, max_norm": lambda: Model(lambda m, x: m.e(tokens(x)), e=nn.EmbeddingBag(40, SIZE, max_norm=0.3)),
    "statistics as parameters": lambda: Model(statistics, mean=constant(0.0), var=constant(1.0)),
    "an object's tensors": lambda: Model(lambda m, x: m.a(x - m.average.update(x)), average=Average()),
    "a dataclass's counter": lambda: Model(counted, dice=Dice()),
}


def dots(model: nn.Module) -> lipcore.PerSampleGradDots:
    reference = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    return lipcore.PerSampleGradDots(reference=reference, loss_reduction="sum", on_unsupported="skip")


METRICS: dict[str, Callable[[nn.Module], Any]] = {
    "default": lambda model: None,
    "norms": lambda model: [lipcore.PerSampleGradNorms(loss_reduction="sum", on_unsupported="skip")],
    "dots": lambda model: [dots(model)],
}


def trained(kind: str, metrics: Callable[[nn.Module], Any] | None = None) -> list[Tensor]:
    """Return all parameters after each forward pass and after each step."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    monitor = None if metrics is None else lipcore.Monitor(model, optimizer, metrics(model))
    torch.manual_seed(1)
    seen = []
    for size in range(SAMPLES, SAMPLES + STEPS):  # each number of samples is proved
        loss = model(torch.randn(size, SIZE)).square().sum()
        every = [*model.parameters(), *(p for held in vars(model).get("hidden", ()) for p in held.parameters())]
        seen += [p.detach().clone() for p in every]
        loss.backward()
        optimizer.step()
        seen += [p.detach().clone() for p in every]
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return seen


#: A checkpoint that moves a teacher computes another function when it runs again, which is no rule's gradient.
CASES = [(k, m) for k in KINDS for m in METRICS if (k, m) not in {(IN_CHECKPOINT, "norms"), (IN_CHECKPOINT, "dots")}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "metrics"), CASES)
def test_bits_are_the_same(kind: str, metrics: str) -> None:
    plain, measured = trained(kind), trained(kind, METRICS[metrics])
    assert all(map(torch.equal, plain, measured))
