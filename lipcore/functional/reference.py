"""The specification: what every operation computes, in float64 and as plainly as possible.

Same signatures as :mod:`lipcore.functional` (state is returned instead of updated). Oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipcore.functional.update_rules import UpdateRule


def sample_norms(x: Tensor) -> Tensor:
    """Return ||x_b||_2 of every row of x [B, ...]."""
    norms: Tensor = torch.linalg.vector_norm(x.detach().double().reshape(x.shape[0], x[:1].numel()), dim=1)
    return norms


def normalized_norms(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return r_b = ||delta_b||_2 / |output_grad_b|, NaN where output_grad_b is 0 or not finite; and how many those
    are."""
    eps = output_grad.detach().double().abs().reshape(delta.shape[0])
    usable = (eps > 0) & eps.isfinite()
    return torch.where(usable, sample_norms(delta) / eps, torch.nan), (~usable).sum()


def trajectory_step(
    params: Sequence[Tensor], prev: Sequence[Tensor], deviation: Sequence[Tensor], count: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return rows (dw_sq, m2_increment, max_abs_dw, weight_sq, nonfinite) and the new prev and deviation.

    The mean of the points so far is prev - deviation, and after this step that of `count` points, this one included. A
    non-finite element counts as what it was in prev; the row of its tensor is NaN but for m2_increment and the number
    of such elements.
    """
    rows, new_prev, new_deviation = [], [], []
    for w, p, d in zip(params, prev, deviation, strict=True):
        w, p, d = (t.detach().double() for t in (w, p, d))
        nonfinite = (~w.isfinite()).sum().double()
        w = torch.where(w.isfinite(), w, p)
        step, before = w - p, (w - p) + d
        after = before - before / count  # as the mean comes nearer by a share of 1 / count
        largest = step.abs().max() if w.numel() else torch.tensor(0.0)
        row = [step.pow(2).sum(), (before * after).sum(), largest, w.pow(2).sum(), nonfinite]
        if nonfinite:
            row[0], row[2], row[3] = [torch.tensor(torch.nan)] * 3
        rows.append(torch.tensor([float(v) for v in row], dtype=torch.float64))
        new_prev.append(w)
        new_deviation.append(after)
    return torch.stack(rows) if rows else torch.zeros(0, 5, dtype=torch.float64), new_prev, new_deviation


def tensor_stats(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows (count, mean, m2, m3, m4, min, max, zeros, nonfinite), where m_k is the sum of (x - mean)^k over the
    finite elements, and the counts of their magnitudes per bin: the top 11 bits below the sign of |x| in float32."""
    rows, bins = torch.zeros(len(tensors), 9, dtype=torch.float64), torch.zeros(len(tensors), 2048, dtype=torch.int64)
    for row, counts, tensor in zip(rows, bins, tensors, strict=True):
        x = tensor.detach().double().flatten()
        row[8], x = (~x.isfinite()).sum(), x[x.isfinite()]
        if len(x):
            powers = [(x - x.mean()).pow(k).sum() for k in (2, 3, 4)]
            row[:8] = torch.stack([x.new_tensor(len(x)), x.mean(), *powers, x.min(), x.max(), (x == 0).sum()])
            counts += torch.bincount(x.abs().float().view(torch.int32) >> 20, minlength=2048)
    return rows, bins


def sketch(tensors: Sequence[Tensor], first_index: Sequence[int], *, buckets: int, seed: int) -> Tensor:
    """Return y_b = sum of s(i) w_i over the elements with h(i) = b; NaN when an element is not finite.

    32 bits per group of 16 elements, from one hash for two groups: element j of a group goes to bucket (upper 16 bits
    mod k) ^ j =: b, negated when bit b mod 16 is set.
    """
    y = torch.zeros(buckets, dtype=torch.float64)
    for w, first in zip(tensors, first_index, strict=True):
        flat = w.detach().as_strided((w.numel(),), (1,)).double().cpu()  # in the order of memory
        i = np.arange(first, first + w.numel(), dtype=np.uint64)
        bits = _splitmix64(_splitmix64(np.array([seed], np.uint64), 1), i // 32) >> i // 16 % 2 * 32 & 0xFFFFFFFF
        bucket = (bits >> 16) % buckets ^ i % 16
        sign = torch.from_numpy(1.0 - 2.0 * (bits >> bucket % 16 & 1))
        y.index_add_(0, torch.from_numpy(bucket.astype(np.int64)), flat * sign)
        if not flat.isfinite().all():
            y += torch.nan
    return y


def _splitmix64(start: NDArray[np.uint64], steps: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """Return the output of splitmix64 (Steele, Lea, Flood 2014) after so many steps from a state, modulo 2**64."""
    z = start + np.asarray(steps, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> 27) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ z >> 31
    return mixed


def update_sums(
    params: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    rules: Sequence[UpdateRule],
    *,
    gradients: Sequence[Tensor | None] | None = None,
    previous: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return rows (dw_sq, 0, max_abs_dw, weight_sq, nonfinite) of dw = -(decay w + rate u + mix b), u = a or,
    adaptive, first_scale a / (second_scale sqrt(b) + eps); and mean u^2, mean g^2 / max(v, eps^2) with v =
    second_scale^2 b, sum m^2 of the momentum, sum b^2, sum ((w - w_prev) - dw)^2, of what there is. NaN but for
    nonfinite where w or dw is not finite."""
    rows, squares = [], []
    nothing = [None] * len(params)
    asked = gradients or nothing, previous or nothing
    for w, a, b, r, g, w_prev in zip(params, first, second, rules, *asked, strict=True):
        has_second, nan = b is not None, torch.tensor(torch.nan).double()
        w, a, b = (torch.zeros_like(w).double() if t is None else t.detach().double() for t in (w, a, b))
        u = r.first_scale * a / (r.second_scale * b.sqrt() + r.eps) if r.adaptive else a
        dw = -(r.decay * w + r.rate * u + (0 if r.adaptive else r.mix * b))
        bad = float((~(w.isfinite() & dw.isfinite())).sum())
        row = [float(dw.square().sum()), 0.0, float(dw.abs().sum() and dw.abs().max()), float(w.square().sum())]
        rows.append(torch.tensor([*([torch.nan] * 4 if bad else row), bad], dtype=torch.float64))
        momentum = a if r.adaptive or not has_second else b
        root = (r.second_scale * b.sqrt()).clamp(min=r.eps)
        known = [
            u.square().mean() if r.adaptive else nan,
            (g.double() / root).square().mean() if r.adaptive and g is not None else nan,
            momentum.square().sum() if r.adaptive or r.momentum else nan,
            b.square().sum() if r.adaptive else nan,
            ((w - w_prev.double()) - dw).square().sum() if w_prev is not None else nan,
        ]
        squares.append(torch.stack([nan] * 5 if bad else known))
    all_rows, all_squares = (
        torch.stack(x or [torch.zeros(k).double()])[: len(x)] for x, k in ((rows, 5), (squares, 5))
    )
    return all_rows, all_squares.T


def normalized_length(r: Tensor) -> Tensor:
    """Return sum_t r_t: the normalised first-layer gradient length over a window (Theorem 1's middle term times
    |T|)."""
    return r.double().nansum()


def sandwich(local_lipschitz: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return Theorem 1: lambda_avg / sigma_1(W_1), lambda_avg / sigma_min(W_1), and whether the second is an upper
    bound."""
    outputs, inputs = weight.shape
    sigma = torch.linalg.svdvals(weight.detach().double())
    average = local_lipschitz.double().nanmean()
    return average / sigma[0], average / sigma[-1], outputs <= inputs and bool(sigma[-1] > 0)


# ---- squared norms of per-sample gradients
#
# Samples are the first dimension, or, packed, the runs of rows [offsets[b], offsets[b + 1]) of the first dimension.


def _samples(x: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """Return x per sample, [T, features] in float64; the dimensions between are flattened into T."""
    x = x.detach().double()
    if offsets is not None:
        return [x[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return [row.flatten(0, -2) if row.dim() > 1 else row.reshape(1, -1) for row in x]


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


def outer_norms_sq(x: Sequence[Tensor], grad: Sequence[Tensor]) -> Tensor:
    """Return [layers, B]: ||grad_b x_b^T||_F^2 = ||x_b||^2 ||grad_b||^2 of layers that see one row per sample."""
    return _stack([sample_norms(a).square() * sample_norms(g).square() for a, g in zip(x, grad, strict=True)])


def outer_and_bias_norms_sq(x: Sequence[Tensor], grad: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return outer_norms_sq(), and [layers, B]: ||grad_b||^2 of the biases."""
    return outer_norms_sq(x, grad), _stack([sample_norms(g).square() for g in grad])


def linear_norms_sq(x: Tensor, grad: Tensor, *, offsets: Tensor | None = None) -> Tensor:
    """Return ||sum_t grad_bt x_bt^T||_F^2: of the weight of y = x W^T, given the gradient at y."""
    pairs = zip(_samples(x, offsets), _samples(grad, offsets), strict=True)
    return _stack([(g.T @ a).square().sum() for a, g in pairs])


def linear_weight_grad(x: Tensor, grad: Tensor, *, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the batch's weight gradient sum_b grad_b^T x_b, and linear_norms_sq() of the same."""
    weight_grad = grad.double().flatten(0, -2).T @ x.double().flatten(0, -2)
    return weight_grad, linear_norms_sq(x, grad, offsets=offsets)


def linear_norms_sq_estimate(x: Tensor, grad: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over probes v (columns of signs [I, k]) of ||sum_t grad_bt (x_bt . v)||^2, and its standard
    error."""
    each = (grad.double().mT @ (x.double() @ signs.double())).square().sum(1)
    return each.mean(1), each.std(1) / signs.shape[1] ** 0.5


def row_sum_norms_sq(grad: Tensor, x: Tensor | None = None, *, offsets: Tensor | None = None) -> Tensor:
    """Return ||sum_t grad_bt||^2 (of a bias), or ||sum_t grad_bt * x_bt||^2 (of an element-wise scale)."""
    terms = grad.double() if x is None else grad.double() * x.double()
    return _stack([sample.sum(0).square().sum() for sample in _samples(terms, offsets)])


def affine_norms_sq(grad: Tensor, x: Tensor, *, offsets: Tensor | None = None) -> Tensor:
    """Return [2, B]: row_sum_norms_sq() with x (of the scale) and without (of the shift)."""
    return torch.stack([row_sum_norms_sq(grad, x, offsets=offsets), row_sum_norms_sq(grad, offsets=offsets)])


def norm_layer_norms_sq(
    grad: Tensor, x: Tensor, *, eps: float, center: bool = True, offsets: Tensor | None = None
) -> Tensor:
    """Return affine_norms_sq() of the rows of x, less their means where `center` says so, over the root of their mean
    squares and eps."""
    x = x.detach().double()
    x = x - x.mean(-1, keepdim=True) if center else x
    return affine_norms_sq(grad, x / (x.square().mean(-1, keepdim=True) + eps).sqrt(), offsets=offsets)


def channel_sum_norms_sq(grad: Tensor, x: Tensor | None = None) -> Tensor:
    """Return row_sum_norms_sq() of channels first, [B, C, *space]: sums are over space."""
    return row_sum_norms_sq(_channels_last(grad), None if x is None else _channels_last(x))


def channel_affine_norms_sq(grad: Tensor, x: Tensor) -> Tensor:
    """Return affine_norms_sq() of channels first, [B, C, *space]."""
    return affine_norms_sq(_channels_last(grad), _channels_last(x))


def _channels_last(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).flatten(2).transpose(1, 2)


def embedding_norms_sq(
    indices: Tensor,
    grad: Tensor,
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """sum over tokens v of ||sum of weights_bt grad_bt over t with indices_bt = v||^2; indices and weights [B, T],
    grad [B, T, D]."""
    if weights is not None:
        grad = grad.double() * weights.double().unsqueeze(-1)
    out = []
    for ids, g in zip(_samples(indices.unsqueeze(-1), offsets), _samples(grad, offsets), strict=True):
        same = (ids == ids.T) & (ids != (torch.nan if padding_idx is None else padding_idx))
        out.append((same * (g @ g.T)).sum())
    return _stack(out)


def tied_cross(
    indices: Tensor, grad_embedding: Tensor, x: Tensor, grad_head: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """Return <E_b, H_b> of an embedding whose weight [V, D] is also the head's: E_b its gradient as an embedding
    (indices [B, T], gradient [B, T, D]), H_b as the head's weight (x [B, S, D], gradient [B, S, V])."""
    out = []
    for ids, e, a, g in zip(indices, *(_samples(t, None) for t in (grad_embedding, x, grad_head)), strict=True):
        kept = (ids != (-1 if padding_idx is None else padding_idx)).flatten()
        out.append(((a @ e.T) * g[:, ids.flatten()] * kept).sum())
    return _stack(out)


def conv_norms_sq(
    x: Tensor,
    grad: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Return ||dL_b/dW||_F^2 of a convolution, x [B, C, *spatial], grad [B, O, *spatial of the output, or fewer]."""
    out, n = [], len(kernel_size)
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[n - 1]
    for a, g in zip(x.detach().double(), grad.detach().double(), strict=True):
        weight = torch.zeros(g.shape[0], a.shape[0] // groups, *kernel_size, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            y = conv(a[None], weight, None, list(stride), list(padding), list(dilation), groups)
            for d, size in enumerate(g.shape[1:], 2):
                y = y.narrow(d, 0, size)
            (weight_grad,) = torch.autograd.grad((y[0] * g).sum(), weight)
        out.append(weight_grad.square().sum())
    return _stack(out)
