"""Canonical names of modules and parameters, the same whether or not a model is compiled, checkpointed or wrapped."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from torch import nn

from lipcore.models.torch_internals import WRAPPER_ATTRIBUTES

# Lightning's Fabric keeps what it calls beside what it was given, often the same module twice.
_FABRIC = {"_forward_module", "_original_module"}


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return names for a message; of many the first, and how many there are beside."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more or "none"


def called_inside(model: nn.Module) -> nn.Module:
    """Return the module that Fabric's wrapper calls, whose outputs may be differentiated without Fabric; any other
    model as it is."""
    inside = model._modules
    if len(inside) != len(_FABRIC) or not all(name in inside for name in _FABRIC):
        return model
    return inside["_forward_module"] or model


def _is_wrapped(parent: nn.Module, attribute: str) -> bool:
    if attribute in WRAPPER_ATTRIBUTES:
        return True
    # `module` is an ordinary word, so it counts only where it is all a wrapper has.
    return attribute == "module" and len(parent._modules) == 1 and not parent._parameters


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's module inside torch.compile, DDP, FSDP, checkpoint, Fabric's and similar wrappers."""
    module = called_inside(module)
    while len(module._modules) == 1:
        attribute, child = next(iter(module._modules.items()))
        if child is None or not _is_wrapped(module, attribute) or isinstance(module, nn.Sequential):
            break
        module = child
    return module


def class_before_sharding(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, without the ones that fully_shard() and replicate() have made of it: their first base is
    one of torch.distributed's (FSDPModule, ReplicateModule, DDP), the second the class that was there."""
    kind = type(module)
    while len(kind.__bases__) == 2 and kind.__bases__[0].__module__.startswith("torch.distributed."):
        kind = kind.__bases__[1]
    return kind


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return (canonical name, module) of every module that is not a wrapper, each once, in registration order; the root
    is ''."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for attribute, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}.{attribute}" if name else attribute)

    return walk(model, "")


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the canonical names of parameters by their id(), the first one of what is shared; those that a wrapper
    itself holds by the name that torch gives them."""
    found: dict[int, str] = {}
    for name, module in named_modules(model):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), with_prefix(name, own))
    return {id(parameter): name for name, parameter in model.named_parameters()} | found


def with_prefix(prefix: str, name: str) -> str:
    """Return the name of what is in a part of a model, by that part's own name."""
    return f"{prefix}.{name}" if prefix else name


def find_module(model: nn.Module, name: str, argument: str) -> tuple[str, nn.Module]:
    """Return canonical name and module of what is called so (wrappers' prefixes in the name are accepted too)."""
    modules = dict(named_modules(model))
    parts = [part for part in name.split(".") if part not in WRAPPER_ATTRIBUTES | _FABRIC]
    for start in range(len(parts) + 1):  # "module.fc1" of a DDP model is "fc1" here
        candidate = ".".join(parts[start:])
        if candidate in modules and all(part == "module" for part in parts[:start]):
            return candidate, modules[candidate]
    close = [known for known in modules if known and known.split(".")[-1] == parts[-1]]
    close += difflib.get_close_matches(name, set(modules) - set(close))
    hint = f"; did you mean {', '.join(repr(c) for c in close[:3])}?" if close else "."
    known_names = ", ".join(repr(known) for known in list(modules)[1:9])
    raise ValueError(
        f"{argument}: the model has no module named {name!r}{hint} It has "
        f"{known_names}{', ...' if len(modules) > 9 else ''}"
    )
