"""Models of every kind, with one value per sample: BEFORE have something before their first layer, FIRST an unusual
first layer. ANY[name] = (build, shape of a sample, whether lambda comes by W_1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Graph, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

Row = tuple[Callable[[], nn.Module], tuple[int, ...], bool]


def constants(model: nn.Module, x: Tensor, output: Callable[[Any], Tensor] = lambda out: out) -> Tensor:
    """||grad_x f(x_i)|| of every sample: in float64, one sample at a time, by autograd. Makes the model float64."""
    twin = model.double()
    found = []
    for i in range(len(x)):
        point = x[i : i + 1].detach().double().requires_grad_()
        value = output(twin(point.clone()))
        found.append(torch.autograd.grad(value.sum(), point)[0].norm())
    return torch.stack(found)


def at(first: Callable[[Tensor], Tensor], width: int = 5, **parts: nn.Module) -> Graph:
    """Something, and a small MLP after it."""
    return Graph(lambda m, x: m.rest(first(x).flatten(1)), rest=mlp(width, 7, 1, activation=nn.Tanh), **parts)


def before(layer: nn.Module, width: int = 5) -> nn.Sequential:
    return nn.Sequential(layer, nn.Flatten(), mlp(width, 7, 1, activation=nn.Tanh))


class Parameters(nn.Module):
    """Raw parameters and a rule: rule(x, *parameters)."""

    def __init__(self, rule: Callable[..., Tensor], *shapes: tuple[int, ...], after: int = 0) -> None:
        super().__init__()
        self.rule = rule
        self.own = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.rest = mlp(after, 7, 1, activation=nn.Tanh) if after else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.rule(x, *self.own)
        return out if self.rest is None else self.rest(out.flatten(1))


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.4))
        self.register_buffer("std", torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


BEFORE: dict[str, Row] = {
    "normalize": (lambda: before(Normalize()), (5,), False),
    "normalize_in_place": (lambda: at(lambda x: x.sub_(0.4).div_(0.25)), (5,), False),
    "in_place_shift": (lambda: at(lambda x: x.add_(1)), (5,), False),
    "relu_in_place": (lambda: before(nn.ReLU(inplace=True)), (5,), False),
    "scale": (lambda: at(lambda x: x * 3), (5,), False),
    "layer_norm": (lambda: before(nn.LayerNorm(5)), (5,), False),
    "rms_norm": (lambda: before(nn.RMSNorm(5)), (5,), False),
    "batch_norm_eval": (lambda: before(nn.BatchNorm1d(5)).eval(), (5,), False),
    "group_norm": (lambda: before(nn.GroupNorm(2, 4), 100), (4, 5, 5), False),
    "instance_norm": (lambda: before(nn.InstanceNorm2d(2), 50), (2, 5, 5), False),
    "prelu": (lambda: before(nn.PReLU()), (5,), False),
    "softmax": (lambda: before(nn.Softmax(1)), (5,), False),
    "average_pool": (lambda: before(nn.AvgPool2d(2), 8), (2, 4, 4), False),
    "max_pool": (lambda: before(nn.MaxPool2d(2), 8), (2, 4, 4), False),
    "upsample": (lambda: before(nn.Upsample(scale_factor=2), 64), (1, 4, 4), False),
    "padding": (lambda: before(nn.ReflectionPad2d(1), 36), (1, 4, 4), False),
    "pixel_unshuffle": (lambda: before(nn.PixelUnshuffle(2), 16), (1, 4, 4), False),
    "unfold_patches": (lambda: at(lambda x: F.unfold(x, 2, stride=2), 16), (1, 4, 4), False),
    "position_added": (lambda: Parameters(lambda x, p: x + p, (5,), after=5), (5,), False),
    "gate": (lambda: Parameters(lambda x, p: x * p.sigmoid(), (5,), after=5), (5,), False),
    "class_token": (
        lambda: Parameters(lambda x, p: torch.cat([p.expand(len(x), 1, 3), x * 2], 1), (1, 1, 3), after=15),
        (4, 3),
        False,
    ),
    "fourier_features": (lambda: at(lambda x: torch.cat([x.sin(), (2 * x).cos()], 1), 10), (5,), False),
    "squares_beside": (lambda: at(lambda x: torch.cat([x, x**2], 1), 10), (5,), False),
    "spectrum": (lambda: at(lambda x: torch.view_as_real(torch.fft.rfft(x)), 6), (5,), False),
    "cumulative_sum": (lambda: at(lambda x: x.cumsum(1)), (5,), False),
    "sorted": (lambda: at(lambda x: x.sort(1).values), (5,), False),
    "clamp": (lambda: at(lambda x: x.clamp(-0.5, 0.5) * 2), (5,), False),
    "cast": (lambda: at(lambda x: x.double().mul(3).to(x.dtype)), (5,), False),
    "reversed": (lambda: at(lambda x: x.flip(1)), (5,), False),
    "transposed": (lambda: before(nn.Unflatten(1, (5, 1)), 5), (5,), True),
    "flattened": (lambda: nn.Sequential(nn.Flatten(), mlp(16, 7, 1)), (1, 4, 4), True),
    "own_flatten": (lambda: at(lambda x: x, 16), (1, 4, 4), True),
    "input_skip": (
        lambda: Graph(lambda m, x: m.head(m.first(x).relu() + x), first=nn.Linear(5, 5), head=nn.Linear(5, 1)),
        (5,),
        False,
    ),
    "input_concatenated": (
        lambda: Graph(
            lambda m, x: m.head(torch.cat([m.first(x).tanh(), x], 1)), first=nn.Linear(5, 4), head=nn.Linear(9, 1)
        ),
        (5,),
        False,
    ),
    "two_branches": (
        lambda: Graph(
            lambda m, x: m.c(m.a(x).tanh() * m.b(x)), a=nn.Linear(5, 4), b=nn.Linear(5, 4), c=nn.Linear(4, 1)
        ),
        (5,),
        False,
    ),
    "mixture": (
        lambda: Graph(
            lambda m, x: (m.gate(x).softmax(1) * torch.cat([m.one(x), m.two(x)], 1)).sum(1),
            gate=nn.Linear(5, 2),
            one=mlp(5, 6, 1),
            two=mlp(5, 6, 1),
        ),
        (5,),
        False,
    ),
}


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.1 * self.weight, self.bias)


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tril(), self.bias)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Noisy(nn.Linear):
    """Draws the same numbers whatever the dtype, and in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(3))
        return F.linear(x, self.weight + noise.to(x), self.bias)


class Quantized(nn.Linear):
    """Weights in few levels, as 4-bit layers have them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 8).round() / 8 + (self.weight - self.weight.detach()), self.bias)


class Adapted(nn.Module):
    """A frozen layer and a low-rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(5, 7).requires_grad_(False)
        self.a, self.b = nn.Linear(5, 2, bias=False), nn.Linear(2, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.b(self.a(x))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def altered(change: Callable[[nn.Linear], Any]) -> nn.Sequential:
    model = mlp(5, 7, 1, activation=nn.Tanh)
    change(model[0])
    return model


def _replace_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: F.linear(2 * x, layer.weight, layer.bias)  # type: ignore[method-assign]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def _attention(need_weights: bool) -> Graph:
    def rule(m: Any, x: Tensor) -> Tensor:
        return m.head(m.attention(x, x, x, need_weights=need_weights)[0].mean(1))

    return Graph(rule, attention=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 1))


def _written_out(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 6).to(x)
    for step in x.unbind(1):
        h = (m.i(step) + m.h(h)).tanh()
    return m.head(h)


FIRST: dict[str, Row] = {
    "scaled": (lambda: before(Scaled(5, 7), 7), (5,), False),
    "masked": (lambda: before(Masked(5, 7), 7), (5,), False),
    "cosine": (lambda: before(Cosine(5, 7), 7), (5,), False),
    "standardized": (lambda: before(Standardized(2, 3, 3), 12), (2, 4, 4), False),
    "noisy": (lambda: before(Noisy(5, 7), 7), (5,), False),
    "quantized": (lambda: before(Quantized(5, 7), 7), (5,), False),
    "adapted": (lambda: before(Adapted(), 7), (5,), False),
    "forward_replaced": (lambda: altered(_replace_forward), (5,), False),
    "hook_of_others": (
        lambda: altered(lambda layer: layer.register_forward_hook(lambda m, a, out: 2 * out)),
        (5,),
        False,
    ),
    "pre_hook_of_others": (
        lambda: altered(lambda layer: layer.register_forward_pre_hook(lambda m, a: (3 * a[0],))),
        (5,),
        False,
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 3), False),
    "gru": (lambda: Recurrent(nn.GRU), (4, 3), False),
    "rnn": (lambda: Recurrent(nn.RNN), (4, 3), False),
    "attention": (lambda: _attention(False), (3, 4), False),
    "attention_weights": (lambda: _attention(True), (3, 4), False),
    "encoder_layer": (
        lambda: before(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 12),
        (3, 4),
        False,
    ),
    "transposed_convolution": (lambda: before(nn.ConvTranspose2d(2, 3, 3), 75), (2, 3, 3), False),
    "bilinear": (
        lambda: Graph(lambda m, x: m.head(m.first(x, x).tanh()), first=nn.Bilinear(5, 5, 4), head=nn.Linear(4, 1)),
        (5,),
        False,
    ),
    "raw_matrix": (lambda: Parameters(lambda x, w: x @ w, (5, 7), after=7), (5,), False),
    "no_layer_at_all": (lambda: Parameters(lambda x, v, w: (x @ v).tanh() @ w, (5, 4), (4, 1)), (5,), False),
    "functional_linear": (lambda: Parameters(lambda x, w: F.linear(x, w), (7, 5), after=7), (5,), False),
    "einsum": (lambda: Parameters(lambda x, w: torch.einsum("bi,io->bo", x, w), (5, 7), after=7), (5,), False),
    "own_function": (lambda: at(Square.apply), (5,), False),
    "applied_twice": (
        lambda: Graph(lambda m, x: m.head(m.first(m.first(x).tanh())), first=nn.Linear(5, 5), head=nn.Linear(5, 1)),
        (5,),
        False,
    ),
    "written_out_recurrence": (
        lambda: Graph(_written_out, i=nn.Linear(3, 6), h=nn.Linear(6, 6), head=nn.Linear(6, 1)),
        (4, 3),
        False,
    ),
    "called_without_hooks": (
        lambda: Graph(
            lambda m, x: m.head(nn.Linear.forward(m.first, x).tanh()), first=nn.Linear(5, 4), head=nn.Linear(4, 1)
        ),
        (5,),
        False,
    ),
    "batch_and_tokens_flattened": (
        lambda: Graph(
            lambda m, x: m.head(m.first(x.flatten(0, 1)).tanh().unflatten(0, (len(x), 3)).flatten(1)),
            first=nn.Linear(4, 2),
            head=nn.Linear(6, 1),
        ),
        (3, 4),
        False,
    ),
    "hypernetwork": (
        lambda: Graph(lambda m, x: (m.make(x).unflatten(1, (4, 5)) @ x[:, :, None]).sum((1, 2)), make=nn.Linear(5, 20)),
        (5,),
        False,
    ),
    "mapped": (
        lambda: Graph(lambda m, x: torch.func.vmap(lambda row: m.first(row).tanh())(x).sum(1), first=nn.Linear(5, 4)),
        (5,),
        False,
    ),
    "checkpointed": (
        lambda: Graph(
            lambda m, x: m.head(checkpoint(m.first, x, use_reentrant=False)),
            first=mlp(5, 6, 4, activation=nn.Tanh),
            head=nn.Linear(4, 1),
        ),
        (5,),
        True,
    ),
    "frozen_backbone": (
        lambda: Graph(
            lambda m, x: m.head(m.body(2 * x).tanh()),
            body=mlp(5, 7, 6).requires_grad_(False),
            head=nn.Linear(6, 1),
        ),
        (5,),
        False,
    ),
    "subclass_without_change": (lambda: before(type("Own", (nn.Linear,), {})(5, 7), 7), (5,), False),
    "weight_norm": (lambda: altered(parametrizations.weight_norm), (5,), True),
    "weight_norm_old": (lambda: altered(nn.utils.weight_norm), (5,), True),
    "spectral_norm_eval": (lambda: altered(parametrizations.spectral_norm).eval(), (5,), True),
    "spectral_norm_old_eval": (lambda: altered(nn.utils.spectral_norm).eval(), (5,), True),
    "orthogonal": (lambda: altered(parametrizations.orthogonal), (5,), True),
    "pruned": (lambda: altered(lambda layer: prune.l1_unstructured(layer, "weight", 0.4)), (5,), True),
    "parametrized": (
        lambda: altered(lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh())),
        (5,),
        True,
    ),
    "linear": (lambda: mlp(5, 7, 1), (5,), True),
    "conv_circular": (lambda: before(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), 32), (1, 4, 4), True),
}

ANY = BEFORE | FIRST
