"""What models are given and return, part by part: torch's containers, and dataclasses and mappings, which torch takes
for single things."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from lipcore.models.torch_internals import tree_leaves, tree_map

#: Kinds of things that have no parts.
WHOLE = (Tensor, type(None), bool, int, float, str)


def leaves_of(value: Any, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """Yield what is in tuples, lists, dicts, mappings and dataclasses, within each other too; `within`: ids of those
    around it, which are not gone into again."""
    for leaf in tree_leaves(value):
        parts = parts_of(leaf)
        if parts is None:
            yield leaf
        elif id(leaf) not in within:
            for part in parts.values():
                yield from leaves_of(part, (*within, id(leaf)))


def exchanged_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return such containers anew, with what the function returns in the place of everything in them.

    Raises:
        ValueError: one of them cannot be made anew (:func:`fixed_container`).
    """
    fixed = fixed_container(value)
    if fixed is not None:
        raise ValueError(f"it is called with a {type(fixed).__name__}, which cannot be made anew")
    return _anew(function, value)


def _anew(function: Callable[[Any], Any], value: Any) -> Any:
    return tree_map(lambda leaf: _exchanged(function, leaf), value)


def _exchanged(function: Callable[[Any], Any], leaf: Any) -> Any:
    parts = parts_of(leaf)
    if parts is None:
        return function(leaf)
    made = copy.copy(leaf)
    for name, part in parts.items():
        part = _anew(function, part)
        if isinstance(leaf, Mapping):
            made[name] = part
        else:
            object.__setattr__(made, name, part)  # which a frozen dataclass allows
    return made


def fixed_container(value: Any) -> Any:
    """Return the first container that :func:`exchanged_leaves` could not make anew, None where there is none: mappings
    that keep what is in them in a way of their own or make it anew, what refers to itself, and containers with tensors
    that are no part of them (`self.__dict__ = self`, what `__post_init__` makes), which a copy would share."""
    return next(_fixed(value, ()), None)


def _fixed(value: Any, within: tuple[int, ...]) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        parts = parts_of(leaf)
        if parts is None:
            continue
        if id(leaf) in within or _is_fixed(leaf, parts):
            yield leaf
            continue
        for part in parts.values():
            yield from _fixed(part, (*within, id(leaf)))


def _is_fixed(leaf: Any, parts: Mapping[Any, Any]) -> bool:
    if isinstance(leaf, Mapping) and not isinstance(leaf, (dict, UserDict)):
        return True
    if isinstance(leaf, UserDict) and any(leaf.data.get(key) is not part for key, part in parts.items()):
        return True
    mine = [leaf.data] if isinstance(leaf, UserDict) else [] if isinstance(leaf, Mapping) else list(parts.values())
    beside = [each for each in attributes_of(leaf).values() if not any(each is part for part in mine)]
    return any(isinstance(each, Tensor) for each in leaves_of(beside))


def parts_of(leaf: Any) -> Mapping[Any, Any] | None:
    """Return what is in a container that torch does not know; None where it is none."""
    if isinstance(leaf, WHOLE):
        return None
    if isinstance(leaf, Mapping):
        try:
            return dict(leaf.items())
        except Exception:  # a configuration with values that are missing, say
            return None
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in fields(leaf) if hasattr(leaf, field.name)}
    return None


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes that an object has itself, those in `__slots__` too."""
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    slots = {name: getattr(value, name) for name in names if hasattr(value, name)}
    own = getattr(value, "__dict__", None)
    return slots | own if isinstance(own, dict) else slots


def _slots(kind: type) -> list[str]:
    """Return the names in the `__slots__` of a class, as Python itself writes those that are private to it."""
    slots = vars(kind).get("__slots__", ())
    private = f"_{kind.__name__.lstrip('_')}"
    return [
        private + name if name.startswith("__") and not name.endswith("__") else name
        for name in ([slots] if isinstance(slots, str) else slots)
        if name not in ("__dict__", "__weakref__")
    ]
