"""Checks of arguments that many functions and classes take: counts and names of choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_count(argument: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Raise ValueError unless the value is an integer >= least (or None, where it is optional); True is no count."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        also = " or None" if optional else ""
        raise ValueError(f"{argument}: expected an integer >= {least}{also}, got {value!r}")


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of these names."""
    if not isinstance(value, str) or value not in choices:
        *others, last = [repr(choice) for choice in choices]
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")
