"""Which rule serves which type of module."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn
from torch.nn.utils import parametrize

from lipcore.layers.rule import Rule

_rules: dict[type[nn.Module], Rule] = {}
# What a subclass may define anew without changing what the layer computes.
_HARMLESS = {"__init__", "reset_parameters", "_reset_parameters", "extra_repr", "_get_name"}


def register(module_type: type[nn.Module], rule: Rule, *, replace: bool = False) -> None:
    """Let `rule` measure modules of that type, and of its subclasses that compute the same.

    Args:
        module_type: a subclass of torch.nn.Module.
        rule: an object of a subclass of :class:`lipcore.layers.Rule`; it serves all modules of the type.
        replace: the type has a rule, and this one is to take its place.

    Raises:
        TypeError: module_type is no such class, or rule no such object.
        ValueError: the type has a rule already, and replace is False.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)) or module_type is nn.Module:
        raise TypeError(f"module_type: expected a subclass of torch.nn.Module, got {module_type!r}; pass the class")
    if not isinstance(rule, Rule):
        hint = "; pass an object of it" if isinstance(rule, type) else ""
        raise TypeError(f"rule: expected an object of a subclass of lipcore.layers.Rule, got {rule!r}{hint}")
    if module_type in _rules and not replace:
        raise ValueError(
            f"module_type: {module_type.__qualname__} already has the rule {type(_rules[module_type]).__qualname__}; "
            "pass replace=True to put this one in its place"
        )
    _rules[module_type] = rule


def registered() -> Mapping[type[nn.Module], Rule]:
    """Return all types that have a rule; a live view that cannot be written to."""
    return MappingProxyType(_rules)


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule of the module's type, or of the nearest base class if the module computes exactly what that does.

    None where a subclass overrides forward or a method that forward uses, where forward was replaced on the object,
    and where a parametrization makes another tensor of the parameter than the one that is trained.
    """
    if "forward" in vars(module) or parametrize.is_parametrized(module):
        return None
    mro = type(module).__mro__
    for depth, base in enumerate(mro):
        if base in _rules:
            return None if any(_changes(subclass, base) for subclass in mro[:depth]) else _rules[base]
    return None


def _changes(subclass: type, base: type[nn.Module]) -> bool:
    """Return whether the subclass defines a method anew that the base's forward might use."""
    inherited = {name for cls in base.__mro__[: base.__mro__.index(nn.Module)] for name in vars(cls)} | {"__call__"}
    new = {name for name, value in vars(subclass).items() if callable(value) or isinstance(value, property)}
    return bool(new & inherited - _HARMLESS)
