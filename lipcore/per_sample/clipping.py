"""Factors that bound what one sample's gradient contributes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lipcore.models.arguments import check_choice

Missing = Literal["nan", "zero", "raise"]  #: what becomes of a NaN norm


def clip_factors(
    norms: Tensor,
    max_norm: float | Tensor,
    *,
    eps: float = 0.0,
    missing: Missing = "nan",
) -> Tensor:
    r"""Compute the factor per sample that shortens its gradient to at most `max_norm`.

    .. math:: c_i = \min(1, C / (\|g_i\| + \epsilon))

    This is the clipping of Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1. The sum of
    :math:`c_i g_i` is the gradient of :math:`\sum_i c_i l_i` with the factors held constant: multiply the samples'
    losses by them in a second backward pass. The norms must be those of l_i itself (not of l_i / B), over all
    parameters that are trained: a parameter that is not covered is not bounded.

    lipcore is no privacy accountant: the factors bound a sample's contribution, up to rounding, and nothing else. No
    noise is added, nothing makes the sampling Poisson, and no (epsilon, delta) is computed or implied.

    Args:
        norms: [B], :math:`\|g_i\|`, plain norms, not squared.
        max_norm: C > 0; a tensor of shape [] or [B] for a bound that is computed or differs by sample.
        eps: added to the norm; 1e-6 keeps the product below `max_norm` in float32 whatever the rounding.
        missing: what a NaN norm (one that was not recorded) gives. "nan": a NaN factor, so that a sample whose length
            is not known cannot go into an update unseen. "zero": the sample is left out. "raise": a ValueError, for
            which the host waits for the device. A negative norm counts as missing, and so does an element of a tensor
            `max_norm` that is NaN or not above 0.

    Returns:
        [B], detached; float64 when `norms` is, else float32. A sample of norm 0 has factor 1. One of infinite norm has
        factor 0, which does not make its gradient finite: 0 times infinity is NaN.

    Raises:
        ValueError: an argument of another shape, dtype or range.

    >>> clip_factors(torch.tensor([0.0, 0.5, 4.0, float("nan")]), 1.0)
    tensor([1.0000, 1.0000, 0.2500,    nan])
    """
    check_choice("missing", missing, get_args(Missing))
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    norms = _checked(norms)
    bound = _bound(max_norm, norms)
    length = norms + eps
    factors = torch.where(length <= bound, 1.0, bound / length)  # also where length and bound are both infinite
    known = (norms >= 0) & (bound > 0)
    if missing == "raise" and not bool(known.all()):
        rows = (~known).nonzero().flatten().tolist()
        raise ValueError(
            f"norms: {len(rows)} of {len(norms)} samples have no norm, or no bound above 0 (the first is sample "
            f"{rows[0]}); leave them out with missing='zero', or see coverage() for why they were not recorded"
        )
    return torch.where(known, factors, 0.0 if missing == "zero" else torch.nan)


def automatic_clip_factors(norms: Tensor, max_norm: float | Tensor = 1.0, *, gamma: float = 0.01) -> Tensor:
    r"""Compute the factor per sample that normalises its gradient: :math:`C / (\|g_i\| + \gamma)`, the "automatic
    clipping" of Bu, Wang, Zha and Karypis 2022 (arXiv 2206.07136, AUTO-S).

    Every sample contributes less than `max_norm`, and short gradients are lengthened: factors may exceed 1. As for
    :func:`clip_factors`, lipcore is no privacy accountant.

    Args:
        norms: [B], :math:`\|g_i\|`, plain norms, not squared.
        max_norm: C > 0; a tensor of shape [] or [B] is possible. It only scales the learning rate of most optimizers.
        gamma: > 0; without it a sample of norm 0 would have an infinite factor.

    Returns:
        [B], detached; float64 when `norms` is, else float32. NaN where the norm is NaN or negative.

    >>> automatic_clip_factors(torch.tensor([0.0, 0.99]))
    tensor([100.,   1.])
    """
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma: expected a number > 0, got {gamma!r}")
    norms = _checked(norms)
    bound = _bound(max_norm, norms)
    return torch.where((norms >= 0) & (bound > 0), bound / (norms + gamma), torch.nan)


def _checked(norms: Tensor) -> Tensor:
    if not isinstance(norms, Tensor) or norms.dim() != 1 or not norms.is_floating_point():
        what = f"{norms.dtype} {list(norms.shape)}" if isinstance(norms, Tensor) else type(norms).__name__
        raise ValueError(f"norms: expected a floating-point tensor of shape [B], got {what}")
    return norms.detach().to(torch.promote_types(norms.dtype, torch.float32))


def _bound(max_norm: float | Tensor, norms: Tensor) -> Tensor:
    """Return `max_norm` as a tensor that broadcasts against the norms."""
    if not isinstance(max_norm, Tensor):
        if not max_norm > 0:
            raise ValueError(f"max_norm: expected a number > 0, got {max_norm!r}")
        return torch.full((), max_norm, dtype=norms.dtype, device=norms.device)  # no copy from the host
    if max_norm.shape not in ((), norms.shape) or not max_norm.is_floating_point():
        raise ValueError(
            f"max_norm: expected a number or a floating-point tensor of shape [] or {list(norms.shape)}, got "
            f"{max_norm.dtype} {list(max_norm.shape)}"
        )
    return max_norm.detach().to(norms.device, norms.dtype)
