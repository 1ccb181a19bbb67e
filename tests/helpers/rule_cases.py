"""The table of layers: a new layer is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """make(): the module; inputs(B): its arguments in float64, tensors with samples at batch_dim."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    keywords: Callable[[int], dict[str, Any]] = field(default=lambda samples: {})
    batch_dim: int = 0
    own_dim: bool = True  #: whether batch_dim is for Batch (else the layer knows itself)
    empty_batch: bool = True  #: whether torch takes B = 0


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _x(*shape: int) -> Callable[[int], tuple[Any, ...]]:
    """[B, *shape]"""
    return lambda samples: (_randn(samples, *shape),)


def _ids(num: int, *shape: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda samples: (torch.randint(num, (samples, *shape)),)


def _eval(module: nn.Module) -> nn.Module:
    """In eval mode, with running statistics that are not those of a fresh module."""
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape) + (0.5 if "var" in name else -0.5))
    return module.eval()


def _attention(heads: int = 2, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.MultiheadAttention(8, heads, **options)
        for p in module.parameters():
            nn.init.normal_(p, std=0.5)
        return module

    return make


def _qkv(samples: int) -> tuple[Any, ...]:
    return _randn(5, samples, 8), _randn(7, samples, 8), _randn(7, samples, 8)


def _padding(samples: int) -> dict[str, Any]:
    mask = torch.zeros(samples, 5, dtype=torch.bool)
    mask[: samples // 2, 3:] = True
    return {"key_padding_mask": mask}


def _self(samples: int) -> tuple[Any, ...]:
    x = _randn(samples, 5, 8)
    return x, x, x


def _causal() -> Tensor:
    return torch.ones(5, 5, dtype=torch.bool).triu(1)


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(7, 5), _x(7)),
    "linear_1x1": Case(lambda: nn.Linear(1, 1), _x(1)),
    "linear_wide": Case(lambda: nn.Linear(129, 65), _x(17, 129)),
    "linear_3d": Case(lambda: nn.Linear(7, 5), _x(3, 7)),
    "linear_4d": Case(lambda: nn.Linear(7, 5, bias=False), _x(3, 2, 7)),
    "linear_no_token": Case(lambda: nn.Linear(7, 5), _x(0, 7)),
    "linear_batch_second": Case(lambda: nn.Linear(7, 5), lambda b: (_randn(4, b, 7),), batch_dim=1),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), _x(4, 17)),
    "conv2d": Case(lambda: nn.Conv2d(3, 5, 3, padding=1), _x(3, 7, 5)),
    "conv2d_1x1": Case(lambda: nn.Conv2d(3, 5, 1, bias=False), _x(3, 4, 4)),
    "conv2d_depthwise": Case(lambda: nn.Conv2d(6, 6, (3, 2), stride=(2, 1), groups=6), _x(6, 7, 6)),
    "conv3d": Case(lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1, groups=2), _x(2, 3, 4, 5)),
    "conv_valid": Case(lambda: nn.Conv1d(3, 2, 3, padding="valid"), _x(3, 9)),
    "conv_same_odd": Case(lambda: nn.Conv2d(3, 2, (4, 3), padding="same", dilation=(1, 2)), _x(3, 7, 6)),
    "conv_same_even": Case(lambda: nn.Conv2d(3, 2, 3, padding="same"), _x(3, 7, 6)),
    "conv_circular": Case(lambda: nn.Conv2d(3, 2, 3, padding=(2, 1), padding_mode="circular"), _x(3, 7, 6)),
    "conv_reflect_same": Case(lambda: nn.Conv1d(3, 2, 4, padding="same", padding_mode="reflect"), _x(3, 9)),
    "conv_replicate": Case(lambda: nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"), _x(2, 3, 3, 4)),
    "conv_transpose1d": Case(
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), _x(4, 7)
    ),
    "conv_transpose1d_long": Case(lambda: nn.ConvTranspose1d(3, 2, 2, dilation=3, output_padding=2), _x(3, 5)),
    "conv_transpose2d": Case(lambda: nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 3), dilation=2), _x(3, 4, 3)),
    "conv_transpose3d": Case(lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), _x(2, 2, 3, 2)),
    "embedding": Case(lambda: nn.Embedding(5, 3), _ids(5, 17)),
    "embedding_one_token": Case(lambda: nn.Embedding(5, 3), _ids(5)),
    "embedding_padding": Case(lambda: nn.Embedding(4, 3, padding_idx=1), _ids(4, 3, 5)),
    "embedding_sparse": Case(lambda: nn.Embedding(4, 3, sparse=True), _ids(4, 5)),
    "embedding_max_norm": Case(lambda: nn.Embedding(4, 3, max_norm=0.5), _ids(4, 5)),
    "bag_sum": Case(lambda: nn.EmbeddingBag(5, 3, mode="sum"), _ids(5, 7)),
    "bag_mean_padding": Case(lambda: nn.EmbeddingBag(5, 3, mode="mean", padding_idx=2), _ids(5, 7)),
    "bag_weighted": Case(
        lambda: nn.EmbeddingBag(5, 3, mode="sum"),
        _ids(5, 7),
        lambda b: {"per_sample_weights": _randn(b, 7)},
    ),
    "layer_norm": Case(lambda: nn.LayerNorm(17), _x(5, 17)),
    "layer_norm_2d": Case(lambda: nn.LayerNorm(17), _x(17)),
    "layer_norm_dims": Case(lambda: nn.LayerNorm((3, 7)), _x(2, 3, 7)),
    "layer_norm_no_bias": Case(lambda: nn.LayerNorm(7, bias=False), _x(2, 7)),
    "layer_norm_plain": Case(lambda: nn.LayerNorm(7, elementwise_affine=False), _x(2, 7)),
    "rms_norm": Case(lambda: nn.RMSNorm(7), _x(5, 7)),
    "rms_norm_eps": Case(lambda: nn.RMSNorm((3, 7), eps=0.1), _x(5, 3, 7)),
    "group_norm": Case(lambda: nn.GroupNorm(2, 6), _x(6, 5, 3)),
    "group_norm_no_space": Case(lambda: nn.GroupNorm(2, 6), _x(6)),
    "instance_norm1d": Case(lambda: nn.InstanceNorm1d(3, affine=True), _x(3, 9), empty_batch=False),
    "instance_norm2d": Case(
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), _x(3, 4, 5), empty_batch=False
    ),
    "instance_norm3d_eval": Case(
        lambda: _eval(nn.InstanceNorm3d(3, affine=True, track_running_stats=True)), _x(3, 2, 3, 4), empty_batch=False
    ),
    "batch_norm1d": Case(lambda: _eval(nn.BatchNorm1d(5)), _x(5)),
    "batch_norm1d_3d": Case(lambda: _eval(nn.BatchNorm1d(5)), _x(5, 7)),
    "batch_norm2d": Case(lambda: _eval(nn.BatchNorm2d(3)), _x(3, 4, 5)),
    "batch_norm3d": Case(lambda: _eval(nn.BatchNorm3d(3)), _x(3, 2, 3, 4)),
    "prelu": Case(lambda: nn.PReLU(), _x(7, 3)),
    "prelu_channels": Case(lambda: nn.PReLU(3), _x(3, 4, 5)),
    "bilinear": Case(lambda: nn.Bilinear(3, 4, 5), lambda b: (_randn(b, 3), _randn(b, 4))),
    "bilinear_3d": Case(lambda: nn.Bilinear(3, 4, 5), lambda b: (_randn(b, 7, 3), _randn(b, 7, 4))),
    "mha": Case(_attention(), _qkv, batch_dim=1, own_dim=False),
    "mha_self": Case(_attention(batch_first=True), _self, _padding),
    "mha_no_bias": Case(_attention(bias=False, batch_first=True), _self, lambda b: {"need_weights": False}),
    "mha_causal": Case(
        _attention(batch_first=True),
        _self,
        lambda b: {"attn_mask": _causal(), "is_causal": True, "need_weights": False},
    ),
    "mha_float_mask": Case(_attention(batch_first=True), _self, lambda b: {"attn_mask": _randn(5, 5)}),
    "mha_extra": Case(
        _attention(add_bias_kv=True, add_zero_attn=True, batch_first=True),
        _self,
        lambda b: _padding(b) | {"attn_mask": _causal()},
    ),
    "mha_separate": Case(
        _attention(kdim=3, vdim=6, batch_first=True),
        lambda b: (_randn(b, 5, 8), _randn(b, 7, 3), _randn(b, 7, 6)),
    ),
}
