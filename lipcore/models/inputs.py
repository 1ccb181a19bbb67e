"""The tensor among a model's arguments that its function is differentiated by, and how another takes its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: An argument or keyword of forward (or an entry of a dict or dataclass among them), or a function of (arguments,
#: keywords) that returns one of the tensors in them.
InputChoice = str | Callable[[tuple[Any, ...], dict[str, Any]], Tensor]


def check_input_choice(choice: Any) -> None:
    """Raise TypeError where `input=` is no such choice."""
    if choice is not None and not isinstance(choice, str) and not callable(choice):
        raise TypeError(
            "input: expected the name of a module or of an argument of forward, or a function of (arguments, keywords) "
            f"that returns the tensor, got {choice!r}"
        )


def chosen_input(
    model: nn.Module, choice: InputChoice | None, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Tensor | None:
    """Return the input that is meant; None where the first tensor holds integers and nothing was chosen.

    By default it is the first argument, or the one floating tensor inside it or among the keywords.

    Raises:
        ValueError: several tensors could be meant; the choice is none of them, or no plain floating tensor.
    """
    if choice is None and arguments and type(arguments[0]) is Tensor:  # most models, without a search
        if not arguments[0].is_floating_point():
            return None
        if _fits(arguments[0]):
            return arguments[0]
    found = list(_tensors((arguments, keywords)))
    if choice is None:
        floating = [tensor for tensor in found if tensor.is_floating_point()]
        if not found or not found[0].is_floating_point():
            return None
        if not (arguments and arguments[0] is found[0]) and len(floating) > 1:
            raise ValueError(
                f"input: the model is called with {len(floating)} floating tensors; name the one to differentiate by: "
                "input='<argument or keyword>', or a function of (arguments, keywords)"
            )
        chosen: Any = found[0]
    elif callable(choice):
        chosen = choice(arguments, keywords)
        if not any(chosen is tensor for tensor in found):
            raise ValueError("input: the function must return one of the tensors among (arguments, keywords)")
    else:
        chosen = _named(model, choice, arguments, keywords)
    _check(chosen)
    return chosen  # type: ignore[no-any-return]


def places_of(tensor: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int:
    """Return in how many places of the arguments and keywords this very tensor stands."""
    if len(arguments) == 1 and arguments[0] is tensor and not keywords:  # most models, without a search
        return 1
    return sum(found is tensor for found in _tensors((arguments, keywords)))


def _fits(tensor: Tensor) -> bool:
    plain = tensor.layout is torch.strided and not tensor.is_inference()
    return plain and bool(tensor.dim())


def _check(chosen: Any) -> None:
    if not isinstance(chosen, Tensor):
        raise ValueError(f"input: expected a tensor, got a {type(chosen).__name__}; name the tensor in it")
    if type(chosen) not in (Tensor, nn.Parameter) or chosen.layout != torch.strided:
        kind = type(chosen).__name__ if chosen.layout == torch.strided else str(chosen.layout)
        raise ValueError(f"input: expected a plain tensor, got {kind}; pass the model a plain one")
    if not chosen.is_floating_point() or not chosen.dim():
        raise ValueError(
            f"input: expected a floating tensor [B, ...], got {chosen.dtype} {list(chosen.shape)}; name another one"
        )
    if chosen.is_inference():
        raise ValueError("input: was made under torch.inference_mode, so nothing can be differentiated by it; clone it")


def _named(model: nn.Module, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if name in keywords:
        return keywords[name]
    try:
        bound = inspect.signature(model.forward).bind_partial(*arguments, **keywords).arguments
    except (TypeError, ValueError):
        bound = {}
    if name in bound:
        return bound[name]
    for value in (*arguments, *keywords.values()):
        entry = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if entry is not None and not isinstance(value, Tensor):
            return entry
    known = ", ".join(map(repr, {**bound, **keywords})) or "none by name"
    raise ValueError(f"input: there is neither a module nor an argument {name!r}; the model was called with {known}")


def argument_names(model: nn.Module) -> list[str]:
    """Return the names that forward gives its arguments; empty where it has no signature of its own."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name, None))


def exchanged(value: Any, old: Tensor, new: Tensor, undo: list[Callable[[], None]]) -> Any:
    """Return the value with `new` wherever `old` was.

    Containers that can change are changed in place, so that what the model writes into them arrives; `undo` gets what
    puts the old tensor back.
    """
    if value is old:
        return new
    if isinstance(value, tuple):
        parts = [exchanged(part, old, new, undo) for part in value]
        if all(mine is theirs for mine, theirs in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, (MutableMapping, list)):
        entries = list(enumerate(value)) if isinstance(value, list) else list(value.items())
        for key, part in entries:
            other = exchanged(part, old, new, undo)
            if other is not part:
                value[key] = other
                undo.append(lambda key=key, part=part, other=other: _put_back_item(value, key, other, part))  # type: ignore[misc]
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            part = getattr(value, entry.name, None)
            other = exchanged(part, old, new, undo)
            if other is not part:
                object.__setattr__(value, entry.name, other)
                undo.append(lambda name=entry.name, part=part, other=other: _put_back(value, name, other, part))  # type: ignore[misc]
    return value


def _put_back_item(container: Any, key: Any, new: Any, old: Any) -> None:
    there = container[key] if not isinstance(container, list) or key < len(container) else None
    if there is new:
        container[key] = old


def _put_back(instance: Any, name: str, new: Any, old: Any) -> None:
    if getattr(instance, name, None) is new:
        object.__setattr__(instance, name, old)
