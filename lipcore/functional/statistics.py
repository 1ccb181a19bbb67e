"""Statistics of rows and of parameter trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core, _library
from lipcore.update_rules import UpdateRule, sums_on_device

_float64, _int64 = torch.float64, torch.int64
_BUCKETS = [2**n for n in range(8, 17)]


def sample_norms(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Euclidean norm of every sample, :math:`n_b = \|x_b\|_2`, with x of shape [B, ...].

    Squares are taken and summed in float64, so nothing overflows or underflows and the order of threads does not
    matter.
    The number is what x is: of a gradient under a mean-reduced loss it carries that loss's 1/B.

    Args:
        x: [B, ...], one sample per row, any strides. [0, ...] gives [0]; rows without elements give 0.
        out: float64 [B] to write into; it must not share memory with x.

    Returns:
        float64 [B], detached.

    Raises:
        TypeError, ValueError: x or out is not a tensor lipcore can use; the message names it and the remedy.

    >>> sample_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        return _library.sample_norms(x.detach())
    if _core.check_storage(x, "x"):
        x = x.resolve_neg()
    if out is None:
        if not x.dim():
            raise ValueError(
                "x: expected shape [B, ...] with one row per sample, got a 0-dimensional tensor; use x.reshape(1)"
            )
        out = (
            torch.empty(x.shape[0], dtype=_float64, device=_library.CPU)
            if x.is_cpu
            else x.new_empty(x.shape[0], dtype=_float64)
        )
    else:
        _check_state(out, "out")
    _core.sample_norms(x, out)
    return out


def normalized_norms(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    r"""Normalised first-layer gradient norms :math:`r_b = \|\partial L/\partial u_b\|_2 \,/\, |\partial L/\partial\hat
    y_b|`.

    Both factors come from the same backward pass, so the loss reduction, a factor 1/2, an AMP loss scale and gradient
    accumulation all cancel: r_b is the norm of the gradient of the network's output with respect to u_b, the summand of
    Theorem 1 of Loukas, Poiitis and Jegelka (NeurIPS 2021).

    Args:
        delta: [B, ...], gradient of the loss with respect to the first layer's output before its activation.
        output_grad: B values, gradient of the loss with respect to the network's output, one value per sample.

    Returns:
        r, float64 [B], NaN where output_grad is 0 or not finite (such a sample says nothing about the network), and how
        many those are, int64 of shape [].

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, or shapes that do not belong together.

    >>> normalized_norms(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([0.5, 0.0]))
    (tensor([10., nan], dtype=torch.float64), tensor(1))
    """
    if torch.compiler.is_compiling():
        return _library.normalized_norms(delta.detach(), output_grad.detach())
    if _core.check_storage(delta, "delta"):
        delta = delta.resolve_neg()
    if _core.check_storage(output_grad, "output_grad"):
        output_grad = output_grad.resolve_neg()
    if not delta.dim():
        raise ValueError("delta: expected shape [B, ...] with one row per sample, got a 0-dimensional tensor")
    if not delta.is_cpu:
        return _normalized_norms_on_device(delta, output_grad)
    r = torch.empty(delta.shape[0], dtype=_float64, device=_library.CPU)
    # scalar_tensor: a third of torch.tensor's time
    return r, torch.scalar_tensor(_core.normalized_norms(delta, output_grad, r), dtype=_int64)


def _normalized_norms_on_device(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    if output_grad.numel() != delta.shape[0] or output_grad.device != delta.device:
        raise ValueError(
            f"output_grad: expected {delta.shape[0]} values on {delta.device}, one per sample of delta, got shape "
            f"{list(output_grad.shape)} on {output_grad.device}"
        )
    eps = output_grad.detach().reshape(-1).to(_float64).abs()
    usable = (eps > 0) & eps.isfinite()
    return torch.where(usable, sample_norms(delta) / eps, torch.nan), (~usable).sum()


def trajectory_step(
    params: Sequence[Tensor],
    prev: Sequence[Tensor],
    ref: Sequence[Tensor],
    mean: Sequence[Tensor],
    count: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    r"""One step of trajectory statistics for a list of tensors, in one pass over their memory.

    With dw = w - prev and x = w - ref, the columns of the result are :math:`\sum dw^2`, :math:`\sum x^2`, the Welford
    increment :math:`\sum (x - \bar x_{old})(x - \bar x_{new})`, :math:`\max |dw|`, :math:`\sum w^2` and the number of
    non-finite elements of w. Then prev becomes w and mean becomes the mean of x over `count` points. A tensor with
    non-finite elements gets a row of NaN with their number and keeps its prev and mean; the other tensors are
    unaffected.

    Args:
        params: the tensors as they are now.
        prev: as they were a step ago, same shapes and dtypes; updated in place.
        ref: the reference point (the initialisation, say), same shapes and dtypes.
        mean: running mean of w - ref, float32 (float64 for float64 tensors); updated in place.
        count: number of points averaged, this one included; at 1 the mean starts here.
        out: float64 [n, 6] to write into.

    Returns:
        float64 [n, 6].

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, state that is not dense or shares memory, or lists that
            do not belong together. Nothing has been written then.

    >>> w, state = [torch.tensor([3.0, 4.0])], [[torch.zeros(2)] for _ in range(3)]
    >>> trajectory_step(w, *state, count=1)
    tensor([[25., 25.,  0.,  4., 25.,  0.]], dtype=torch.float64)
    """
    lists = {"params": params, "prev": prev, "ref": ref, "mean": mean}
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple of tensors, got {type(tensors).__name__}")
    readable = [_readable(tensor, "params", i) for i, tensor in enumerate(params)]
    reference = [_readable(tensor, "ref", i) for i, tensor in enumerate(ref)]
    for name in ("prev", "mean"):
        for i, tensor in enumerate(lists[name]):
            _check_state(tensor, name, i)
    if len(prev) == len(params) and len(ref) == len(params):
        laid_out = [[_in_layout_of(a, b) for a, b in zip(t, prev, strict=True)] for t in (readable, reference)]
        written = [("prev", prev), ("mean", mean), ("out", [] if out is None else [out])]
        for name, before, after in zip(("params", "ref"), (readable, reference), laid_out, strict=True):
            _check_copies(name, before, after, written)
        readable, reference = laid_out
    if out is None:
        device = readable[0].device if readable else None
        out = torch.empty(len(params), _core.STEP_COLUMNS, dtype=_float64, device=device)
    else:
        _check_state(out, "out")
    _core.trajectory_step(readable, prev, reference, mean, count, out)
    return out


def sketch(tensors: Sequence[Tensor], first_index: Sequence[int], *, buckets: int, seed: int) -> Tensor:
    r"""CountSketch of a list of tensors: a short vector whose norm estimates theirs, in one pass over their memory.

    .. math:: y_b = \sum_{i\,:\,h(i) = b} s(i)\, w_i, \qquad E\|y\|^2 = \|w\|^2, \qquad
        \mathrm{sd}(\|y\|^2) \le \|w\|^2 \sqrt{2 / k}

    with k buckets; bucket h(i) and sign s(i) of an element are hashed from its global index i and the seed. The map is
    linear: the difference of two sketches is the sketch of the difference, and inner products are estimated as well as
    norms. Sketches of parts of w, each with its own first index, add up to the sketch of w wherever the cuts are. Sums
    are float64, the same bits for every instruction set and number of threads.

    Args:
        tensors: any shapes, dense; elements are taken in the order in which they lie in memory.
        first_index: global index of each tensor's first element, >= 0. Different elements need different indices.
        buckets: k, a power of two from 256 to 65536.
        seed: chooses the hash, 0 <= seed < 2**64; only sketches with the same k and seed belong together.

    Returns:
        float64 [k], detached; NaN from end to end when an element is not finite.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use; a strided tensor is one.

    Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams" (2002); Thorup, Zhang, "Tabulation
    based 4-universal hashing with applications to second moment estimation" (2004).

    >>> w = torch.linspace(-1, 1, 1000)
    >>> parts = sketch([w[:300]], [0], buckets=256, seed=7) + sketch([w[300:]], [300], buckets=256, seed=7)
    >>> torch.allclose(parts, sketch([w], [0], buckets=256, seed=7), rtol=0, atol=1e-12)
    True
    """
    for name, entries in (("tensors", tensors), ("first_index", first_index)):
        if not isinstance(entries, (list, tuple)):
            of = "tensors" if name == "tensors" else "integers"
            raise TypeError(f"{name}: expected a list or tuple of {of}, got {type(entries).__name__}")
    if len(first_index) != len(tensors):
        raise ValueError(f"first_index: expected {len(tensors)} indices, one per tensor, got {len(first_index)}")
    if buckets not in _BUCKETS:
        raise ValueError(f"buckets: expected a power of two from {_BUCKETS[0]} to {_BUCKETS[-1]}, got {buckets!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer from 0 to 2**64 - 1, got {seed!r}")
    if torch.compiler.is_compiling() and tensors:
        return _library.sketch([tensor.detach() for tensor in tensors], first_index, buckets, seed)
    for i, index in enumerate(first_index):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**63:
            raise ValueError(
                f"first_index[{i}]: expected the global index of the tensor's first element, an integer from 0 to "
                f"2**63 - 1, got {index!r}"
            )
    readable = [_readable(tensor, "tensors", i) for i, tensor in enumerate(tensors)]
    out = torch.empty(buckets, dtype=_float64, device=readable[0].device if readable else None)
    _core.sketch(readable, first_index, seed, out)
    return out


def update_sums(
    params: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
) -> tuple[Tensor, Tensor]:
    r"""Sums of the updates of one optimizer step for a list of tensors, from the optimizer's state after the step.

    With dw as the rules say it (:class:`lipcore.update_rules.UpdateRule`) and w the tensors as they are now, the
    columns of the result are those of :func:`trajectory_step`: :math:`\sum dw^2`, 0, 0, :math:`\max |dw|`,
    :math:`\sum w^2` and the number of elements where w or dw is not finite; distance and Welford increment are 0,
    because nothing is remembered. A tensor with such an element gets a row of NaN with their number; the other tensors
    are unaffected. Nothing is written.

    The arithmetic is that of float32, of float64 as soon as one of w, a, b is float64, whatever the mixture of dtypes;
    sums are float64. On the CPU one compiled pass over all tensors, the same bits for every instruction set and number
    of threads. CUDA tensors go through torch's operations one at a time: no host synchronisation, and about four
    copies of one tensor, in the working type, at a time.

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
    weights = [_dense(_readable(tensor, "params", i)) for i, tensor in enumerate(params)]
    states = []
    for name, tensors in (("first", first), ("second", second)):
        readable = [t if t is None else _readable(t, name, i) for i, t in enumerate(tensors)]
        states.append([t if t is None else _laid_out_as(w, t) for t, w in zip(readable, weights, strict=True)])
    if weights and not weights[0].is_cpu:
        return _update_sums_on_device(weights, states[0], states[1], rules)
    rows = torch.empty(len(params), _core.STEP_COLUMNS, dtype=_float64, device=_library.CPU)
    normalized = torch.empty(len(params), dtype=_float64, device=_library.CPU)
    _core.update_sums(weights, states[0], states[1], rules, rows, normalized)
    return rows, normalized


def _update_sums_on_device(
    params: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
) -> tuple[Tensor, Tensor]:
    rows, normalized = [], []
    for i, (w, a, b, rule) in enumerate(zip(params, first, second, rules, strict=True)):
        if not isinstance(rule, UpdateRule):
            raise TypeError(f"rules[{i}]: expected a lipcore.update_rules.UpdateRule, got {type(rule).__name__}")
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
        row, mean_square = sums_on_device(w, a, b, rule)
        rows.append(row)
        normalized.append(mean_square)
    return torch.stack(rows), torch.stack(normalized)


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return tensor.detach().contiguous()


def _laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor's values in the memory order of `like`; a copy only where strides differ."""
    if tensor.stride() == like.stride() or tensor.shape != like.shape or tensor.device != like.device:
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor.detach())


def _readable(tensor: Tensor, name: str, index: int) -> Tensor:
    return tensor.resolve_neg() if _core.check_storage(tensor, name, index) else tensor


def _check_state(tensor: Tensor, name: str, index: int = -1) -> None:
    if _core.check_storage(tensor, name, index):
        argument = f"{name}[{index}]" if index >= 0 else name
        raise ValueError(
            f"{argument}: carries the negative bit, so writing to its memory would flip signs; pass a plain tensor"
        )


def _in_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor's values in the memory order of `like`; a copy only where strides differ. Misfits are left to the
    core."""
    if tensor.stride() == like.stride() or tensor.shape != like.shape or tensor.dtype != like.dtype:
        return tensor
    if tensor.device != like.device:
        return tensor
    return torch.empty_like(like).copy_(tensor.detach())


def _check_copies(
    name: str, before: Sequence[Tensor], after: Sequence[Tensor], written: list[tuple[str, Sequence[Tensor]]]
) -> None:
    """The core refuses state that shares memory with an argument, but of one that had to be copied it sees the copy."""
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
    """Whether the spans of memory from first to last element meet."""
    if not a.numel() or not b.numel():
        return False
    (a_first, a_last), (b_first, b_last) = _span(a), _span(b)
    return a_first < b_last and b_first < a_last


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
