"""One step of trajectory statistics of a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional.arguments import check_state, resolved
from lipcore.models.arguments import check_count


def trajectory_step(
    params: Sequence[Tensor],
    prev: Sequence[Tensor],
    deviation: Sequence[Tensor],
    count: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    r"""Take one step of trajectory statistics for a list of tensors, in one pass over their memory.

    With dw = w - prev and the mean :math:`\bar w` of the points, the columns of the result are :math:`\sum dw^2`, the
    Welford increment :math:`\sum (w - \bar w_{old})(w - \bar w_{new})`, :math:`\max |dw|`, :math:`\sum w^2` and the
    number of non-finite elements of w. Then prev becomes w, and deviation what w lies from the mean of `count` points.
    The mean itself is prev - deviation: kept as that, a small movement of a large weight loses nothing to rounding. A
    non-finite element counts as having stood still: as what it was in prev, where it stays. The row of its tensor has
    NaN but for the increment and the number of such elements; the other tensors are unaffected.

    Args:
        params: the tensors as they are now.
        prev: as they were a step ago, same shapes and dtypes; updated in place.
        deviation: prev - the mean of the points so far, float32 (float64 for float64 tensors); updated in place.
        count: number of points averaged, this one included; at 1 the mean starts here. A path that starts at prev has
            0 as the deviation and 2 as the count of its first step.
        out: float64 [n, 5] to write into.

    Returns:
        float64 [n, 5].

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, state that is not dense or shares memory, or lists that
            do not belong together. Nothing has been written then.

    >>> w, prev, deviation = [torch.tensor([3.0, 4.0])], [torch.zeros(2)], [torch.zeros(2)]
    >>> trajectory_step(w, prev, deviation, count=2)
    tensor([[25.0000, 12.5000,  4.0000, 25.0000,  0.0000]], dtype=torch.float64)
    >>> prev, deviation
    ([tensor([3., 4.])], [tensor([1.5000, 2.0000])])
    """
    lists = {"params": params, "prev": prev, "deviation": deviation}
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple of tensors, got {type(tensors).__name__}")
    readable = [resolved(tensor, "params", i) for i, tensor in enumerate(params)]
    check_count("count", count)
    for name in ("prev", "deviation"):
        for i, tensor in enumerate(lists[name]):
            check_state(tensor, name, i)
    if len(prev) == len(params):
        laid_out = [_in_layout_of(a, b) for a, b in zip(readable, prev, strict=True)]
        written = [("prev", prev), ("deviation", deviation), ("out", [] if out is None else [out])]
        _check_copies("params", readable, laid_out, written)
        readable = laid_out
    if out is None:
        device = readable[0].device if readable else None
        out = torch.empty(len(params), _core.STEP_COLUMNS, dtype=torch.float64, device=device)
    else:
        check_state(out, "out")
    _core.trajectory_step(readable, prev, deviation, count, out)
    return out


def _in_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor's values in the memory order of `like`; a copy only where strides differ. Misfits are left to
    the core."""
    if tensor.stride() == like.stride() or tensor.shape != like.shape or tensor.dtype != like.dtype:
        return tensor
    if tensor.device != like.device:
        return tensor
    return torch.empty_like(like).copy_(tensor.detach())


def _check_copies(
    name: str, before: Sequence[Tensor], after: Sequence[Tensor], written: list[tuple[str, Sequence[Tensor]]]
) -> None:
    """Refuse state that shares memory with an argument that had to be copied, of which the core sees only the copy."""
    for i, (original, used) in enumerate(zip(before, after, strict=True)):
        if used is original:
            continue
        for state, tensors in written:
            for j, tensor in enumerate(tensors):
                if _overlap(original, tensor):
                    raise ValueError(
                        f"{state}[{j}]: is written to but shares memory with {name}[{i}]; pass separate tensors"
                    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether the spans of memory from first to last element meet."""
    if not a.numel() or not b.numel():
        return False
    (a_first, a_last), (b_first, b_last) = _span(a), _span(b)
    return a_first < b_last and b_first < a_last


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
