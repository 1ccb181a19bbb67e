"""Rows of samples: [B, T, ...], or packed [N, ...] where sample b is the rows offsets[b]:offsets[b + 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def number_of_samples(x: Tensor, offsets: Tensor | None) -> int:
    return x.shape[0] if offsets is None else offsets.shape[0] - 1


def rows(x: Tensor, offsets: Tensor | None, sample: int) -> Tensor:
    """Return the rows of one sample, [T, ...]."""
    x = x.detach()
    return x[sample] if offsets is None else x[int(offsets[sample]) : int(offsets[sample + 1])]


def packed(x: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    if offsets is not None:
        return x, offsets.to(x.device)
    samples, length = x.shape[:2]
    return x.flatten(0, 1), torch.arange(samples + 1, device=x.device) * length


def concatenate(
    first: Sequence[Tensor], first_offsets: Tensor | None, second: Sequence[Tensor], second_offsets: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Put every sample's rows of `second` behind its rows of `first`, tensor by tensor; lengths may differ."""
    if first_offsets is None and second_offsets is None:
        return [torch.cat([a, b], 1) for a, b in zip(first, second, strict=True)], None
    ids, totals = [], []
    for x, offsets in ((first[0], first_offsets), (second[0], second_offsets)):
        flat, starts = packed(x, offsets)
        # Rows outside all samples (padding at an end) keep an own number, and so stay outside.
        ids.append(torch.bucketize(torch.arange(len(flat), device=x.device), starts, right=True))
        totals.append(starts)
    order = torch.cat(ids).argsort(stable=True)
    pairs = zip(first, second, strict=True)
    joined = [torch.cat([packed(a, first_offsets)[0], packed(b, second_offsets)[0]])[order] for a, b in pairs]
    return joined, totals[0] + totals[1]
