"""Trainings whose parameters' movement is held against their optimizers' state, and what moves them besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lipcore
from lipcore.alarms import Alarms

AT, STEPS = 8, 12  #: the step of a fault, and how many there are
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, foreach=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "maximize": lambda p: torch.optim.AdamW(p, lr=1e-5, maximize=True, amsgrad=True),
}


class Tied(nn.Module):
    """An embedding whose weight is the head's too, a parameter that no loss reaches, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.blocks = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.LayerNorm(16))
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embedding(ids)))
        return out


class Run:
    """A training of a Tied model that is watched; faults and harmless things get it."""

    def __init__(
        self,
        optimizer: str | Callable[..., Any] = "adamw",
        dtype: torch.dtype = torch.float32,
        scaler: Any = None,
        **trajectory: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = Tied().to(dtype)
        make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        made = make(self.model.parameters())
        self.optimizers = made if isinstance(made, list) else [made]
        self.scaler = scaler
        self.alarms = Alarms(signals=["unexplained_movement"])
        self.monitor = lipcore.Monitor(
            self.model, made, [lipcore.Trajectory(**trajectory)], window_steps=5, alarms=self.alarms, scaler=scaler
        )

    @property
    def weight(self) -> Tensor:
        return self.model.blocks[0].weight

    def go(self, *, between: Any = None, before_step: Any = None, steps: int = STEPS) -> list[Any]:
        """Train; `between` is called ahead of step AT's forward pass, `before_step` ahead of every optimizer's step."""
        with self.monitor:
            for step in range(1, steps + 1):
                if step == AT and between is not None:
                    with torch.no_grad():
                        between(self)
                ids = torch.randint(0, 20, (8,))
                loss = nn.functional.cross_entropy(self.model(ids).float(), ids)
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                if before_step is not None:
                    before_step(self, step)
                for optimizer in self.optimizers:
                    optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
                if self.scaler is not None:
                    self.scaler.update()
        return self.alarms.events


def scale(run: Run) -> None:
    run.weight.mul_(0.999)


def groups(parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer with two groups of parameters."""
    all_of_them = list(parameters)
    slow = {"params": all_of_them[3:], "lr": 1e-5, "weight_decay": 0.0}
    return torch.optim.AdamW([{"params": all_of_them[:3]}, slow], lr=1e-2, weight_decay=0.3)


def several(parameters: Any) -> list[torch.optim.Optimizer]:
    """Return two optimizers, each with some of the parameters."""
    all_of_them = list(parameters)
    return [torch.optim.SGD(all_of_them[:3], lr=0.1), torch.optim.Adam(all_of_them[3:], lr=1e-3)]
