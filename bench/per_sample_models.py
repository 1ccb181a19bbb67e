"""Five models, each with a batch and the loss of one step: the mean over samples of a loss per sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    model: nn.Module
    x: Tensor
    y: Tensor
    losses: Loss  # outputs and targets to one loss per sample, [B]


def _squared(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum(1)


def _classes(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


def _tokens(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), y, reduction="none").mean(1)


def paper_mlp() -> Task:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise((10, 10, 32, 32, 32)):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return Task(nn.Sequential(*layers, nn.Linear(32, 1)), torch.randn(1, 10), torch.randn(1, 1), _squared)


def mlp() -> Task:
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return Task(nn.Sequential(*layers), torch.randn(256, 784), torch.randint(10, (256,)), _classes)


def cnn() -> Task:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise((3, 32, 64, 128)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(8, o), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return Task(model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,)), _classes)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Four layers of width 256; 3.8 million parameters."""

    def __init__(self, length: int, vocabulary: int = 1024, width: int = 256) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))


def _gpt(length: int, samples: int) -> Task:
    tokens = torch.randint(1024, (samples, length + 1))
    return Task(Gpt(length), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), _tokens)


def _gpt_tied() -> Task:
    task = _gpt(256, 8)
    task.model.head = nn.Linear(256, 1024, bias=False)
    task.model.head.weight = task.model.token.weight
    return task


MODELS: dict[str, Callable[[], Task]] = {
    "paper": paper_mlp,
    "mlp": mlp,
    "cnn": cnn,
    "gpt": lambda: _gpt(256, 8),
    "gpt-long": lambda: _gpt(2048, 2),
}
#: Compiled as a whole, without graph breaks.
COMPILED: dict[str, Callable[[], Task]] = {"mlp": mlp, "gpt": MODELS["gpt"], "gpt-tied": _gpt_tied}
