"""Sums over the updates that an optimizer's rule makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional.arguments import resolved
from lipcore.functional.update_rules import UpdateRule
from lipcore.functional.update_sums_together import sums_together


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
    sums are float64. On the CPU one compiled pass over all tensors, the same bits for every instruction set and number
    of threads. CUDA tensors go through torch's operations: no host synchronisation, small ones together, and
    about six copies of 4 million elements, or four of one larger tensor, in the working type, at a time.

    Args:
        params: the parameters after the step, any strides.
        first: the optimizer's tensors a (gradient, momentum buffer or first moment), of the same shapes; None where a
            rule has no use for one.
        second: its tensors b (second moment, or the buffer of Nesterov's momentum).
        rules: one per parameter. Their scalars may be 0-dimensional CUDA tensors where the parameters are on the GPU.

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
    if weights and not weights[0].is_cpu:
        return update_sums_on_device(weights, states[0], states[1], rules)
    rows = torch.empty(len(params), _core.STEP_COLUMNS, dtype=torch.float64, device=_library.CPU)
    normalized = torch.empty(len(params), dtype=torch.float64, device=_library.CPU)
    _core.update_sums(weights, states[0], states[1], rules, rows, normalized)
    return rows, normalized


def update_sums_on_device(
    params: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
) -> tuple[Tensor, Tensor]:
    """Compute :func:`lipcore.functional.update_sums` in torch's operations, for tensors on a device."""
    for i, (w, a, b, rule) in enumerate(zip(params, first, second, rules, strict=True)):
        if not isinstance(rule, UpdateRule):
            raise TypeError(
                f"rules[{i}]: expected a lipcore.functional.update_rules.UpdateRule, got {type(rule).__name__}"
            )
        if w.device != params[0].device:
            raise ValueError(f"params[{i}]: is on another device than params[0]; put all on one")
        for name, tensor, scalar in (("first", a, rule.rate), ("second", b, rule.mix)):
            if tensor is None:
                if rule.adaptive or isinstance(scalar, Tensor) or scalar != 0:
                    _core.check_storage(tensor, name, i)  # says what None is instead of a tensor
            elif tensor.shape != w.shape:
                raise ValueError(
                    f"{name}[{i}]: expected shape {list(w.shape)} of params[{i}], got {list(tensor.shape)}"
                )
            elif tensor.device != w.device:
                raise ValueError(f"{name}[{i}]: is on another device than params[{i}]; put all on one")
    return sums_together(list(zip(params, first, second, rules, strict=True)))


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return tensor.detach().contiguous()


def _laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor's values in the memory order of `like`; a copy only where strides differ."""
    if tensor.stride() == like.stride() or tensor.shape != like.shape or tensor.device != like.device:
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor.detach())
