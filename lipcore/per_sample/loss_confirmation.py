"""The factor of a softmax cross-entropy, seen in the gradient at its logits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lipcore.models.torch_internals import is_packed, saved
from lipcore.per_sample.loss_nodes import Made, signed

NOT_CONFIRMED = (
    "loss_reduction='auto': the gradient at the logits of the cross-entropy is another one than its graph says: "
    "another loss is made of the same logits, or a hook changes their gradient; pass loss_reduction='mean' or 'sum' "
    "with loss_terms= or scale= in place of 'auto'"
)
_ROWS = 4
_SAME_ROWS = ("View", "UnsafeView", "ReshapeAlias", "ToCopy", "Alias", "Clone")
_KEPT = ("self", "target", "weight", "total_weight")


class Confirmation:
    r"""Some rows of what the gradient at logits z has to be: of a loss :math:`\sum_i w_i \ell_i / N` it is

    .. math:: \partial L / \partial z_i = w_i (\mathrm{softmax}(z_i) - e_{y_i}) / N

    and f / N of that for whatever is made of it, so that one row tells f.

    Args:
        rows: :math:`w_i (\mathrm{softmax}(z_i) - e_{y_i})` of every `step`-th i.
    """

    def __init__(self, rows: Tensor, step: int) -> None:
        self._rows, self._step = rows, step

    def agrees(self, gradient: Tensor, scale: float | Tensor) -> Tensor | None:
        """Return whether a gradient at the logits is `scale` times the rows, but for its sign; None where that cannot
        be seen (a layout that would have to be copied, numbers that are not finite)."""
        if gradient.numel() % self._rows.shape[1] or not gradient.is_contiguous():
            return None
        found = gradient.view(-1, self._rows.shape[1])[:: self._step][: len(self._rows)]
        number, kind = found.double(), torch.finfo(gradient.dtype)
        expected = self._rows.double() * scale
        bound = max(1e-4, 4 * kind.eps) * expected.abs().amax() + 4 * kind.smallest_normal * kind.eps
        error = torch.minimum((number - expected).abs().amax(), (number + expected).abs().amax())
        return (error <= bound) | ~number.isfinite().all()


def confirmation_of(reduction: Made, came: Callable[[Tensor], None]) -> Confirmation | None:
    """Return what confirms a loss whose graph ends in this reduction, and have `came` called with the gradient that all
    uses of its logits bring; None where it is no softmax cross-entropy of [N, C], or what it keeps must not be looked
    at."""
    node = reduction.node
    if reduction.kind != "NllLoss" or any(is_packed(node, name) for name in _KEPT):
        return None
    softmax = reduction.origin
    if softmax.kind != "LogSoftmax" or len(softmax.shape) != 2 or is_packed(softmax.node, "result"):
        return None
    result, target = saved(softmax.node, "result"), saved(node, "target")
    if not len(result) or hasattr(result, "placements"):  # of a part of the classes no row can be looked at
        return None
    step = max(1, len(result) // _ROWS)
    rows, labels = result[::step][:_ROWS].detach().float().exp(), target[::step][:_ROWS]
    counted = labels != signed(saved(node, "ignore_index"))
    labels = labels.masked_fill(~counted, 0)
    rows -= (labels[:, None] == torch.arange(rows.shape[1], device=rows.device)).float()
    weight = saved(node, "weight")
    worth = counted.float() if weight is None else counted * weight.detach()[labels].float()
    source = _source(softmax.origin)
    source.node.register_prehook(functools.partial(_hand_on, came, source.place))
    return Confirmation(rows * worth[:, None], step)


def _hand_on(came: Callable[[Tensor], None], place: int, gradients: tuple[Tensor | None, ...]) -> None:
    gradient = gradients[place]
    if gradient is not None:
        came(gradient)


def _source(made: Made) -> Made:
    """Return what has made the logits, before they were reshaped or cast."""
    while made.kind in _SAME_ROWS:
        made = made.origin
    return made
