"""Sums over the updates of parameters that are looked up by name, with what is wrong said of these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lipcore import _core, functional
from lipcore.functional.update_rules import UpdateRule
from lipcore.trajectory.closed_forms import Move
from lipcore.trajectory.parameters import local_shard

Parameter = tuple[str, dict[str, Any], str]  #: name, owner's dict, key: looked up at every step
Sums = tuple[Tensor, Tensor]  #: rows, float64 [n, 5], and squares, float64 [5, n]


def look_up(parameters: Sequence[Parameter]) -> list[Tensor]:
    tensors = []
    for name, owner, key in parameters:
        tensor = owner.get(key)
        if tensor is None:
            raise ValueError(f"trajectory: parameter {name!r} was removed from its module; make this metric anew")
        tensors.append(tensor)
    return tensors


def refuse_twins(parameters: Sequence[Parameter], tensors: Sequence[Tensor]) -> None:
    seen: dict[int, str] = {}
    for (name, _, _), tensor in zip(parameters, tensors, strict=True):
        if id(tensor) in seen:
            raise ValueError(f"parameters: {seen[id(tensor)]!r} and {name!r} are one tensor (tied); list it once")
        seen[id(tensor)] = name


class Asked(NamedTuple):
    """Tensors that are read for squares which only some ask for."""

    gradients: Sequence[Tensor | None] | None = None
    previous: Sequence[Tensor] | None = None


def sums_of(
    names: Sequence[str],
    params: list[Tensor],
    moves: Sequence[Move],
    out: Sums | None = None,
    asked: Asked | None = None,
) -> Sums:
    gradients, previous = asked or Asked()
    params = [local_shard(tensor) for tensor in params]  # of a sharded parameter, what this rank has of it
    first, second = ([None if m[i] is None else local_shard(m[i]) for m in moves] for i in range(2))
    if gradients is not None:
        gradients = [None if g is None else local_shard(g.resolve_neg()) for g in gradients]
    rules: list[UpdateRule] = [move[2] for move in moves]
    if out is not None:
        try:
            _core.update_sums(params, first, second, rules, *out, gradients, previous)
            return out
        except (TypeError, ValueError):
            pass  # a layout that has to be copied; what is wrong for good is said below
    try:
        rows, squares = functional.update_sums(params, first, second, rules, gradients=gradients, previous=previous)
    except (TypeError, ValueError) as error:
        raise type(error)(_in_words(str(error), names)) from None
    if out is None:
        return rows, squares
    out[0].copy_(rows)
    out[1].copy_(squares)
    return out


def _in_words(message: str, names: Sequence[str]) -> str:
    """Turn the message about an argument of the op into one about the parameter."""
    found = re.match(r"(params|first|second|rules|gradients|previous)\[(\d+)\]: ", message)
    if not found:
        return f"trajectory: {message}"
    tensor = {"params": "", "first": ": its gradient, momentum or update", "second": ": its second state", "rules": ""}
    tensor |= {"gradients": ": its gradient", "previous": ": its value before the step"}
    what = message[found.end() :]
    return f"trajectory: parameter {names[int(found.group(2))]!r}{tensor[found.group(1)]} {what}"
