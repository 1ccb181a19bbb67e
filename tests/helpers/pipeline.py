"""A model of three layers as two stages of a pipeline, one per rank, and the steps that a schedule makes of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

#: Names of the model's layers, as those of the stages.
STAGES = {"a": "stages.0.0", "b": "stages.0.2", "c": "stages.1.0"}


def stage_of(whole: Any, rank: int) -> nn.Module:
    """The layers of a rank."""
    return [nn.Sequential(whole.a, nn.Tanh(), whole.b), nn.Sequential(whole.c)][rank]


def run_stage(stage: nn.Module, number: int, x: Tensor, y: Tensor, peer: int | None = None) -> None:
    """The forward and the backward pass of a stage for one batch, of which the loss is the mean; `peer`: the rank that
    has the other stage, where it is not that of its number."""
    peer = 1 - number if peer is None else peer
    if number == 0:
        sent = stage(x)
        dist.send(sent.detach(), peer)
        dist.recv(grad := torch.empty_like(sent), peer)
        sent.backward(grad)
    else:
        dist.recv(received := torch.empty(len(x), 5, dtype=torch.float64), peer)
        F.mse_loss(stage(torch.tanh(received.requires_grad_())), y).backward()
        dist.send(received.grad, peer)
