"""Small models for tests, and their reference: float64, one sample at a time, torch.autograd.grad."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor


class Graph(nn.Module):
    """Named parts and a rule for running them: Graph(lambda m, x: m.head(m.first(x)), first=..., head=...)."""

    def __init__(self, rule: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.rule = rule
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *arguments: Tensor, **keywords: Any) -> Any:
        return self.rule(self, *arguments, **keywords)


class Wrapper(nn.Module):
    """Calls what is inside it, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)


class Custom(nn.Module):
    """Its first layer is found by running it; picklable."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 1)
        self.first = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """Linear layers with activations between them; the output has sizes[-1] values."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 1),
    )


def frozen_first() -> nn.Sequential:
    model = mlp(5, 7, 6, 1)
    model[0].requires_grad_(False)
    return model


def with_batchnorm(**settings: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, **settings), nn.ReLU(), nn.Linear(7, 1))


def found_by_running() -> Graph:
    """Its first layer is not the one registered first."""
    return Graph(lambda m, x: m.b(m.drop(m.a(x).relu_())), b=nn.Linear(7, 1), a=nn.Linear(5, 7), drop=nn.Dropout(0.3))


def two_headed() -> Graph:
    def rule(m: Any, x: Tensor) -> dict[str, Tensor]:
        h = m.body(m.stem(x)).relu()
        return {"value": m.value(h), "policy": m.policy(h)}

    return Graph(rule, stem=nn.Linear(5, 6), body=nn.Linear(6, 7), value=nn.Linear(7, 1), policy=nn.Linear(7, 3))


def seeded(build: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return build().to(dtype)


def mse(output: Tensor, target: Tensor) -> Tensor:
    return (output.reshape(target.shape) - target).square().mean()


def reference(model: nn.Module, x: Tensor, *, first: str = "0", head: str = "") -> tuple[Tensor, Tensor | None]:
    """(||grad_u f||, ||grad_x f||) of every sample; the latter None for integer inputs. Call before anything hooks the
    model."""
    twin = copy.deepcopy(model).double()
    kept: dict[str, Tensor] = {}

    def keep_u(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        kept["u"] = output if output.requires_grad else output.requires_grad_()
        return output.clone()  # what follows may work in place

    def keep_f(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        kept["f"] = output
        return output.clone()

    twin.get_submodule(first).register_forward_hook(keep_u)
    twin.get_submodule(head).register_forward_hook(keep_f)
    norms_u, norms_x = [], []
    for i in range(len(x)):
        point = x[i : i + 1].detach().clone()
        continuous = point.is_floating_point()
        point = point.double().requires_grad_() if continuous else point
        twin(point)
        assert kept["f"].numel() == 1
        wanted = [kept["u"], point] if continuous else [kept["u"]]
        gradients = torch.autograd.grad(kept["f"].sum(), wanted)
        norms_u.append(gradients[0].norm())
        norms_x.append(gradients[-1].norm())
    return torch.stack(norms_u), torch.stack(norms_x) if x.is_floating_point() else None


def observe(
    model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """r and lambda of every sample, as lipcore reads them from one ordinary backward pass."""
    metric = Lipschitz(**settings)
    with Monitor(model, metrics=[metric]) as monitor:
        output = model(x)
        (loss(output) if loss is not None else output.double().pow(2).add(output.double()).mean()).backward()
        monitor.flush()
        found = metric.per_sample
        monitor.step()
    return found.normalized_gradient_norm, found.local_lipschitz


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest |found - expected| / |expected|; infinite when one is NaN where the other is not."""
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    found, expected = found.detach(), expected.detach()
    scale = expected.abs().clamp(min=1e-300)
    return float(((found - expected).abs() / scale).nan_to_num(0.0).max()) if found.numel() else 0.0


def train(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor] = mse,
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def batches(count: int, size: int, shape: tuple[int, ...] = (5,), seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randn(size, 1, generator=generator))
        for _ in range(count)
    ]


def images(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return batches(count, size, (1, 8, 8), seed=2)
