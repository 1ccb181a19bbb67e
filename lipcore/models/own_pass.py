"""What is checked before lipcore runs a model of its own accord, and what is put back afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.models.chains import first_of_chain
from lipcore.models.pause import paused
from lipcore.models.restored import all_put_back


@contextmanager
def own_pass(model: nn.Module) -> Iterator[None]:
    """Run a pass, with gradients, that training does not notice: no metric records it, and what it changes gets its
    value back when it ends: buffers (spectral_norm's vectors, InstanceNorm's running statistics, counters), parameters
    that it writes into, what modules hold, and the state of the random numbers, whose use is refused.

    Running in eval mode instead would measure another function where spectral_norm is in train mode. Autocast is off:
    it rounds, and the weights it has cached may be older than the last step.
    """
    with (
        all_put_back(model),
        without_autocast(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        paused(),
    ):
        yield


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Turn autocast off, on the CPU and where the model is, and its cache in regions that the model opens itself."""
    kinds = {"cpu", *(p.device.type for p in model.parameters() if p.device.type != "meta")}
    with ExitStack() as stack:
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        yield


def run(model: nn.Module, x: Tensor) -> Any:
    """Return model(x); where torch stumbled over x's dtype or width, raise an error in words that name it."""
    with misfit_in_words(model, x):
        return model(x)


@contextmanager
def misfit_in_words(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Turn torch's error, around a pass of x, into a ValueError about x where its dtype or its width is the cause."""
    try:
        yield
    except RuntimeError as error:
        reason = _other_dtype(model, x, str(error)) or _other_width(model, x)
        if not reason:
            raise
        raise ValueError(reason) from error


def _other_dtype(model: nn.Module, x: Tensor, error: str) -> str:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not dtypes or x.dtype in dtypes or not re.search("dtype|scalar type|Input type", error):
        return ""
    wanted = ", ".join(sorted(map(str, dtypes)))
    return f"x: its dtype is {x.dtype}, but the model's parameters are {wanted}; pass x.to(<that dtype>)"


def _other_width(model: nn.Module, x: Tensor) -> str:
    """Return what to say of the width of x, where the first layer is known: that of a plain chain."""
    name, layer = first_of_chain(model) or ("", None)
    if isinstance(layer, nn.Linear):
        expected, fits = f"[N, ..., {layer.in_features}]", x.dim() > 1 and x.shape[-1] == layer.in_features
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        expected = f"[N, {layer.in_channels}, {', '.join('DHW'[-len(layer.kernel_size) :])}]"
        fits = x.dim() == 2 + len(layer.kernel_size) and x.shape[1] == layer.in_channels
    else:
        return ""
    return "" if fits else f"x: expected shape {expected} for module '{name}', {layer}, got {list(x.shape)}"


def fresh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of x to differentiate by, and what the model is given: no leaf, so that it may work in place."""
    point = x.detach().clone().requires_grad_(x.is_floating_point())
    return point, point.clone()
