"""Models and training loops for the tests of per-sample gradient norms in real trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.LayerNorm(7), nn.Linear(7, 4), nn.Tanh())


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.PReLU(6),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, from Linears."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.RMSNorm(features)
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 2 * features), nn.Linear(2 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class Transformer(nn.Module):
    """Token embedding tied to the head; logits [B, T, V]."""

    def __init__(self, tokens: int = 11, features: int = 6, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, features)
        self.blocks = nn.ModuleList(Block(features) for _ in range(2))
        self.head = nn.Linear(features, tokens, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, *shape)


def tokens(size: int) -> Tensor:
    return torch.randint(11, (size, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, floats(5)),
    "cnn": (cnn, floats(1, 6, 6)),
    "tied transformer": (Transformer, tokens),
}


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def sum_loss(output: Any) -> Tensor:
    """Of every sample its own term, all different; summed."""
    y = output.flatten(1)
    return (y.sin() * torch.arange(1, y.shape[1] + 1, dtype=y.dtype)).sum()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Iterable[Tensor],
    loss: Callable[[Any], Tensor] = sum_loss,
) -> None:
    for x in inputs:
        optimizer.zero_grad()
        (loss(model(x)) / max(1, len(x))).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Bit for bit."""
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
