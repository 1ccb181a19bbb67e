"""Models in which some trainable parameters have no layer rule, of every kind: name -> (build, shape of a sample)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import Graph
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

C = 6


class OwnRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return y


class OnePlusWeight(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (C,)) * (1 + self.weight)


class Conv1D(nn.Module):
    """A Linear with its weight the other way round, on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(C, C)), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, C), self.weight).view(x.shape)


class OwnLinear(nn.Linear):
    """A subclass, which may do something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay, self.mix = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C, C))

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(()), []
        for t in range(x.shape[1]):
            h = torch.exp(-self.decay.exp()) * h + x[:, t] @ self.mix
            out.append(h)
        return torch.stack(out, 1)


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(-1, C) @ self.weight  # samples take turns
        return rows.view(x.shape[1], x.shape[0], C).transpose(0, 1)


def parameters(rule: Callable[..., Tensor], **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    """Build raw parameters used between two Linears: rule(x, *parameters)."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(shape)))

        def forward(self, x: Tensor) -> Tensor:
            return rule(x, *(getattr(self, name) for name in shapes))

    return lambda: between(Raw())


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(C, C), layer, nn.Tanh(), nn.Linear(C, 3))


class Holder(nn.Module):
    """A weight that only others use."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, size))


def _elsewhere() -> nn.Module:
    a, b = nn.Linear(C, C), nn.Linear(C, C)
    return Graph(lambda m, x: m.b(F.linear(torch.tanh(m.a(x)), m.a.weight)) + m.b.bias.exp(), a=a, b=b)


def _tied_decoder() -> nn.Module:
    return Graph(lambda m, x: F.linear(torch.tanh(m.e(x)), m.e.weight.t()), e=nn.Linear(C, 2))


def _pruned() -> nn.Module:
    layer = nn.Linear(C, C)
    prune.l1_unstructured(layer, "weight", amount=0.4)  # type: ignore[no-untyped-call]
    layer.weight = layer.weight.detach()  # computed anew in every pass; so it can be copied until then
    return between(layer)


T = 5
WITHOUT_RULES: dict[str, Callable[[], nn.Module]] = {
    "own RMSNorm": lambda: between(OwnRMSNorm()),
    "one plus weight": lambda: between(OnePlusWeight()),
    "Conv1D": lambda: between(Conv1D()),
    "subclass of Linear": lambda: between(OwnLinear(C, C)),
    "no rule at all": OwnRMSNorm,
    "recurrence": lambda: between(Recurrence()),
    "time-major": lambda: between(TimeMajor()),
    "layer scale": parameters(lambda x, g: x * g, g=(C,)),
    "subtracted": parameters(lambda x, g: x - g, g=(1, 1, C)),
    "divided by": parameters(lambda x, g: x / g, g=(T, 1)),
    "scalar": parameters(lambda x, g: torch.sin(g * x), g=()),
    "class token": parameters(lambda x, g: torch.cat([g.expand(len(x), -1, -1), x], 1), g=(1, 1, C)),
    "repeated token": parameters(lambda x, g: torch.cat([g.repeat(len(x), 1, 1), x], 1), g=(1, 1, C)),
    "positions": parameters(lambda x, g: x + g[: x.shape[1]], g=(9, C)),
    "gathered positions": parameters(lambda x, g: x + g[torch.arange(T) % 3], g=(4, C)),
    "einsum": parameters(lambda x, g: torch.einsum("btc,cd->btd", x, g), g=(C, C)),
    "scaled product": parameters(
        lambda x, a, b: torch.addmm(b, x.flatten(0, 1), a, beta=2, alpha=0.5).view_as(x), a=(C, C), b=(C,)
    ),
    "shifted and spread": parameters(lambda x, g: x * (g + torch.ones(C)), g=(1,)),
    "scaled sum": parameters(lambda x, g: torch.add(x, g, alpha=3), g=(C,)),
    "weights first": parameters(lambda x, a: (a @ x.flatten(0, 1).T).T.view_as(x), a=(C, C)),
    "scaled weights": parameters(
        lambda x, a: x.flatten(0, 1).mm(torch.add(a, a.detach(), alpha=2)).view_as(x), a=(C, C)
    ),
    "layer norm": parameters(lambda x, w, b: F.layer_norm(x, (C,), w, b), w=(C,), b=(C,)),
    "layer norm of two dimensions": parameters(lambda x, w, b: F.layer_norm(x, (T, C), w, b), w=(T, C), b=(T, C)),
    "two of one product": lambda: Graph(
        lambda m, x: F.linear(torch.tanh(F.linear(m.e(x), m.f.w)), m.f.w), e=nn.Linear(C, C), f=Holder(C)
    ),
    "several": parameters(lambda x, a, b: x * a.exp() + (a @ b).sin(), a=(C,), b=(C, C)),
    "weight norm": lambda: between(parametrizations.weight_norm(nn.Linear(C, C))),
    "spectral norm": lambda: between(parametrizations.spectral_norm(nn.Linear(C, C))),
    "pruned": _pruned,
    "used elsewhere": _elsewhere,
    "tied decoder": _tied_decoder,
    "GRU": lambda: Graph(lambda m, x: m.h(m.r(x)[0]), r=nn.GRU(C, C, batch_first=True), h=nn.Linear(C, 2)),
    "dropout": lambda: nn.Sequential(OwnRMSNorm(), nn.Dropout(0.0), nn.Linear(C, 2)),
}
