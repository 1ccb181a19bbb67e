"""Small models with one weight in several places, in the structure of GPT-2, T5 and Llama. Name -> a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, WIDTH, HEADS = 13, 8, 2


class Attention(nn.Module):
    """Queries of x, keys and values of `other`; positions turn them where `rotary` says so."""

    def __init__(self, *, causal: bool, rotary: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))
        self.causal, self.rotary = causal, rotary

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer, y in self._inputs(x, other))
        if self.rotary:
            q, k = turned(q), turned(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def _inputs(self, x: Tensor, other: Tensor) -> list[tuple[nn.Module, Tensor]]:
        return [(self.q, x), (self.k, other), (self.v, other)]


def turned(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] / 3.0 ** torch.arange(
        x.shape[-1] // 2, device=x.device
    )
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], *, cross: bool = False, gated: bool = False, **how: bool):
        super().__init__()
        self.attention, self.norms = Attention(**how), nn.ModuleList(norm(WIDTH) for _ in range(2 + cross))
        self.cross = Attention(causal=False, bias=how.get("bias", True)) if cross else None
        self.up, self.down = nn.Linear(WIDTH, 12, bias=how.get("bias", True)), nn.Linear(12, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 12, bias=False) if gated else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y)
        if self.cross is not None and memory is not None:
            x = x + self.cross(self.norms[2](x), memory)
        y = self.norms[1](x)
        up = self.up(y)
        return x + self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(y)) * up)


class GPT2(nn.Module):
    """Learned positions, layer norms; the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(TOKENS, WIDTH), nn.Embedding(16, WIDTH)
        self.block, self.norm = Block(nn.LayerNorm, causal=True), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(self.block(x)))
        return logits


class T5(nn.Module):
    """One embedding for encoder, decoder and, scaled, the head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.encoder = Block(nn.RMSNorm, causal=False, bias=False)
        self.decoder = Block(nn.RMSNorm, causal=True, cross=True, bias=False)
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        memory = self.encoder(self.shared(ids))
        x = self.norm(self.decoder(self.shared(targets), memory))
        logits: Tensor = self.head(x * WIDTH**-0.5)
        return logits


class Llama(nn.Module):
    """Rotary positions, RMS norms, gated layers; the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(TOKENS, WIDTH), nn.RMSNorm(WIDTH)
        self.block = Block(nn.RMSNorm, causal=True, rotary=True, gated=True, bias=False)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.block(self.embedding(ids))))
        return logits


class Looped(nn.Module):
    """A layer that is called three times, on inputs of its own shape each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.again = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = x + self.again(x).tanh()
        y: Tensor = self.norm(self.again(x)) + self.again(x.mean(1)).unsqueeze(1)
        return y


class Small(nn.Module):
    """An embedding that is called twice, and a head with its weight and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(TOKENS, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.embedding(ids) + self.embedding(ids.flip(1))).tanh())
        return logits


class Case(NamedTuple):
    """A model and the inputs of some samples."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    options: dict[str, Any]


def ids(length: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randint(TOKENS, (size, length))


TIED: dict[str, Case] = {
    "small": Case(Small, lambda size: (ids(7)(size),), {}),
    "GPT-2": Case(GPT2, lambda size: (ids(7)(size),), {"broadcast": ["wpe"]}),
    "T5": Case(T5, lambda size: (ids(7)(size), ids(9)(size)), {}),
    "Llama": Case(Llama, lambda size: (ids(7)(size),), {}),
    "loop": Case(Looped, lambda size: (torch.randn(size, 7, 5).double(),), {}),
}
