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


def run_stage(stage: nn.Module, rank: int, x: Tensor, y: Tensor) -> None:
    """The forward and the backward pass of a rank for one batch, of which the loss is the mean."""
    if rank == 0:
        sent = stage(x)
        dist.send(sent.detach(), 1)
        dist.recv(grad := torch.empty_like(sent), 1)
        sent.backward(grad)
    else:
        dist.recv(received := torch.empty(len(x), 5, dtype=torch.float64), 0)
        F.mse_loss(stage(torch.tanh(received.requires_grad_())), y).backward()
        dist.send(received.grad, 0)
