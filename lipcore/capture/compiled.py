"""What both engines know of compiled regions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Probes of the compiled forward pass under way, by site. As an attribute of a hook a probe would belong to the module
# in torch.compile's eyes, and its size be compiled in: one graph for every size of the batch.
armed: dict[int, Tensor] = {}


def is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
