"""What is checked before lipcore runs a model of its own accord, and what is put back afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lipcore.capture import paused
from lipcore.capture.first_layer import first_of_chain
from lipcore.names import named_modules
from lipcore.put_back import buffers_put_back, random_numbers_put_back


def mixes_samples(module: nn.Module) -> bool:
    """Whether this BatchNorm normalises by the statistics of the batch."""
    return module.training or getattr(module, "running_mean", None) is None


def check_model(model: nn.Module) -> None:
    """ValueError where one sample's output depends on the others or on chance, or where there is nothing to run."""
    for name, module in named_modules(model):
        kind = type(module).__name__
        if isinstance(module, _BatchNorm) and mixes_samples(module):
            mode = "in train mode" if module.training else "without running statistics"
            raise ValueError(f"model: module '{name}' is a {kind} {mode}, which mixes samples; call model.eval()")
        if module.training and _draws(module):
            raise ValueError(
                f"model: module '{name}' is a {kind} in train mode, whose output is random; call model.eval()"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            raise ValueError(
                f"model: '{name}' was made under torch.inference_mode, so no gradient passes through it; build or load "
                "the model outside"
            )


def _draws(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RReLU) or (
        isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
    )


def check_input(model: nn.Module, x: Any) -> None:
    """TypeError or ValueError where x is no batch, or not where the model is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.dim():
        raise ValueError("x: expected shape [B, ...], got a 0-dimensional tensor")
    if x.is_meta:
        raise ValueError("x: it is on the meta device and has no data; pass a tensor with data")
    places: dict[torch.device, str] = {}
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            places.setdefault(tensor.device, f"{kind} '{name}'")
    # A model spread over devices takes its inputs on any one of them.
    if places and x.device not in places:
        device, name = next(iter(places.items()))
        remedy = "give the model its data first" if device.type == "meta" else "move one"
        raise ValueError(f"x: it is on {x.device}, but {name} of the model is on {device}; {remedy}")
    meta = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if meta:
        raise ValueError(f"model: parameter '{meta[0]}' is on the meta device and has no data; give it data first")


def check_batch_size(batch_size: Any) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")


def finite_rows(values: Tensor) -> Tensor:
    """bool [N]: all entries of the row are finite."""
    return (
        torch.isfinite(values).reshape(len(values), -1).all(1)
        if values.numel()
        else values.new_ones(len(values), dtype=torch.bool)
    )


def check_rows(finite: Tensor, argument: str, what: str) -> None:
    """ValueError that names the rows which are not finite."""
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(f"{argument}: {what} has NaN or infinity in {len(rows)} of {len(finite)} rows (row {shown})")


@contextmanager
def own_pass(model: nn.Module) -> Iterator[None]:
    """A pass, with gradients, that training does not notice: no metric records it, and what it changes gets its value
    back when it ends: buffers (spectral_norm's vectors, InstanceNorm's running statistics, counters) and the state of
    the random numbers, whose use is refused.

    Running in eval mode instead would measure another function where spectral_norm is in train mode. Autocast is off:
    it rounds, and the weights it has cached may be older than the last step.
    """
    with (
        random_numbers_put_back(model),
        buffers_put_back(model),
        without_autocast(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        paused(),
    ):
        yield


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Off on the CPU and where the model is, and without its cache in regions that the model opens itself."""
    kinds = {"cpu", *(p.device.type for p in model.parameters() if p.device.type != "meta")}
    with ExitStack() as stack:
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        yield


def run(model: nn.Module, x: Tensor) -> Any:
    """model(x); where torch stumbled over x's dtype or width, words that name it."""
    with misfit_in_words(model, x):
        return model(x)


@contextmanager
def misfit_in_words(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Around a pass of x: torch's error becomes a ValueError about x where its dtype or its width is the cause."""
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
    """Where the first layer is known: that of a plain chain."""
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
    """A copy of x to differentiate by, and what the model is given: no leaf, so that it may work in place."""
    point = x.detach().clone().requires_grad_(x.is_floating_point())
    return point, point.clone()
