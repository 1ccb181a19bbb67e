"""Which rule serves which type of module."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn
from torch.nn.utils import parametrize

from lipcore.layers.rule import Rule
from lipcore.models.tensor_parallel import runs_in_parts

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
    if is_replaced(module) or parametrize.is_parametrized(module):
        return None
    base = type_with_rule(module)
    return None if base is None or _redefined(type(module), base) else _rules[base]


def is_replaced(module: nn.Module) -> bool:
    """Return whether another function stands in the place of the module's forward, which may compute something else."""
    return "forward" in vars(module) and not runs_in_parts(module)


def type_with_rule(module: nn.Module) -> type[nn.Module] | None:
    """Return the module's type, or its nearest base class, that has a rule; None where there is none."""
    return next((base for base in type(module).__mro__ if base in _rules), None)


def why_no_rule(module: nn.Module) -> str:
    """Say why no rule serves this module, and what makes one serve it where a base class has one."""
    kind, base = type(module), type_with_rule(module)
    name = kind.__name__
    if base is None:
        return f"there is no rule for {name}" + ", whose forward() was replaced on the object" * is_replaced(module)
    if is_replaced(module):
        return (
            f"the forward() of this {name} was replaced on the object, and may compute something else than the rule "
            f"of {base.__name__} knows; `del module.forward` where the class's own will do, or write a class with a "
            "rule of its own"
        )
    new = ", ".join(f"{method}()" for method in sorted(_redefined(kind, base)))
    return (
        f"there is no rule for {kind.__module__}.{kind.__qualname__}, a subclass of {base.__name__} with its own "
        f"{new}, which may compute something else. Where it computes the same, "
        f"lipcore.layers.register({name}, lipcore.layers.registered()[{base.__name__}]) says so, and the first passes "
        "check it against autograd"
    )


def _redefined(kind: type, base: type[nn.Module]) -> set[str]:
    """Return the methods that a subclass, or a class between the two, defines anew and that the base's forward might
    use."""
    inherited = {name for cls in base.__mro__[: base.__mro__.index(nn.Module)] for name in vars(cls)} | {"__call__"}
    between = kind.__mro__[: kind.__mro__.index(base)]
    new = {n for cls in between for n, value in vars(cls).items() if callable(value) or isinstance(value, property)}
    return new & inherited - _HARMLESS
