"""Probes of the compiled forward pass under way, shared by both ways of tapping."""

from __future__ import annotations

from torch import Tensor

# Probes of the compiled forward pass under way, by site. As an attribute of a hook a probe would belong to the module
# in torch.compile's eyes, and its size be compiled in: one graph for every size of the batch.
armed: dict[int, Tensor] = {}
