"""Wrappers around optimizers as people write them, each in the few lines that make it what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Lookahead:
    """Zhang et al. (2019): slow weights that move halfway to the fast ones at every k-th step. No torch optimizer."""

    def __init__(self, optimizer: Optimizer, k: int = 5) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            with torch.no_grad():
                for group, slow in zip(self.param_groups, self.slow, strict=True):
                    for p, s in zip(group["params"], slow, strict=True):
                        s.add_(p - s, alpha=0.5)
                        p.copy_(s)
        return loss


class LookaheadWithoutInit(Lookahead, Optimizer):
    """The same as a torch optimizer whose own constructor is never called."""

    param_groups = property(lambda self: self.optimizer.param_groups, lambda self, groups: None)  # type: ignore[assignment]


class _SharpnessAware:
    """Foret et al. (2021): a step up the gradient, and a step down with the gradient found there."""

    base_optimizer: Optimizer

    @torch.no_grad()
    def first_step(self) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad, alpha=group["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


class Sam(_SharpnessAware, Optimizer):  # type: ignore[misc]
    def __init__(self, params: Iterable[Tensor], base: type[Optimizer], rho: float = 0.05, **settings: Any) -> None:
        Optimizer.__init__(self, params, {"rho": rho, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups


class SamThatMovesOn(Sam):
    """One that moves the weights once more when what is inside it has stepped (a weighted SAM)."""

    @torch.no_grad()
    def second_step(self) -> None:
        super().second_step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)


class SamWithoutInit(_SharpnessAware, Optimizer):  # type: ignore[misc]
    """The same without a call of torch's constructor."""

    def __init__(self, params: Iterable[Tensor], base: type[Optimizer], rho: float = 0.05, **settings: Any) -> None:
        self.base_optimizer = base(list(params), **settings)
        for group in self.base_optimizer.param_groups:
            group["rho"] = rho
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = self.base_optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)


class Averaging:
    """A schedule-free wrapper's shape: the base steps from a point between, and the weights are interpolated back."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self.z = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self) -> None:
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        parameters = [p for group in self.base.param_groups for p in group["params"]]
        points = [p.detach().clone() for p in parameters]
        for p, z in zip(parameters, self.z, strict=True):
            p.copy_(z)
        self.base.step()
        for p, z, y in zip(parameters, self.z, points, strict=True):
            z.copy_(p)
            p.copy_(torch.lerp(y, z, 0.3))


class Accelerated(Optimizer):
    """A trainer's: steps only when the gradients of all micro-batches are there. torch's constructor is not called."""

    def __init__(self, optimizer: Optimizer, every: int) -> None:
        self.optimizer, self.every, self.calls = optimizer, every, 0

    param_groups = property(lambda self: self.optimizer.param_groups, lambda self, groups: None)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state, lambda self, state: None)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults, lambda self, defaults: None)  # type: ignore[assignment]

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % self.every == 0:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls % self.every == 0:
            self.optimizer.step(closure)


class AcceleratedScaled(Accelerated):
    """The same with a GradScaler: a step that was taken at the start is called, and put back, at every step."""

    def __init__(self, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
        super().__init__(optimizer, 1)
        self.scaler, self.own_step = scaler, optimizer.step
        self.stepped = False

    def patched_step(self, *arguments: Any, **keywords: Any) -> Any:
        self.stepped = True
        return self.own_step(*arguments, **keywords)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step = self.patched_step  # type: ignore[method-assign]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.step = self.own_step  # type: ignore[method-assign]


class LightningStep(Optimizer):
    """Another trainer's: its strategy, which has the scaler, steps. The wrapper is of the optimizer's own class too."""

    def __init__(self, optimizer: Optimizer, strategy: Any) -> None:
        self._optimizer, self._strategy = optimizer, strategy
        bases, attributes = (type(self), type(optimizer)), {"__module__": "lightning.pytorch.core.optimizer"}
        self.__class__ = type("Lightning" + type(optimizer).__name__, bases, attributes)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._strategy.precision_plugin.scaler.step(self._optimizer)
        self._strategy.precision_plugin.scaler.update()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


for one in (Accelerated, AcceleratedScaled):
    one.__module__ = "accelerate.optimizer"


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
