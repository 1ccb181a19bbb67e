"""Which rule serves which type of module."""

from __future__ import annotations

from typing import Any

from torch import nn

from lipcore.layers.rule import Rule

_rules: dict[type[nn.Module], Rule] = {}


def register(kind: type[nn.Module], rule: Rule, *, replace: bool = False) -> None:
    """Let `rule` give the per-sample gradients of modules of this type, and of subclasses that keep its forward.

    Args:
        kind: the type of module.
        rule: an object of a subclass of :class:`Rule`.
        replace: also when the type has a rule already.

    Raises:
        TypeError: not a type of module, or not a rule.
        ValueError: the type has a rule already.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind: expected a subclass of torch.nn.Module, got {kind!r}")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected an object of a subclass of lipcore.layers.Rule, got {rule!r}")
    if kind in _rules and not replace:
        raise ValueError(f"kind: {kind.__name__} has a rule already; pass replace=True to replace it")
    _rules[kind] = rule


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the module's type; None also for a subclass that computes something else in its forward()."""
    kind: Any = type(module)
    for base in kind.__mro__:
        rule = _rules.get(base)
        if rule is not None:
            return rule if kind.forward is base.forward else None
    return None
