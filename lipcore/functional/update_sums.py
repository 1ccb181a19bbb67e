"""Sums over the updates that an optimizer's rule makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional.arguments import resolved
from lipcore.functional.update_rules import UpdateRule


def update_sums(
    params: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
) -> tuple[Tensor, Tensor]:
    r"""Sum up the updates of one optimizer step for a list of tensors, from the optimizer's state after the step.

    With dw as the rules say it (:class:`lipcore.functional.update_rules.UpdateRule`) and w the tensors as they are now,
    the columns of the result are those of :func:`trajectory_step`: :math:`\sum dw^2`, 0, 0, :math:`\max |dw|`,
    :math:`\sum w^2` and the number of elements where w or dw is not finite; distance and Welford increment are 0,
    because nothing is remembered. A tensor with such an element gets a row of NaN with their number; the other tensors
    are unaffected. Nothing is written.

    The arithmetic is that of float32, of float64 as soon as one of w, a, b is float64, whatever the mixture of dtypes;
    sums are float64. One compiled pass over all tensors: on the CPU the same bits for every instruction set and number
    of threads; of CUDA tensors by two kernels, or one more for every 70 tensors, and no host synchronisation.

    Args:
        params: the parameters after the step, any strides.
        first: the optimizer's tensors a (gradient, momentum buffer or first moment), of the same shapes; None where a
            rule has no use for one.
        second: its tensors b (second moment, or the buffer of Nesterov's momentum).
        rules: one per parameter. Their scalars may be tensors of one element on the parameters' GPU.

    Returns:
        float64 [n, 6], and the mean square of the normalised update u, float64 [n]: NaN where a rule normalises
        nothing, or where there are no elements.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, or lists that do not belong together.

    >>> adam = UpdateRule(rate=0.1, adaptive=True)
    >>> update_sums([torch.zeros(2)], [torch.tensor([3.0, -2.0])], [torch.tensor([9.0, 4.0])], [adam])[1]
    tensor([1.], dtype=torch.float64)
    """
    lists = {"params": params, "first": first, "second": second, "rules": rules}
    for name, entries in lists.items():
        if not isinstance(entries, (list, tuple)):
            of = "rules" if name == "rules" else "tensors"
            raise TypeError(f"{name}: expected a list or tuple of {of}, got {type(entries).__name__}")
    for name in ("first", "second", "rules"):
        if len(lists[name]) != len(params):
            of = "rules" if name == "rules" else "tensors"
            raise ValueError(f"{name}: expected {len(params)} {of}, one per parameter, got {len(lists[name])}")
    weights = [_dense(resolved(tensor, "params", i)) for i, tensor in enumerate(params)]
    states = []
    for name, tensors in (("first", first), ("second", second)):
        readable = [t if t is None else resolved(t, name, i) for i, t in enumerate(tensors)]
        states.append([t if t is None else _laid_out_as(w, t) for t, w in zip(readable, weights, strict=True)])
    device = weights[0].device if weights else torch.device("cpu")
    rows = torch.empty(len(params), _core.STEP_COLUMNS, dtype=torch.float64, device=device)
    normalized = torch.empty(len(params), dtype=torch.float64, device=device)
    _core.update_sums(weights, states[0], states[1], rules, rows, normalized)
    return rows, normalized


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return tensor.detach().contiguous()


def _laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor's values in the memory order of `like`; a copy only where strides differ."""
    if tensor.stride() == like.stride() or tensor.shape != like.shape or tensor.device != like.device:
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor.detach())
