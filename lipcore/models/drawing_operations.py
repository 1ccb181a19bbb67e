"""The operations of a pass that draw random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.models.torch_internals import TorchDispatchMode, tree_leaves


class DrawingOperations(TorchDispatchMode):
    """Observer of the operations that draw from torch's generators.

    Attributes:
        found: name of each, in order, and the shape of what it has drawn.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            shape = next((tuple(each.shape) for each in tree_leaves(made) if isinstance(each, Tensor)), ())
            self.found.append((str(func), shape))
        return made
