"""Checks of arguments that many functions and classes take: counts and names of choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def is_integer(value: Any) -> bool:
    """Return whether the value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(argument: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Raise ValueError unless the value is an integer >= least (or None, where it is optional); True is no count."""
    if optional and value is None:
        return
    if not is_integer(value) or value < least:
        also = " or None" if optional else ""
        raise ValueError(f"{argument}: expected an integer >= {least}{also}, got {value!r}")


def check_choice(argument: str, value: Any, choices: Sequence[str], *, optional: bool = False, why: str = "") -> None:
    """Raise ValueError unless the value is one of these names (or None, where it is optional); `why` ends the message.

    The names of a public argument come from the Literal that is its type, by typing.get_args().
    """
    if optional and value is None:
        return
    if not isinstance(value, str) or value not in choices:
        *others, last = [*map(repr, choices), *(["None"] if optional else [])]
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{argument}: expected {expected}, got {value!r}{why}")
