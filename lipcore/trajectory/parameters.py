"""Which tensors a Trajectory watches, what they are called, and which group they add to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core
from lipcore.models.checks import check_kind
from lipcore.models.dtensors import local_of
from lipcore.models.names import named_modules
from lipcore.models.torch_internals import WRAPPER_ATTRIBUTES, shard_of
from lipcore.trajectory.groups import Groups, group_names

Model = nn.Module | Mapping[str, nn.Module] | Iterable[tuple[str, Tensor]]
Masters = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor | None]


@dataclass
class WatchedParameter:
    """One tensor that is watched: where it is looked up at every step, what it is called, which group it adds to."""

    owner: dict[str, Tensor]
    key: str
    name: str
    group: str
    shadow: Tensor | None = None  #: the parameter whose master copy this is
    prefix: str = ""  #: what stands before the model's own name for it

    @property
    def own_name(self) -> str:
        """Its name in the model."""
        return self.name[len(self.prefix) :]

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now (of a sharded one, this rank's shard); ValueError when it is not there any more."""
        tensor = self.owner.get(self.key)
        if tensor is None:
            raise ValueError(
                f"trajectory: parameter '{self.name}' was removed from its module; call rebind() after such a change"
            )
        return local_shard(tensor)

    @property
    def there(self) -> bool:
        """True until the tensor is removed from its module."""
        return self.owner.get(self.key) is not None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the parameter itself, where this is its master copy; None where it is not there any more."""
        tensor = self.owner.get(self.key)
        return None if tensor is None else (tensor if self.shadow is None else self.shadow).dtype


def local_shard(tensor: Any) -> Tensor:
    """Return this rank's shard of a DTensor; any other tensor as it is."""
    if type(tensor).__name__ != "DTensor":
        return tensor  # type: ignore[no-any-return]
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a DTensor with partial sums has no values of its own; redistribute it first")
    return local_of(tensor)


def piece_of(tensor: Any) -> str:
    """Return which part of a DTensor this rank holds, "[4, 5] at [4, 0] of [8, 5]"; "" for any other tensor."""
    if type(tensor).__name__ != "DTensor":
        return ""
    shape, offset = shard_of(tensor)
    return f"{list(shape)} at {list(offset)} of {list(tensor.shape)}"


def find_watched(model: Model, groups: Groups, masters: Masters | None, prefix: str = "") -> list[WatchedParameter]:
    """Return all trainable parameters of a module (or of a dict of modules), or the given (name, tensor) pairs;
    `prefix` stands before their names.

    Raises:
        TypeError, ValueError: the model, a group or a master copy is not usable; the message names it.
    """
    model = of_modules(model)
    name_group = group_names(groups)
    found = trainable(model) if isinstance(model, nn.Module) else _of_pairs(model)  # type: ignore[arg-type]
    if not found:
        raise ValueError("model: has no trainable parameter; a trajectory needs at least one with requires_grad=True")
    watched = [WatchedParameter(owner, key, name, "") for owner, key, name in found]
    if masters is not None:
        watched = _with_masters(watched, masters)
    for parameter in watched:
        parameter.prefix = f"{prefix}." if prefix else ""
        parameter.name = parameter.prefix + parameter.name
        parameter.group = _checked_group(name_group, parameter.name)
    if isinstance(groups, Mapping):
        unused = set(groups) - {parameter.group for parameter in watched}
        if unused:
            raise ValueError(
                f"groups: the expression of {sorted(unused)[0]!r} matches no trainable parameter (the first that "
                f"matches counts); names are like {watched[0].name!r}"
            )
    _check(watched)
    return watched


def of_modules(model: Model) -> Model:
    """Return a dict of modules as one module, any other model as it is."""
    if isinstance(model, Mapping) and model and all(isinstance(module, nn.Module) for module in model.values()):
        return nn.ModuleDict(model)
    return model


def trainable(model: nn.Module) -> list[tuple[dict[str, Tensor], str, str]]:
    """Return owner, key and name of every trainable parameter; a tied one comes once, under its first name."""
    check_kind(model)
    found, seen = [], set()
    for prefix, module in named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue  # a tied parameter moves once
            seen.add(id(parameter))
            found.append((module._parameters, key, f"{prefix}.{key}" if prefix else key))
    return found  # type: ignore[return-value]


def _of_pairs(pairs: Iterable[tuple[str, Tensor]]) -> list[tuple[dict[str, Tensor], str, str]]:
    owner: dict[str, Tensor] = {}
    try:
        named = [(name, tensor) for name, tensor in pairs]
    except (TypeError, ValueError):
        raise TypeError(
            f"model: expected a module, a dict of modules or an iterable of (name, tensor), got {type(pairs).__name__}"
        ) from None
    for name, tensor in named:
        if not isinstance(name, str) or not name or name in owner:
            raise ValueError(f"model: expected different, non-empty names, got {name!r}")
        owner[name] = tensor
    return [(owner, name, name) for name in owner]


def _checked_group(name_group: Callable[[str], str], name: str) -> str:
    group = name_group(name)
    if not isinstance(group, str) or not group:
        raise ValueError(f"groups: expected a non-empty group name for {name!r}, got {group!r}")
    return group


def _with_masters(watched: list[WatchedParameter], masters: Masters) -> list[WatchedParameter]:
    if callable(masters):
        given = {parameter.name: masters(parameter.name, parameter.tensor) for parameter in watched}
        owner: dict[str, Tensor] = {name: master for name, master in given.items() if master is not None}
    else:
        # A dict is looked up at every step, so that a copy replaced in it is seen.
        owner = masters if isinstance(masters, dict) else dict(masters)
    unknown = set(owner) - {parameter.name for parameter in watched}
    if unknown:
        raise ValueError(
            f"masters: there is no trainable parameter {sorted(unknown)[0]!r}; names are like {watched[0].name!r}"
        )
    out = []
    for parameter in watched:
        master = owner.get(parameter.name)
        if master is not None and (not isinstance(master, Tensor) or master.shape != parameter.tensor.shape):
            what = list(master.shape) if isinstance(master, Tensor) else type(master).__name__
            raise ValueError(
                f"masters: expected a tensor of shape {list(parameter.tensor.shape)} for '{parameter.name}', got {what}"
            )
        out.append(
            parameter
            if master is None
            else WatchedParameter(owner, parameter.name, parameter.name, parameter.group, parameter.tensor)
        )
    return out


def _check(watched: list[WatchedParameter]) -> None:
    for parameter in watched:
        _core.check_storage(
            local_shard(parameter.owner[parameter.key]), parameter.name
        )  # says what is wrong with a lazy, meta or sharded parameter
        if not _is_finite(parameter.tensor.detach()):
            raise ValueError(
                f"model: parameter '{parameter.name}' has NaN or infinite values, so nothing can be measured from it"
            )
    devices = {parameter.tensor.device for parameter in watched}
    if len(devices) > 1:
        raise ValueError(
            f"model: parameters on several devices ({', '.join(sorted(map(str, devices)))}); make one Trajectory per "
            "device from (name, tensor) pairs"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, without a mask as large as the tensor where that can be had."""
    if not tensor.is_cpu or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return bool(tensor.isfinite().all())
    sums = torch.empty(1, _core.STEP_COLUMNS, dtype=torch.float64, device="cpu")
    _core.square_sums([tensor], sums)
    return bool(sums[0, 4] == 0) if sums[0, 0].isfinite() else bool(tensor.isfinite().all())


def values_of(source: nn.Module | Mapping[str, Any], watched: list[WatchedParameter], argument: str) -> list[Tensor]:
    """Return every watched parameter's values in another model or state_dict, in its own dtype, whatever wrappers'
    prefixes the names have."""
    if isinstance(source, nn.Module):
        named = {f"{prefix}.{key}" if prefix else key: p for prefix, m in named_modules(source)
                 for key, p in m._parameters.items() if p is not None}  # fmt: skip
    elif isinstance(source, Mapping):
        named = {
            ".".join(w for w in name.split(".") if w not in WRAPPER_ATTRIBUTES): value for name, value in source.items()
        }
    else:
        raise TypeError(f"{argument}: expected a module or a state_dict, got {type(source).__name__}")
    values = []
    for parameter in watched:
        value = named.get(parameter.own_name, named.get(f"module.{parameter.own_name}"))
        if not isinstance(value, Tensor):
            raise ValueError(f"{argument}: has no tensor for parameter '{parameter.name}'")
        if value.shape != parameter.tensor.shape:
            raise ValueError(
                f"{argument}: '{parameter.name}' has shape {list(value.shape)}, expected {list(parameter.tensor.shape)}"
            )
        values.append(value.detach().to(device=parameter.tensor.device, dtype=parameter.tensor.dtype))
        if not _is_finite(values[-1]):
            raise ValueError(
                f"{argument}: '{parameter.name}' has values that are not finite in {parameter.tensor.dtype}"
            )
    return values
