"""Whether the backward pass under way leaves its gradients in all parameters, or only computes some of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: A leaf that every tap's autograd Function has as an input, and to which no gradient ever flows. Its node is executed
#: when the backward pass executes everything it reaches; not by autograd.grad(), nor by backward(inputs=...).
anything = torch.zeros((), requires_grad=True, device="cpu")


def _node_of(leaf: Tensor) -> Any:
    return leaf.view_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


_any_node = _node_of(anything)


def accumulates_everything() -> bool:
    """Asked in the backward of a Function that has `anything` as an input."""
    return bool(torch._C._will_engine_execute_node(_any_node))
