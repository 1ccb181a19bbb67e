"""One row per layer and way of configuring it: how to make it, and how to make its arguments for B samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Arguments = Callable[[int], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    arguments: Arguments
    low_precision: bool = True  #: torch has it in bfloat16 and float16 on the CPU, accurately enough to compare


def floats(*shape: int) -> Arguments:
    return lambda size: (torch.randn(size, *shape),)


def tokens(rows: int, *shape: int) -> Arguments:
    return lambda size: (torch.randint(rows, (size, *shape)),)


def in_eval(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 2)
    return module.eval()


def stirred(module: nn.Module) -> nn.Module:
    """Affine parameters away from 1 and 0; one weight is 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1)
            parameter.view(-1)[0] = 0
    return module


class BagOf(nn.Module):
    """An EmbeddingBag on flat indices with bags of different lengths, made from [B, T] with a count per row."""

    def __init__(self, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 5, **options)
        self.weighted = weighted

    def forward(self, indices: Tensor, counts: Tensor) -> Tensor:
        kept = torch.arange(indices.shape[1]) < counts[:, None]
        starts = counts.cumsum(0)
        starts = torch.cat([starts.new_zeros(1), starts])
        weights = torch.cos(indices[kept].to(self.bag.weight.dtype)) if self.weighted else None
        return self.bag(indices[kept], starts if self.bag.include_last_offset else starts[:-1], weights)


def bags(size: int) -> tuple[Any, ...]:
    return torch.randint(11, (size, 6)), torch.randint(0, 7, (size,))


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(17, 7), floats(17)),
    "linear, no bias": Case(lambda: nn.Linear(1, 65, bias=False), floats(1)),
    "linear 3-d": Case(lambda: nn.Linear(16, 15), floats(3, 16)),
    "linear 3-d, long": Case(lambda: nn.Linear(7, 3), floats(129, 7)),
    "linear 4-d": Case(lambda: nn.Linear(5, 2), floats(3, 7, 5)),
    "linear 5-d": Case(lambda: nn.Linear(5, 2), floats(2, 3, 2, 5)),
    "bilinear": Case(lambda: nn.Bilinear(3, 5, 7), lambda b: (torch.randn(b, 3), torch.randn(b, 5)), False),
    "bilinear 3-d": Case(lambda: nn.Bilinear(3, 5, 2), lambda b: (torch.randn(b, 4, 3), torch.randn(b, 4, 5)), False),
    "conv1d": Case(lambda: nn.Conv1d(3, 7, 3), floats(3, 17)),
    "conv1d, all options": Case(
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False), floats(4, 15)
    ),
    "conv1d, same, even kernel": Case(lambda: nn.Conv1d(3, 5, 4, padding="same", dilation=3), floats(3, 16)),
    "conv2d": Case(lambda: nn.Conv2d(3, 5, 3), floats(3, 7, 9)),
    "conv2d, 1x1": Case(lambda: nn.Conv2d(3, 5, 1), floats(3, 4, 4)),
    "conv2d, uneven": Case(lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(0, 1)), floats(2, 9, 8)),
    "conv2d, depthwise": Case(lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), floats(6, 5, 5)),
    "conv2d, groups": Case(lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3, dilation=2), floats(6, 7, 7)),
    "conv2d, same": Case(lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), floats(2, 6, 5)),
    "conv2d, valid": Case(lambda: nn.Conv2d(2, 3, 3, padding="valid"), floats(2, 6, 5)),
    **{
        f"conv2d, {mode}": Case(
            lambda mode=mode: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode), floats(2, 6, 5)
        )
        for mode in ("circular", "reflect", "replicate")
    },
    "conv1d, same, circular": Case(lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), floats(2, 9)),
    "conv3d": Case(lambda: nn.Conv3d(2, 4, (1, 3, 2), padding=1, groups=2), floats(2, 3, 5, 4), False),
    "conv transpose 1d": Case(lambda: nn.ConvTranspose1d(3, 5, 3, stride=2, output_padding=1), floats(3, 6), False),
    "conv transpose 2d": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), floats(4, 5, 3), False
    ),
    "conv transpose 2d, dilated": Case(
        lambda: nn.ConvTranspose2d(2, 3, 2, stride=1, dilation=3, output_padding=2), floats(2, 5, 3), False
    ),
    "conv transpose 3d": Case(lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), floats(2, 3, 2, 2), False),
    "embedding": Case(lambda: nn.Embedding(5, 7), tokens(5, 9)),
    "embedding, one token": Case(lambda: nn.Embedding(5, 7), tokens(5)),
    "embedding 3-d, padding": Case(lambda: nn.Embedding(5, 3, padding_idx=1), tokens(5, 3, 4)),
    "embedding, max_norm": Case(lambda: nn.Embedding(5, 7, max_norm=0.5), tokens(5, 9), False),
    "embedding, sparse": Case(lambda: nn.Embedding(5, 7, sparse=True), tokens(5, 9), False),
    "bag, sum": Case(lambda: nn.EmbeddingBag(11, 5, mode="sum"), tokens(11, 6), False),
    "bag, mean": Case(lambda: nn.EmbeddingBag(11, 5, mode="mean"), tokens(11, 6), False),
    "bag, mean, padding": Case(lambda: nn.EmbeddingBag(3, 5, mode="mean", padding_idx=0), tokens(3, 6), False),
    "layer norm": Case(lambda: stirred(nn.LayerNorm(17)), floats(17)),
    "layer norm 3-d": Case(lambda: stirred(nn.LayerNorm(16)), floats(5, 16)),
    "layer norm, no bias": Case(lambda: stirred(nn.LayerNorm(7, bias=False)), floats(3, 7)),
    "layer norm, two dimensions": Case(lambda: stirred(nn.LayerNorm((3, 5))), floats(4, 3, 5)),
    "rms norm": Case(lambda: stirred(nn.RMSNorm(15)), floats(3, 15)),
    "rms norm, eps": Case(lambda: stirred(nn.RMSNorm((2, 5), eps=0.1)), floats(2, 5)),
    "group norm": Case(lambda: stirred(nn.GroupNorm(2, 6)), floats(6, 3, 5)),
    "group norm, no space": Case(lambda: stirred(nn.GroupNorm(2, 6)), floats(6)),
    "instance norm 1d": Case(lambda: stirred(nn.InstanceNorm1d(4, affine=True)), floats(4, 7), False),
    "instance norm 2d": Case(lambda: stirred(nn.InstanceNorm2d(4, affine=True)), floats(4, 3, 5), False),
    "instance norm 3d, running": Case(
        lambda: in_eval(stirred(nn.InstanceNorm3d(2, affine=True, track_running_stats=True))), floats(2, 2, 3, 2), False
    ),
    "batch norm 1d, eval": Case(lambda: in_eval(stirred(nn.BatchNorm1d(5))), floats(5)),
    "batch norm 1d with length, eval": Case(lambda: in_eval(stirred(nn.BatchNorm1d(5))), floats(5, 3)),
    "batch norm 2d, eval": Case(lambda: in_eval(stirred(nn.BatchNorm2d(3))), floats(3, 4, 5)),
    "batch norm 3d, eval": Case(lambda: in_eval(stirred(nn.BatchNorm3d(3))), floats(3, 2, 2, 3), False),
    "prelu": Case(nn.PReLU, floats(3, 5)),
    "prelu, channels": Case(lambda: nn.PReLU(3), floats(3, 5)),
    "prelu, channels only": Case(lambda: nn.PReLU(3), floats(3)),
}
