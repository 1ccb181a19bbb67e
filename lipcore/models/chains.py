"""Models whose modules run one after the other, and nothing else."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lipcore.models.names import class_before_sharding, named_modules, unwrap
from lipcore.models.torch_internals import ANY_FORWARD_HOOKS, ANY_FORWARD_PRE_HOOKS

_SHARDING = ("torch.distributed.fsdp._fully_shard", "torch.distributed._composable.replicate_with_fsdp")


def modules_in_order(model: nn.Module, *, parametrized: bool = False, sharded: bool = False) -> list[nn.Module] | None:
    """Return the modules of nested nn.Sequentials of torch's own layers, parametrized and fully_shard()ed ones too
    where they are wanted; None where there is other wiring, or may be: in a hook."""
    if _global_hooks() or _altered(model, sharded=sharded):
        return None
    model = unwrap(model)
    if _altered(model, sharded=sharded):
        return None
    kind, inside = class_before_sharding(model) if sharded else type(model), list(model._modules)
    if kind is nn.Sequential:
        each = [modules_in_order(m, parametrized=parametrized, sharded=sharded)
                for m in model._modules.values() if m is not None]  # fmt: skip
        parts = [part for part in each if part is not None]
        return None if len(parts) < len(each) else [m for part in parts for m in part]
    if parametrized and parametrize.is_parametrized(model) and inside == ["parametrizations"]:
        kind, inside = kind.__mro__[1], []  # the layer's own class is the first base of the one that torch made
    return [model] if kind.__module__.startswith("torch.nn.modules") and not inside else None


def altered_modules(model: nn.Module) -> dict[str, list[Any]]:
    """Return the modules that may return something else than their class does, in words, and why: their hooks, or the
    function in the place of forward."""
    found = {
        "every module": _global_hooks(),
        "the model's wrapper": _altered(model) if unwrap(model) is not model else [],
    }
    found |= {f"module '{name}'" if name else "the model": _altered(module) for name, module in named_modules(model)}
    return {where: hooks for where, hooks in found.items() if hooks}


def _altered(module: nn.Module, *, sharded: bool = False) -> list[Any]:
    instead = [vars(module)["forward"]] if "forward" in vars(module) else []
    return [*instead, *(hook for hook in foreign_hooks(module) if not (sharded and is_of_sharding(hook)))]


def foreign_hooks(module: nn.Module) -> list[Any]:
    """Return hooks on its forward pass that may change inputs, outputs and weights (the old weight_norm, pruning): only
    lipcore's are known not to."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if not is_own(hook)]


def _global_hooks() -> list[Any]:
    return [*ANY_FORWARD_PRE_HOOKS.values(), *ANY_FORWARD_HOOKS.values()]


def home_of(hook: Any) -> str:
    """Return the module of Python in which a hook was defined."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", hook)
    return str(getattr(owner, "__module__", None) or type(owner).__module__)


def is_of_sharding(hook: Any) -> bool:
    """Return whether a hook is one of fully_shard()'s, or of the replicate() that is made of it: it gathers parameters,
    casts what comes in and goes out, and changes no more."""
    return home_of(hook).startswith(_SHARDING)


def is_own(hook: Any) -> bool:
    """Return whether a hook is one of lipcore's."""
    return home_of(hook).split(".")[0] == "lipcore"


def chain_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of every leaf of a plain nn.Sequential (nested ones too) in the order they run; else
    nothing."""
    if type(model) is not nn.Sequential:
        return []
    chain: list[tuple[str, nn.Module]] = []
    for name, module in model._modules.items():
        if type(module) is nn.Sequential:
            chain += [(f"{name}.{inner}", leaf) for inner, leaf in chain_of(module)]
        elif module is not None:
            chain.append((name, module))
    return chain


FIRST_LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def first_of_chain(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return name and module of the first layer, where a plain chain begins with it."""
    chain = chain_of(unwrap(model))
    return chain[0] if chain and isinstance(chain[0][1], FIRST_LAYER_TYPES) else None
