"""Weighted sums of single samples' gradients, from the factors that one backward pass has left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.kept_factors import RELEASED, KeptFactors
from lipcore.models.ranks import world_size
from lipcore.per_sample.pass_norms import PassNorms

#: c [B], or what takes the norms [B] to them.
Coefficients = Tensor | Callable[[Tensor], Tensor]


def usable_factors(norms: PassNorms, asked: str) -> KeptFactors | None:
    """Return the factors of a pass, None where it was not recorded.

    Args:
        norms: those of the pass.
        asked: what they are for, as the user called it.

    Raises:
        RuntimeError: they were released, or written into.
    """
    factors = norms.record.factors
    if factors is None:
        return None
    if factors.released:
        raise RuntimeError(f"{asked}: {RELEASED}; call it between backward() and that")
    if name := factors.changed():
        raise RuntimeError(
            f"{asked}: what the gradients of parameter '{name}' are made of was changed in place after the backward "
            "pass (the model's input, filled anew?); call it before that, or give the model a copy"
        )
    return factors


def coefficients_of(given: Any, norms: PassNorms) -> Tensor:
    """Return the coefficients of a pass's samples, float64 [B]; of a mask 1 and 0.

    Raises:
        TypeError, ValueError: no tensor, or one of another shape, kind or device.
    """
    per_sample = norms.per_sample
    found = given(per_sample) if callable(given) and not isinstance(given, Tensor) else given
    said = "coefficients" if found is given else "coefficients: the function's result"
    shape, device = [norms.samples], per_sample.device
    expected = f"expected a floating-point tensor of shape {shape} on {device}, or such a mask of bool"
    if not isinstance(found, Tensor):
        raise TypeError(f"{said}: {expected}, or a function of the norms that returns it; got {type(found).__name__}")
    if found.shape != per_sample.shape or not (found.is_floating_point() or found.dtype == torch.bool):
        raise ValueError(f"{said}: {expected}, got {found.dtype} {list(found.shape)}; give one number per sample")
    if found.device != per_sample.device:
        raise ValueError(f"{said}: {expected}, got one on {found.device}; move it with .to({str(per_sample.device)!r})")
    return found.detach().double()


def weighted_sums(norms: PassNorms, coefficients: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return f * sum_i c_i g_i by parameter, with the pass's loss factor f; NaN where a sample with c_i other than 0
    has no number, or the pass has none. Parameters that no gradient came to are left out.

    Args:
        norms: those of the pass.
        coefficients: c, float64 [B].
        parameters: those that are measured.
    """
    record, found = norms.record, dict[str, Tensor]()
    factors = usable_factors(norms, "weighted_sum")
    if record.broken or factors is None:
        return {name: torch.full_like(p, torch.nan, dtype=_dtype(p)).detach() for name, p in parameters.items()}
    scaled = coefficients * norms.factor.value
    with torch.no_grad(), torch.autocast(coefficients.device.type, enabled=False):
        for name, parameter in parameters.items():
            if name not in factors or name not in record.norms_sq:
                continue
            if norms.samples:
                missing = record.norms_sq[name].isnan() & (coefficients != 0)
                total = factors[name].weighted_sum(scaled.masked_fill(missing, torch.nan))
            else:
                total = torch.zeros_like(parameter)
            found[name] = total.to(_dtype(parameter))
    return found


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def add_into(sums: Any, more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add sums to those of earlier micro-batches, in place.

    Raises:
        TypeError, ValueError: `into` is no dict, or has other tensors than sums of these parameters; nothing is added.
    """
    if not isinstance(sums, dict):
        raise TypeError(f"into: expected what weighted_sum() has returned, or an empty dict, got {type(sums).__name__}")
    for name, total in more.items():
        there = sums.get(name, total)
        if not isinstance(there, Tensor) or (there.shape, there.device) != (total.shape, total.device):
            what = f"{list(there.shape)} on {there.device}" if isinstance(there, Tensor) else type(there).__name__
            raise ValueError(
                f"into[{name!r}]: expected a tensor of shape {list(total.shape)} on {total.device}, got {what}; pass "
                "what weighted_sum() has returned, or an empty dict"
            )
    for name, total in more.items():
        if name in sums:
            sums[name] += total
        else:
            sums[name] = total
    return sums


def check_set_grad(coverage: ParameterCoverage, broken: str, scaler: Any) -> None:
    """Raise where gradients cannot all be replaced by sums: RuntimeError for a pass that was not recorded, several
    ranks or an enabled GradScaler, ValueError for parameters that are not measured."""
    if broken:
        raise RuntimeError(f"set_grad: the last backward pass has no sums ({broken}); every .grad stays as it is")
    trained = [name for name, p in coverage.parameters() if p.requires_grad and name not in coverage.covered]
    if trained:
        raise ValueError(
            f"set_grad: {len(trained)} trained parameters are not measured and would keep the plain gradient "
            f"({', '.join(map(repr, trained[:5]))}); freeze them, or assign what weighted_sum() returns yourself"
        )
    if scaler is not None and scaler.is_enabled():
        raise RuntimeError(
            "set_grad: the sums are without the GradScaler's scale, which its step() would divide them by once more; "
            "assign what weighted_sum() returns times scaler.get_scale(), or step the optimizer itself"
        )
    if world_size() > 1:
        raise RuntimeError(
            "set_grad: the sums are those of this rank's samples; all_reduce what weighted_sum() returns, and assign "
            "that to .grad"
        )


def set_gradients(coverage: ParameterCoverage, sums: Mapping[str, Tensor]) -> None:
    """Make copies of the sums the gradients of all trained parameters; None where there is no sum."""
    for name, parameter in coverage.parameters():
        if parameter.requires_grad:
            total = sums.get(name)
            parameter.grad = None if total is None else total.to(parameter.dtype, copy=True)
