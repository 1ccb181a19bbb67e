"""What is checked before lipcore runs a model of its own accord."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lipcore.models.arguments import check_count
from lipcore.models.names import named_modules, unwrap
from lipcore.models.torch_internals import AnyBatchNorm, AnyDropout

_MIXES = {
    True: "in train mode, which mixes samples; call model.eval()",
    False: (
        "without running statistics, which mixes samples in eval mode too; put GroupNorm or LayerNorm in its place, or "
        "train it with track_running_stats=True and call model.eval()"
    ),
}


def has_statistics(module: nn.Module) -> bool:
    """Return whether this BatchNorm keeps running statistics, by which it normalises in eval mode."""
    return getattr(module, "running_mean", None) is not None


def mixes_samples(module: nn.Module) -> bool:
    """Return whether this BatchNorm normalises by the statistics of the batch."""
    return module.training or not has_statistics(module)


def check_kind(model: nn.Module) -> None:
    """Raise a ValueError where the model, or a module in it, is of a kind that cannot be watched: a TorchScript module,
    whose calls no hook sees and whose parameters are in no dict of Python's, or a lazy one before its first call."""
    for name, module in named_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {f'module {name!r}' if name else 'it'} is a TorchScript module, whose calls no hook sees; use "
                "the Python module that it was made of. Without that, local_lipschitz(model, x) and "
                "Trajectory(model.named_parameters()) take it as it is"
            )
        for key, parameter in module._parameters.items():
            if parameter is not None and is_lazy(parameter):
                raise ValueError(
                    f"model: parameter '{f'{name}.{key}' if name else key}' is uninitialised, since its module is "
                    "lazy; run the model on one batch first, and make the optimizer after that"
                )


def never_called(model: nn.Module) -> str:
    """Say what to do where no backward pass came through the hooks of a model that is trained."""
    model = unwrap(model)
    named = [] if isinstance(model, (nn.Sequential, nn.ModuleList)) else list(model.named_children())
    inside = [f"'{name}'" for name, child in named if any(p.requires_grad for p in child.parameters())][:4]
    pass_one = f", or pass the module inside it that the loop calls ({', '.join(inside)}?)" if inside else ""
    return (
        "model: two optimizer steps were made, but no backward pass came through its hooks. Call the very object that "
        f"was passed as model, in grad mode{pass_one}: the training_step of a LightningModule calls a module inside; "
        "attach the Monitor to torch.compile's result, before its first call (or torch._dynamo.reset())"
    )


def check_model(model: nn.Module) -> None:
    """Raise ValueError where one sample's output depends on the others or on chance, or where there is nothing to
    run."""
    for name, module in named_modules(model):
        kind = type(module).__name__
        if isinstance(module, AnyBatchNorm) and mixes_samples(module):
            raise ValueError(f"model: module '{name}' is a {kind} {_MIXES[has_statistics(module)]}")
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
    if isinstance(module, AnyDropout):
        return module.p > 0
    return isinstance(module, nn.RReLU) or (
        isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
    )


def check_input(model: nn.Module, x: Any) -> None:
    """Raise TypeError or ValueError where x is no batch, or not where the model is."""
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
    check_count("batch_size", batch_size)


def finite_rows(values: Tensor) -> Tensor:
    """Return whether all entries of each row are finite, bool [N]."""
    return (
        torch.isfinite(values).reshape(len(values), -1).all(1)
        if values.numel()
        else values.new_ones(len(values), dtype=torch.bool)
    )


def check_rows(finite: Tensor, argument: str, what: str) -> None:
    """Raise ValueError naming the rows that are not finite."""
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(f"{argument}: {what} has NaN or infinity in {len(rows)} of {len(finite)} rows (row {shown})")
