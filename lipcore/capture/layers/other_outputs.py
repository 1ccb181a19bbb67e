"""Outputs of a layer beside its first, such as attention weights: a rule does not know the gradients they bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.graph.own_graph import OwnGraph
from lipcore.layers import Rule
from lipcore.models.outputs import nodes_of, tensors_of

_BESIDE = "a gradient came to an output beside its first, {0}"
_WAYS = "detach() that output, or leave the layer out with on_unsupported='skip'"
_OF_RULE = _BESIDE.format("which its rule does not know; " + _WAYS)
_OF_OWN_GRAPH = _BESIDE.format(
    "a state perhaps, which earlier passes did not use; its own graph, in which it is run once more in the backward "
    "pass, measures the first alone"
)


def why_not(rule: Rule) -> str:
    """Say what is wrong where a gradient comes to an output of a module beside the first, and what to do."""
    if isinstance(rule, OwnGraph):
        return _OF_OWN_GRAPH
    return _BESIDE.format(rule.beside + _WAYS) if rule.beside else _OF_RULE


def has_used_others(output: Any, returned: Any) -> bool:
    """Return whether what a model has returned was made of outputs of a layer beside the first."""
    others = {(other.grad_fn, other.output_nr) for other in _others(output)}
    if not others:
        return False
    roots = {(tensor.grad_fn, tensor.output_nr) for tensor in tensors_of(returned)}
    return bool(others & roots) or any(edge in others for node in nodes_of(returned) for edge in node.next_functions)


def watch(output: Any, on_gradient: Callable[[], None]) -> None:
    """Call `on_gradient` when a gradient comes back to one of a layer's outputs beside the first."""

    def came(grad: Tensor) -> None:
        on_gradient()

    for other in _others(output):
        other.register_hook(came)


def watch_probed(output: Any, probe: Tensor) -> Any:
    """Return a layer's output, inside a compiled region, with the tensors beside the first watched: a gradient at one
    of them makes the probe's gradient NaN."""
    if not _others(output):
        return output
    return (output[0], *_watched(output[1:], probe))


def _watched(outputs: tuple[Any, ...], probe: Tensor) -> tuple[Any, ...]:
    found = []
    for each in outputs:
        if type(each) is tuple:
            each = _watched(each, probe)
        elif isinstance(each, Tensor) and each.requires_grad:
            each = _Watched.apply(each, probe)  # type: ignore[no-untyped-call]
        found.append(each)
    return tuple(found)


def _others(output: Any) -> list[Tensor]:
    """Return the tensors beside the first, in tuples inside too: (output, (h, c))."""
    rest = output[1:] if isinstance(output, tuple) else ()
    return [t for t in tensors_of(rest) if t.requires_grad]


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor) -> Tensor:
        ctx.columns = probe.shape
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # A compiled region has a gradient for each of its outputs, of zeros where there is none.
        reached = (grad != 0).any()
        mark = torch.where(reached, torch.nan, 0.0).to(torch.float64)
        return grad, mark.expand(ctx.columns)
