"""Sums over the updates that an optimizer's rule makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional.arguments import resolved
from lipcore.functional.update_rules import UpdateRule

#: Rows of the squares that update_sums returns, in the order of enum UpdateSquare (csrc/math/update.h).
NORMALIZED, RATIO, MOMENTUM, SECOND_MOMENT, UNEXPLAINED = range(_core.UPDATE_SQUARES)


def update_sums(
    params: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
    *,
    gradients: Sequence[Tensor | None] | None = None,
    previous: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Sum up the updates of one optimizer step for a list of tensors, from the optimizer's state after the step.

    With dw as the rules say it (:class:`lipcore.functional.update_rules.UpdateRule`) and w the tensors as they are now,
    the columns of the result are those of :func:`trajectory_step`: :math:`\sum dw^2`, 0, :math:`\max |dw|`,
    :math:`\sum w^2` and the number of elements where w or dw is not finite; the Welford increment is 0, because nothing
    is remembered. A tensor with such an element gets a row of NaN with their number; the other tensors
    are unaffected. Nothing is written.

    The squares say more of every tensor, NaN where it is not known:

    0. mean u^2 of the normalised update u of an adaptive rule
    1. mean g^2 / max(v, eps^2) of its gradient g and of v, the second moment after the step without its bias: the
       square of RMS_t (Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
       NeurIPS 2023)
    2. sum m^2 of what is kept of past gradients: the first moment, or the buffer of momentum as it is
    3. sum b^2 of the second moment as it is
    4. sum ((w - w_prev) - dw)^2: what the parameter did beside this update, the rounding of w included

    The arithmetic is that of float32, of float64 as soon as one of the tensors is float64, whatever the mixture of
    dtypes; sums are float64. One compiled pass over all tensors: on the CPU the same bits for every instruction set and
    number of threads; of CUDA tensors by two kernels, or one more for every 70 tensors (45 with gradients or previous
    ones), and no host synchronisation.

    Args:
        params: the parameters after the step, any strides.
        first: the optimizer's tensors a (gradient, momentum buffer or first moment), of the same shapes; None where a
            rule has no use for one.
        second: its tensors b (second moment, or the buffer of Nesterov's momentum).
        rules: one per parameter. Their scalars may be tensors of one element on the parameters' GPU.
        gradients: of adaptive rules, for the second of the squares; one more stream that is read.
        previous: the parameters before the step, for the last of the squares; one more stream that is read.

    Returns:
        float64 [n, 5], and the squares, float64 [5, n].

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, or lists that do not belong together.

    >>> adam = UpdateRule(rate=0.1, adaptive=True)
    >>> update_sums([torch.zeros(2)], [torch.tensor([3.0, -2.0])], [torch.tensor([9.0, 4.0])], [adam])[1][0]
    tensor([1.], dtype=torch.float64)
    """
    states: dict[str, Sequence[Tensor | None]] = {"first": first, "second": second}
    asked = {"gradients": gradients, "previous": previous}
    states |= {name: tensors for name, tensors in asked.items() if tensors is not None}
    lists: dict[str, Sequence[Any]] = {"params": params, **states, "rules": rules}
    for name, entries in lists.items():
        if not isinstance(entries, (list, tuple)):
            of = "rules" if name == "rules" else "tensors"
            raise TypeError(f"{name}: expected a list or tuple of {of}, got {type(entries).__name__}")
    for name in (*states, "rules"):
        if len(lists[name]) != len(params):
            of = "rules" if name == "rules" else "tensors"
            raise ValueError(f"{name}: expected {len(params)} {of}, one per parameter, got {len(lists[name])}")
    weights = [_dense(resolved(tensor, "params", i)) for i, tensor in enumerate(params)]
    laid_out = {}
    for name, tensors in states.items():
        readable = [t if t is None else resolved(t, name, i) for i, t in enumerate(tensors)]
        laid_out[name] = [t if t is None else _laid_out_as(w, t) for t, w in zip(readable, weights, strict=True)]
    device = weights[0].device if weights else torch.device("cpu")
    rows = torch.empty(len(params), _core.STEP_COLUMNS, dtype=torch.float64, device=device)
    squares = torch.empty(_core.UPDATE_SQUARES, len(params), dtype=torch.float64, device=device)
    _core.update_sums(params=weights, **laid_out, rules=rules, rows=rows, squares=squares)
    return rows, squares


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return tensor.detach().contiguous()


def _laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor's values in the memory order of `like`; a copy only where strides differ."""
    if tensor.stride() == like.stride() or tensor.shape != like.shape or tensor.device != like.device:
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor.detach())
