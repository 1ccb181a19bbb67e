"""Models with every kind of first layer and of what may follow it: LEMMA[name] = (build, shape of a sample, first
layer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Graph, mlp
from torch import Tensor, nn


def chain(first: nn.Module, *rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, *rest)


def behind(first: nn.Module, width: int, *between: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, *between, nn.Flatten(), nn.Linear(width, 1))


def frozen(model: nn.Sequential, *names: str) -> nn.Sequential:
    for name in names:
        getattr(model[0], name).requires_grad_(False)
    return model


def attention_after(first: nn.Linear) -> Graph:
    def rule(m: Any, x: Tensor) -> Tensor:
        u = m.first(x)
        mixed, _ = m.attention(u, u, u)
        return m.head((m.norm(u + mixed)).mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Graph(rule, first=first, attention=attention, norm=nn.LayerNorm(8), head=nn.Linear(8, 1))


def skips_after(first: nn.Linear) -> Graph:
    def rule(m: Any, x: Tensor) -> Tensor:
        u = m.first(x)
        h = u + m.block(u.tanh())
        return m.head(torch.cat([h, u], 1))

    return Graph(rule, first=first, block=mlp(7, 9, 7), head=nn.Linear(14, 1))


LEMMA: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: mlp(5, 7, 1), (5,), "0"),
    "linear_no_bias": (lambda: mlp(5, 7, 6, 1, bias=False), (5,), "0"),
    "linear_one_output": (lambda: chain(nn.Linear(5, 1), nn.Sigmoid()), (5,), "0"),
    "linear_wide": (lambda: mlp(130, 70, 1), (130,), "0"),
    "linear_nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.ReLU()), mlp(7, 6, 1)), (5,), "0.0"),
    "linear_tokens": (lambda: behind(nn.Linear(5, 3), 12, nn.ReLU()), (4, 5), "0"),
    "linear_4d": (lambda: behind(nn.Linear(5, 3), 24, nn.ReLU()), (2, 4, 5), "0"),
    "conv1d": (lambda: behind(nn.Conv1d(2, 3, 3), 18, nn.ReLU()), (2, 8), "0"),
    "conv1d_stride_dilation": (
        lambda: behind(nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=1), 9, nn.ReLU()),
        (2, 8),
        "0",
    ),
    "conv1d_stride_leaves_a_rest": (lambda: behind(nn.Conv1d(2, 3, 3, stride=3), 6, nn.ReLU()), (2, 8), "0"),
    "conv1d_same": (lambda: behind(nn.Conv1d(2, 3, 4, padding="same"), 24, nn.ReLU()), (2, 8), "0"),
    "conv1d_no_bias": (lambda: behind(nn.Conv1d(2, 3, 3, bias=False), 18, nn.ReLU()), (2, 8), "0"),
    "conv2d": (lambda: behind(nn.Conv2d(2, 3, 3, padding=1), 75, nn.ReLU()), (2, 5, 5), "0"),
    "conv2d_groups": (lambda: behind(nn.Conv2d(4, 6, 3, groups=2), 54, nn.ReLU()), (4, 5, 5), "0"),
    "conv2d_depthwise": (lambda: behind(nn.Conv2d(4, 4, (3, 2), groups=4), 48, nn.ReLU()), (4, 5, 5), "0"),
    "conv2d_circular": (
        lambda: behind(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 75, nn.ReLU()),
        (2, 5, 5),
        "0",
    ),
    "conv2d_reflect": (
        lambda: behind(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), 105, nn.ReLU()),
        (2, 5, 5),
        "0",
    ),
    "conv2d_replicate_same": (
        lambda: behind(nn.Conv2d(2, 3, 3, padding="same", padding_mode="replicate"), 75, nn.ReLU()),
        (2, 5, 5),
        "0",
    ),
    "conv2d_channels_last": (
        lambda: behind(nn.Conv2d(2, 3, 3), 27, nn.ReLU()).to(memory_format=torch.channels_last),
        (2, 5, 5),
        "0",
    ),
    "conv3d": (lambda: behind(nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), 36, nn.ReLU()), (1, 4, 4, 4), "0"),
    "conv3d_dilation": (lambda: behind(nn.Conv3d(1, 2, 2, dilation=2), 16, nn.ReLU()), (1, 4, 4, 4), "0"),
    "frozen_weight": (lambda: frozen(mlp(5, 7, 1), "weight"), (5,), "0"),
    "frozen_bias": (lambda: frozen(mlp(5, 7, 1), "bias"), (5,), "0"),
    "frozen_layer": (lambda: frozen(mlp(5, 7, 6, 1), "weight", "bias"), (5,), "0"),
    "frozen_layer_in_place": (
        lambda: frozen(chain(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 1)), "weight", "bias"),
        (5,),
        "0",
    ),
    "frozen_tokens_in_place": (
        lambda: frozen(behind(nn.Linear(5, 3), 12, nn.ReLU(inplace=True)), "weight", "bias"),
        (4, 5),
        "0",
    ),
    "frozen_conv_in_place": (
        lambda: frozen(behind(nn.Conv1d(2, 3, 3), 18, nn.ReLU(inplace=True)), "weight", "bias"),
        (2, 8),
        "0",
    ),
    "relu_in_place": (lambda: chain(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 1)), (5,), "0"),
    "tokens_relu_in_place": (lambda: behind(nn.Linear(5, 3), 12, nn.ReLU(inplace=True)), (4, 5), "0"),
    "tokens_no_bias_in_place": (lambda: behind(nn.Linear(5, 3, bias=False), 12, nn.ReLU(inplace=True)), (4, 5), "0"),
    "conv_relu_in_place": (lambda: behind(nn.Conv1d(2, 3, 3), 18, nn.ReLU(inplace=True)), (2, 8), "0"),
    "gelu": (lambda: mlp(5, 7, 6, 1, activation=nn.GELU), (5,), "0"),
    "tanh": (lambda: mlp(5, 7, 6, 1, activation=nn.Tanh), (5,), "0"),
    "layernorm": (lambda: chain(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 1)), (5,), "0"),
    "groupnorm": (lambda: behind(nn.Conv1d(2, 4, 3), 24, nn.GroupNorm(2, 4), nn.ReLU()), (2, 8), "0"),
    "batchnorm_eval": (
        lambda: chain(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 1)).eval(),
        (5,),
        "0",
    ),
    "average_pool": (lambda: behind(nn.Conv1d(2, 3, 3), 9, nn.AvgPool1d(2), nn.ReLU()), (2, 8), "0"),
    "max_pool": (lambda: behind(nn.Conv1d(2, 3, 3), 9, nn.MaxPool1d(2)), (2, 8), "0"),
    "skips_after": (lambda: skips_after(nn.Linear(5, 7)), (5,), "first"),
    "attention_after": (lambda: attention_after(nn.Linear(5, 8)), (4, 5), "first"),
    "output_vector": (
        lambda: Graph(lambda m, x: m.head(m.first(x).relu()).squeeze(1), first=nn.Linear(5, 7), head=nn.Linear(7, 1)),
        (5,),
        "first",
    ),
}
