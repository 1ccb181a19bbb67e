"""Linear layers that see several rows per sample: squared norms of per-sample weight gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional import portable
from lipcore.functional.arguments import integers, of_one_dtype, result_beside
from lipcore.models.arguments import check_choice, check_count

Method = Literal["gram", "direct"]
METHODS: tuple[Method, ...] = get_args(Method)
_NUMBER = {None: 0, "gram": 1, "direct": 2}  # in the core
_REDO = 3
_PRODUCTS = 1 << 23  # elements of weight gradients that it makes at a time, in float32: what second-level caches hold


def linear_norms_sq(x: Tensor, grad: Tensor, *, offsets: Tensor | None = None, method: Method | None = None) -> Tensor:
    r"""Compute the squared norms of the per-sample weight gradients of y = x W^T, given the gradient at y.

    .. math:: n_b^2 = \Big\|\sum_t g_{bt} x_{bt}^T\Big\|_F^2 = \sum_{t,s} (x_{bt} \cdot x_{bs})(g_{bt} \cdot g_{bs})

    Neither the weight gradients nor anything of size T x T is ever in memory. Products and their sums along features or
    tokens are float32 (float64 for float64 input), squares are added in float64; relative error about
    :math:`10^{-7}\sqrt T`. The number is what grad is: under a mean-reduced loss it carries 1/B^2.

    Args:
        x: inputs of the layer, [B, ..., I], or packed rows [N, I] beside offsets.
        grad: gradients at its output, [B, ..., O], or packed [N, O]; its dtype need not be that of x.
        offsets: int [B + 1], 0 = offsets[0] <= ... <= offsets[B] = N: sample b is the rows offsets[b]:offsets[b + 1].
        method: "gram" (the right-hand side: cheap for short sequences, but loses digits where tokens cancel; such
            samples are computed again directly), "direct" (the left-hand side), or None for the cheaper one, named by
            :func:`linear_method`. Packed rows on a CUDA device are always taken directly.

    Returns:
        float64 [B], detached; never negative, and NaN only for input that is not finite.

    Raises:
        TypeError, ValueError: a tensor lipcore cannot use, shapes that do not fit, an unknown method; the message names
            the argument.

    >>> linear_norms_sq(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.tensor([[[3.0], [1.0]]]))
    tensor([58.], dtype=torch.float64)
    """
    check_choice("method", method, METHODS, optional=True)
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.linear_norms_sq(x.detach(), grad.detach(), offsets, method)
        return traced
    return _norms(*_checked(x, grad, offsets), method)


def linear_weight_grad(x: Tensor, grad: Tensor, *, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Compute the batch's weight gradient :math:`\sum_b g_b^T x_b` and its B summands' squared norms in one pass.

    Each sample's block is added to the total while it is in cache, so the norms cost little beside the gradient that
    training needs anyway. The summation order is not torch's: the gradient agrees with torch's to rounding, not bit for
    bit.

    Args:
        x: inputs of the layer, [B, ..., I], or packed rows [N, I] beside offsets.
        grad: gradients at its output, [B, ..., O], or packed [N, O].
        offsets: as in :func:`linear_norms_sq`; rows before the first and behind the last sample do not exist.

    Returns:
        The gradient [O, I] in the dtype both share, and float64 [B]; detached.

    Raises:
        TypeError, ValueError: as in :func:`linear_norms_sq`.

    >>> linear_weight_grad(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]), torch.tensor([[[3.0]], [[1.0]]]))
    (tensor([[3., 7.]]), tensor([45.,  1.], dtype=torch.float64))
    """
    if torch.compiler.is_compiling():
        traced: tuple[Tensor, Tensor] = torch.ops.lipcore.linear_weight_grad(x.detach(), grad.detach(), offsets)
        return traced
    x, grad, offsets = _checked(x, grad, offsets)
    dtype = torch.promote_types(x.dtype, grad.dtype)
    if not made_in_one_pass(x, grad):
        return grad.to(dtype).flatten(0, -2).T @ x.to(dtype).flatten(0, -2), _norms(x, grad, offsets, None)
    x, grad, starts = _for_the_core(x, grad, offsets)
    out = result_beside(x, _samples(x, offsets))
    total = out.new_empty(grad.shape[-1], x.shape[-1], dtype=torch.promote_types(dtype, torch.float32))
    _core.linear_weight_grad(x, grad, starts, total, out)
    return total.to(dtype), out


def linear_method(tokens: int, in_features: int, out_features: int, *, device: torch.device | str = "cpu") -> Method:
    """Return how :func:`linear_norms_sq` treats T tokens per sample on a device unless told: "gram" or "direct".

    The cheaper of both by multiplications and by how well tiles are filled; direct where they are close, because Gram
    loses digits. A CUDA device multiplies whole tiles of 64 tokens, and so has fewer lengths for "gram". It takes
    packed sequences directly, and may let torch make the products of large layers of 16-bit numbers;
    ``PerSampleGradNorms.plan()`` names the way that was taken.

    Raises:
        ValueError: a size below 0.
    """
    sizes = {"tokens": tokens, "in_features": in_features, "out_features": out_features}
    for name, size in sizes.items():
        check_count(name, size, 0)
    on_cpu = torch.device(device).type == "cpu"
    return "gram" if _core.linear_uses_gram(tokens, in_features, out_features, on_cpu) else "direct"


def linear_norms_sq_estimate(
    x: Tensor,
    grad: Tensor,
    *,
    probes: int = 16,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Estimate :func:`linear_norms_sq` from random probes, without bias, with the standard error.

    .. math:: \hat n_b^2 = \frac 1 k \sum_{j=1}^k \Big\|\sum_t g_{bt}\,(x_{bt} \cdot v_j)\Big\|^2, \qquad
        v_j \in \{-1, 1\}^I

    with independent signs: the mean of :math:`\|W_b v\|^2` is :math:`\|W_b\|_F^2` (Hutchinson 1990). It costs 2k/T of
    the Gram form. The relative standard deviation is at most :math:`\sqrt{2/k}` (35 % at k = 16, for gradients of rank
    1), and far less where many tokens contribute independently. Never used unless called.

    Args:
        x: inputs of the layer, [B, ..., I], or packed rows [N, I] beside offsets.
        grad: gradients at its output, [B, ..., O], or packed [N, O].
        probes: k, at least 2.
        offsets: as in :func:`linear_norms_sq`.
        generator: of the signs, on the device of x; torch's default one otherwise.

    Returns:
        The estimate and the standard error of it that the k probes show, float64 [B] each, detached.

    Raises:
        TypeError, ValueError: as in :func:`linear_norms_sq`, and for fewer than 2 probes.
    """
    check_count("probes", probes, 2)
    x, grad, offsets = _checked(x, grad, offsets)
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
    if offsets is None:
        samples = [(portable.three_dimensional(x), portable.three_dimensional(grad))]
    else:
        pairs = zip(portable.pieces(x, offsets), portable.pieces(grad, offsets), strict=True)
        samples = [(a[None], g[None]) for a, g in pairs]
    signs = torch.randint(0, 2, (x.shape[-1], probes), generator=generator, device=x.device)
    signs = (2 * signs - 1).to(dtype)
    rows = [grad.new_zeros(0, probes, dtype=torch.float64)]
    for some_x, some_grad in samples:
        (a, a_scale), (g, g_scale) = (portable.scaled(t.to(dtype)) for t in (some_x, some_grad))
        seen = g.transpose(1, 2) @ (a @ signs)  # [B, O, k]
        rows.append(seen.to(torch.float64).square().sum(1) * (a_scale * g_scale)[:, None])
    each = torch.cat(rows)
    return each.mean(1), each.std(1) / probes**0.5


def _checked(x: Tensor, grad: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    for name, tensor in (("x", x), ("grad", grad)):
        _core.check_storage(tensor, name)
        if tensor.dim() < 2:
            raise ValueError(
                f"{name}: expected [B, ..., features], or packed rows [N, features] beside offsets, got "
                f"shape {list(tensor.shape)}"
            )
    if x.device != grad.device:
        raise ValueError(f"grad: is on {grad.device}, but x is on {x.device}; put both on one device")
    if x.shape[:-1] != grad.shape[:-1]:
        raise ValueError(
            f"grad: expected the samples and tokens of x, {list(x.shape[:-1])}, got shape {list(grad.shape)}"
        )
    x, grad = x.detach().resolve_neg(), grad.detach().resolve_neg()
    if offsets is None:
        return x, grad, None
    if x.dim() != 2:
        raise ValueError(f"x: expected packed rows [N, I] beside offsets, got shape {list(x.shape)}")
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int64, torch.int32) or offsets.dim() != 1:
        raise TypeError("offsets: expected an int64 or int32 tensor of shape [B + 1]")
    if not len(offsets):
        raise ValueError("offsets: expected shape [B + 1], from 0 to the number of rows, got an empty tensor")
    if x.is_cpu:
        starts = offsets.cpu()
        fits = int(starts[0]) == 0 and int(starts[-1]) == len(x) and not bool((starts.diff() < 0).any())
        if not fits:
            raise ValueError(
                f"offsets: expected to ascend from 0 to the number of rows, {len(x)}, got {starts.tolist()[:8]}"
                + ("..." if len(starts) > 8 else "")
            )
        return x, grad, starts
    return x, grad, offsets


def _norms(x: Tensor, grad: Tensor, offsets: Tensor | None, method: Method | None) -> Tensor:
    out = result_beside(x, _samples(x, offsets))
    x, grad, offsets = _for_the_core(x, grad, offsets)
    if method is None and offsets is None and not x.is_cpu and _suits_torch(x, grad):
        _norms_of_products(x, grad, out)
    else:
        _core.linear_norms(x, grad, offsets, _NUMBER[method], out)
    return out


def made_in_one_pass(x: Tensor, grad: Tensor) -> bool:
    """Return whether :func:`linear_weight_grad` makes gradient and norms together: always on the CPU."""
    if x.is_cpu:
        return True
    narrow = x.itemsize == grad.itemsize == 2
    multiplies = not narrow or (x.dtype == grad.dtype and _core.cuda_multiplies_16_bit(x.device.index))
    return multiplies and fills_a_device(x.shape[-1], grad.shape[-1])


def fills_a_device(inputs: int, outputs: int) -> bool:
    """Return whether a weight has tiles enough for one pass over all samples on a large device."""
    return bool(_core.linear_suits_one_pass(inputs, outputs))


def _suits_torch(x: Tensor, grad: Tensor) -> bool:
    narrow = x.dtype == grad.dtype and x.dtype in (torch.bfloat16, torch.float16)
    samples, tokens, inputs = x.shape
    return narrow and made_by_torch(
        samples, tokens, inputs, grad.shape[-1], tensor_cores=_core.cuda_multiplies_16_bit(x.device.index)
    )


def made_by_torch(samples: int, tokens: int, inputs: int, outputs: int, *, tensor_cores: bool) -> bool:
    """Return whether products of 16-bit numbers are torch's on a CUDA device: where there are many, and lipcore's
    kernel, which writes none of them, would take more time all the same (csrc/math/weight_cost.h).

    Args:
        samples: B.
        tokens: T, of each.
        inputs: I.
        outputs: O.
        tensor_cores: whether lipcore's kernel uses them: from compute capability 8.0 on.
    """
    return bool(_core.linear_suits_torch(samples, tokens, inputs, outputs, tensor_cores))


def lengths_by_gram(in_features: int, out_features: int, device: torch.device | str) -> str:
    """Return in words for how many positions per sample :func:`linear_method` is "gram" on a device.

    >>> lengths_by_gram(64, 64, "cpu")
    'Gram up to 28 positions, else direct'
    """
    ranges = _core.linear_gram_lengths(in_features, out_features, torch.device(device).type == "cpu")
    if not ranges:
        return "direct"
    words = [f"up to {last}" if first == 1 else f"from {first} to {last}" for first, last in ranges]
    return f"Gram {' and '.join(words)} position{'s' * (ranges[-1][1] != 1)}, else direct"


def ways(in_features: int, out_features: int, device: torch.device | str) -> str:
    """Return in words how :func:`linear_norms_sq` will compute the norms on a device, before it has seen dtype and
    batch.

    >>> ways(64, 64, "cuda")
    'direct, or torch.bmm for many 16-bit products'
    """
    torchs = "" if torch.device(device).type == "cpu" else ", or torch.bmm for many 16-bit products"
    return lengths_by_gram(in_features, out_features, device) + torchs


def way(x: Tensor, grad: Tensor, offsets: Tensor | None, method: Method | None) -> str:
    """Return how :func:`linear_norms_sq` computes the norms of these tensors: "gram", "direct" or "torch.bmm", and of
    how many positions; of packed rows on the CPU, that each sample's length decides."""
    inputs, outputs = x.shape[-1], grad.shape[-1]
    if offsets is not None:
        if not x.is_cpu:
            return "direct (packed rows on a device)"
        return method or f"each document's length ({lengths_by_gram(inputs, outputs, x.device)})"
    x, grad = (portable.three_dimensional(t) for t in (x, grad))
    shapes = shapes_in_words(x.shape[1], (outputs, inputs))
    if method is not None:
        return f"{method} ({shapes})"
    if not x.is_cpu and _suits_torch(x, grad):
        return f"torch.bmm ({shapes})"
    chosen = linear_method(x.shape[1], inputs, outputs, device=x.device)
    return f"{chosen} ({shapes}; {lengths_by_gram(inputs, outputs, x.device)})"


def shapes_in_words(positions: int, weight: Sequence[int]) -> str:
    """Return what a way was chosen by: positions of a sample, and the shape of the weight."""
    return f"{positions} position{'s' * (positions != 1)}, weight {' x '.join(map(str, weight))}"


def _norms_of_products(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """Write the norms of weight gradients that torch makes, of some samples and outputs at a time."""
    samples, outputs = grad.shape[0], grad.shape[-1]
    rows = max(1, min(outputs, _PRODUCTS // x.shape[-1]))
    step = max(1, _PRODUCTS // (rows * x.shape[-1]))
    sums = out.new_empty((outputs + rows - 1) // rows, samples)
    for part, some_grad in zip(sums, grad.transpose(1, 2).split(rows, 1), strict=True):
        for into, a, g in zip(part.split(step), x.split(step), some_grad.split(step), strict=True):
            _core.sample_norms(torch.bmm(g, a, out_dtype=torch.float32), into)
    torch.sum(sums.square_(), 0, out=out)
    _core.linear_norms(x, grad, None, _REDO, out)


def _for_the_core(x: Tensor, grad: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both in dimensions [B, T, features] or [N, features], on the CPU in one dtype, with contiguous features;
    offsets beside them."""
    if offsets is None:
        x, grad = portable.three_dimensional(x), portable.three_dimensional(grad)
    else:
        offsets = integers(offsets, "offsets").to(x.device)
    if x.is_cpu:
        x, grad = (_with_dense_rows(t) for t in of_one_dtype(x, grad))
    return x, grad, offsets


def _with_dense_rows(x: Tensor) -> Tensor:
    if x.shape[-1] <= 1 or x.stride(-1) == 1:
        return x
    return x.contiguous() if x.numel() else x.new_empty(x.shape)  # contiguous() does nothing to an empty tensor


def _samples(x: Tensor, offsets: Tensor | None) -> int:
    return x.shape[0] if offsets is None else offsets.shape[0] - 1


_library.register(
    "linear_norms_sq(Tensor x, Tensor grad, Tensor? offsets=None, str? method=None) -> Tensor",
    lambda x, grad, offsets=None, method=None: linear_norms_sq(x, grad, offsets=offsets, method=method),
    lambda x, grad, offsets=None, method=None: x.new_empty(_samples(x, offsets), dtype=torch.float64),
)
_library.register(
    "linear_weight_grad(Tensor x, Tensor grad, Tensor? offsets=None) -> (Tensor, Tensor)",
    lambda x, grad, offsets=None: linear_weight_grad(x, grad, offsets=offsets),
    lambda x, grad, offsets=None: (
        grad.new_empty(grad.shape[-1], x.shape[-1], dtype=torch.promote_types(x.dtype, grad.dtype)),
        x.new_empty(_samples(x, offsets), dtype=torch.float64),
    ),
)
