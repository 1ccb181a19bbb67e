"""A small transformer with a fault: the run of which docs/figures/gallery.py draws the report and the update ratios."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

import lipcore

STEPS, FAULT = 1000, 700


class Block(nn.Module):
    """One layer of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def train(run: Path) -> None:
    """Train a small transformer to count on in steps of 1 to 3; in one step one layer's learning rate is too large."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Block(32) for _ in range(6)))
    parts = {"embedding": nn.Embedding(40, 32), "layers": layers, "head": nn.Linear(32, 40)}
    model = nn.Sequential(OrderedDict(parts))
    groups = [{"params": layer.parameters()} for layer in layers]
    groups.append({"params": [*parts["embedding"].parameters(), *parts["head"].parameters()]})
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    with lipcore.watch(model, optimizer, run=run, alarms="default", window_steps=20) as monitor:
        for step in range(1, STEPS + 1):
            tokens = (torch.randint(40, (16, 1)) + torch.randint(1, 4, (16, 1)) * torch.arange(17)) % 40
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            monitor.log(loss=loss)
            loss.backward()
            optimizer.param_groups[3]["lr"] = 0.1 if step == FAULT else 1e-3
            optimizer.step()
            optimizer.zero_grad()
