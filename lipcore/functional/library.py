"""torch.ops.lipcore.*: the operators that can stand inside compiled graphs.

Registered with torch.library.Library and not with custom_op, whose wrapper costs 12 us a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")  # named wherever compiled code writes: torch.set_default_device() may be another

_library = torch.library.Library("lipcore", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define torch.ops.lipcore.<name of the schema>: `kernel` runs on CPU and CUDA tensors, `fake` gives shapes."""
    name = schema.split("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"lipcore::{name}", fake, lib=_library)
