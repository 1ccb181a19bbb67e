"""The optimizer of a loop, what is inside it, and what steps it: found, and refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lipcore.models.chains import is_own
from lipcore.models.torch_internals import first_step_hook

_DEEPEST = 4  # wrappers around wrappers
_MOST = 64  # entries of a list in which optimizers are looked for
# Trainers, whose wrappers pass step() on, or leave it out.
_PASSING_ON = ("accelerate.", "lightning.", "lightning_fabric.", "pytorch_lightning.")

_SCALED_STEP = torch.amp.GradScaler.step.__code__


def checked_optimizers(given: Any) -> list[Any]:
    """Return the optimizers of an argument that is one, several or None.

    Raises:
        TypeError: one of them has no step() and param_groups, or is a learning rate scheduler.
    """
    several = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for one in several:
        if isinstance(one, LRScheduler) or (hasattr(one, "get_last_lr") and not hasattr(one, "param_groups")):
            where = "optimizers" if not hasattr(one, "optimizer") and hasattr(one, "optimizers") else "optimizer"
            raise TypeError(
                f"optimizer: {type(one).__name__} is a learning rate scheduler; pass the optimizer that it drives "
                f"(scheduler.{where})"
            )
        if not _is_optimizer(one):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer (or a sequence of them), got {type(one).__name__}; a "
                "wrapper of your own needs step() and param_groups"
            )
    return several


def _is_optimizer(thing: Any) -> bool:
    """Return whether a loop could call its step(): it need not be a torch.optim.Optimizer."""
    if isinstance(thing, Optimizer):
        return True
    return not isinstance(thing, type) and callable(getattr(thing, "step", None)) and hasattr(thing, "param_groups")


def has_hooks(optimizer: Any) -> bool:
    """Return whether torch calls hooks around its step: not where Optimizer.__init__ was never called."""
    return isinstance(optimizer, Optimizer) and "_optimizer_step_post_hooks" in vars(optimizer)


def hooked_before(optimizer: Any) -> bool:
    """Return whether a hook of the user's is called at the end of its step before any of lipcore's: it may have changed
    gradients or settings that the step was made with."""
    first = first_step_hook(optimizer) if has_hooks(optimizer) else None
    return first is not None and not is_own(first)


def scaler_inside(optimizers: Sequence[Any]) -> Any:
    """Return the GradScaler with which a trainer's wrapper steps (accelerate's, Lightning's), if it has one."""
    for optimizer in optimizers:
        strategy = getattr(optimizer, "_strategy", None)
        for holder in (optimizer, *(getattr(strategy, name, None) for name in ("precision_plugin", "precision"))):
            scaler = getattr(holder, "__dict__", {}).get("scaler")
            if isinstance(scaler, torch.amp.GradScaler):
                return scaler
    return None


def scaler_above() -> bool:
    """Return whether an enabled GradScaler is making the step from which this is called. Nothing else says so: a scaler
    leaves no mark on an optimizer."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _SCALED_STEP:
            return bool(frame.f_locals["self"].is_enabled())
        frame = frame.f_back
    return False


def optimizers_inside(wrapper: Any, depth: int = _DEEPEST) -> list[Optimizer]:
    """Return torch's optimizers that a wrapper keeps in its attributes (Lookahead, SAM, accelerate, schedule-free,
    ZeRO), innermost ones where these are wrappers too, each once."""
    found: dict[int, Optimizer] = {}
    if _is_plain(wrapper):
        return []
    for value in _kept(wrapper):
        if value is wrapper or not _is_optimizer(value):
            continue
        deeper = optimizers_inside(value, depth - 1) if depth > 1 else []
        for optimizer in deeper or ([value] if has_hooks(value) else []):
            found[id(optimizer)] = optimizer
    return list(found.values())


def _kept(wrapper: Any) -> Iterator[Any]:
    for value in list(getattr(wrapper, "__dict__", {}).values()):
        if isinstance(value, (list, tuple)):
            yield from value[:_MOST]
        elif isinstance(value, Mapping) and len(value) <= _MOST:
            yield from value.values()
        else:
            yield value


def _is_plain(optimizer: Any) -> bool:
    """Return whether it is one of torch's own optimizers, which keep none inside."""
    return has_hooks(optimizer) and type(optimizer).__module__.startswith("torch.optim.")


def refuse_strangers(optimizers: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise a ValueError where an optimizer updates nothing of the model: neither its parameters nor float32 copies of
    half-precision ones.

    Args:
        named: the model's parameters by name.
    """
    own = {id(parameter) for parameter in named.values()}
    shapes = {parameter.shape for parameter in named.values() if parameter.dtype.itemsize < 4}
    for optimizer in optimizers:
        updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if own and updated and not any(id(p) in own or p.shape in shapes for p in updated):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} updates {len(updated)} tensors, none of which is a parameter "
                "of the model; pass the optimizer of this very model, made after its parameters got their final form "
                "(to(), wrappers, sharding)"
            )


def updating(given: Sequence[Any]) -> list[Optimizer]:
    """Return the optimizers whose own state says what a step does: none of a wrapper that changes it."""
    found: list[Optimizer] = []
    for one in given:
        inside = optimizers_inside(one)
        if has_hooks(one) and not inside:
            found.append(one)
        elif type(one).__module__.startswith(_PASSING_ON):
            found += inside
    return found
